"""Config overlays that add explanations to a bundle of others, without an edit to it."""

from __future__ import annotations

from pathlib import Path

from monai_xai.errors import InputError

_FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """Return the names of the overlays.

    Example:
        >>> names()
        ('comparison', 'explain', 'flat', 'grounding', 'inference', 'modalities', 'processes', 'train')
    """
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.yaml")))


def path(name: str) -> Path:
    """Return the file of an overlay, for ``python -m monai.bundle run --config_file "['...', '<this file>']"``.

    Args:
        name: "explain" for a bundle's inference, in a run that can be interrupted, "inference" for one that saves maps
            through the bundle's own post-processing, "modalities" for what each of its sequences or images gives,
            "grounding" for a verdict on its explanations, "comparison" for which method explains it best,
            "processes" to spread a run over several processes, behind one of the others,
            "train" for its training or evaluation where the validation is ``validate::evaluator``, "flat" where it is
            plain ``evaluator``.

    Raises:
        InputError: if there is no such overlay.

    Example:
        >>> path("inference").name
        'inference.yaml'
    """
    if name not in names():
        raise InputError(f"There is no overlay {name!r}; there are {', '.join(names())}.")
    return _FOLDER / f"{name}.yaml"
