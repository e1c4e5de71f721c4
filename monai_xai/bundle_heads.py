"""What a bundle's network gives, as its configs and metadata say, and the target that fits it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from monai_xai.errors import InputError, UnsupportedBundleError

Kind = Literal["segmentation", "classes", "values", "points", "boxes", "image", "unknown"]
Config = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """The output of a network that is explained.

    Args:
        kind: what it is.
        channels: how many channels, classes or values there are.
        names: of channels or classes.
        may_overlap: whether each channel is a yes or no of its own (sigmoid), not one of several (softmax).
        part: key of the output, where the network gives several.
    """

    kind: Kind
    channels: int = 1
    names: Mapping[int, str] = field(default_factory=dict)
    may_overlap: bool = False
    part: str | None = None

    def index_of(self, name: str) -> int | None:
        """Return the channel or class of a name, however it is capitalized; None if there is none."""
        wanted = name.casefold()
        return next((index for index, own in self.names.items() if own.casefold() == wanted), None)

    def target(self, index: int | None = None) -> Config:
        """Return the target, as a config, that asks about a channel, class or value.

        Args:
            index: None takes the first channel that is not background, the class that each case is predicted as, or
                the first value.

        Raises:
            UnsupportedBundleError: if this output has no score of its own; says why and what can be asked.
        """
        if self.kind in _REFUSED:
            raise UnsupportedBundleError(_REFUSED[self.kind])
        target: Config
        if self.kind == "segmentation":
            target = {
                "_target_": "monai_xai.RegionScore",
                "channel": self._foreground if index is None else index,
            }
            if self.may_overlap:
                target["region"] = {"_target_": "monai_xai.Predicted", "threshold": 0.0}
        elif self.kind == "points":
            voxel = {"_target_": "monai_xai.Voxel", "index": [0, index or 0]}
            target = {"_target_": "monai_xai.RegionScore", "channel": 0, "region": voxel}
        elif self.kind == "values" or self.channels == 1:
            target = {"_target_": "monai_xai.OutputScore", "index": index or 0}
        else:
            target = {"_target_": "monai_xai.ClassScore", "class_index": index}
        return target if self.part is None else {**target, "head": self.part}

    @property
    def _foreground(self) -> int:
        if self.channels == 1:
            return 0
        unnamed = 0 if self.may_overlap else 1
        return next((i for i, name in sorted(self.names.items()) if name.casefold() != "background"), unnamed)


_SAY_WHAT = "Say which number is meant: --target, see `python -m monai_xai explain --help`."
_REFUSED = {
    "image": f"The network makes an image (generation or registration): none of its voxels is a finding. {_SAY_WHAT}",
    "boxes": "The network finds boxes, whose number and order change with the input: the prediction has no score of "
    "its own, and its evaluator takes lists of images. In part it can be explained in Python: the class score of one "
    "anchor, with a FunctionTarget on the network's own output, that is before boxes are made of it.",
    "unknown": "Neither the bundle's metadata nor its post-processing says what the network's output means. "
    f"{_SAY_WHAT}",
}


def head_of(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> Head:
    """Return what a bundle's network gives.

    Args:
        config: the bundle's config, merged.
        metadata: content of ``configs/metadata.json``; may be empty.
    """
    formats = metadata.get("network_data_format", {})
    outputs: Mapping[str, Mapping[str, Any]] = formats.get("outputs", {})
    steps = list(_postprocessing(config))
    if not outputs:
        return Head(_kind_by_steps(steps), channels=2, may_overlap=_may_overlap(steps))
    name, output = next(
        ((name, output) for name, output in outputs.items() if output.get("format") == "segmentation"),
        next(iter(outputs.items())),
    )
    channels = int(output.get("num_channels", 1))
    names = {int(i): str(n) for i, n in (output.get("channel_def") or {}).items() if str(i).isdigit()}
    kind = _kind(output, channels)
    if kind == "segmentation" and channels > 1 and not (names or _says_classes(steps)):
        kind = "unknown"
    overlap = channels == 1 or _may_overlap(steps)
    return Head(kind, channels, names, overlap, name if len(outputs) > 1 else None)


def _kind(output: Mapping[str, Any], channels: int) -> Kind:
    words = f"{output.get('type', '')} {output.get('format', '')}".lower()
    shape = output.get("spatial_shape", [])
    if "points" in words:
        return "points"
    if "object" in words or "boxes" in words:
        return "boxes"
    if not shape or (all(isinstance(n, int) for n in shape) and math.prod(shape) in (1, channels)):
        return "values" if "regression" in words else "classes"
    if "segmentation" in words or "labels" in words:
        return "segmentation"
    return "image" if "image" in words else "unknown"


def _kind_by_steps(steps: Sequence[Mapping[str, Any]]) -> Kind:
    names = {_class_name(step) for step in steps}
    if names & {"SaveClassificationd", "ClassificationSaver"}:
        return "classes"
    return "segmentation" if names & {"Invertd", "SaveImaged"} and _says_classes(steps) else "unknown"


def _postprocessing(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Iterate over what is done to predictions, wherever a config says so."""
    for name, value in config.items():
        if name not in ("preprocessing", "train", "dataset"):
            yield from (step for step in mappings_in(value) if "_target_" in step)


def mappings_in(value: Any) -> Iterator[Config]:
    """Iterate over a config's mappings, the outer before the inner."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from mappings_in(part)


def _class_name(step: Mapping[str, Any]) -> str:
    return str(step.get("_target_", "")).split(".")[-1]


def _is_set(step: Mapping[str, Any], option: str) -> bool:
    value = step.get(option)
    return bool(value) and value != [False]


def _says_classes(steps: Sequence[Mapping[str, Any]]) -> bool:
    options = ("sigmoid", "softmax", "argmax", "threshold")
    return any(_is_set(step, option) for step in steps for option in options if _is_discrete(step))


def _is_discrete(step: Mapping[str, Any]) -> bool:
    return _class_name(step).rstrip("d") in ("Activations", "AsDiscrete")


def _may_overlap(steps: Sequence[Mapping[str, Any]]) -> bool:
    own = [step for step in steps if _is_discrete(step)]
    if any(_is_set(step, option) for step in own for option in ("softmax", "argmax")):
        return False
    return any(_is_set(step, option) for step in own for option in ("sigmoid", "threshold"))


def index_in(head: Head, value: int | str) -> int | None:
    """Return the channel that a number or a name means; None if it is neither.

    Raises:
        InputError: if there is no channel of that number.
    """
    index = head.index_of(value) if isinstance(value, str) and not value.isdigit() else int(value)
    if index is not None and head.names and not 0 <= index < max(head.channels, len(head.names)):
        named = ", ".join(f"{i} {name}" for i, name in head.names.items())
        raise InputError(f"There is no channel or class {index} in this bundle; there are {named}.")
    return index
