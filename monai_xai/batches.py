"""What an engine has just fed to its network, read from its state."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ignite.engine import Engine
from monai.data import MetaTensor
from monai.utils.enums import CommonKeys
from torch import Tensor

from monai_xai.calls import CallForm, RecordingInferer
from monai_xai.errors import InputError
from monai_xai.undisturbed import preserved_generators


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of an engine.

    Args:
        engine: whose batch it is; inputs and label are read from it when they are asked for.
        first: index in the epoch of the first row.
        case_key: where the batch holds case names.
        places: index in the data set of each row, where rows do not come in that order.
    """

    engine: Engine
    first: int
    case_key: str
    places: Sequence[int] | None = None

    @cached_property
    def size(self) -> int:
        """How many rows there are."""
        output, batch = self.engine.state.output, self.engine.state.batch
        image = output.get(CommonKeys.IMAGE) if isinstance(output, dict) else None
        if image is None and isinstance(batch, Mapping):
            image = batch.get(CommonKeys.IMAGE)
            image = next(iter(batch.values())) if image is None else image
        elif image is None:
            image = batch[0]
        return len(_first_tensor(image))

    def place(self, row: int) -> int:
        """Return the index of a row in the data set."""
        return self.first + row if self.places is None else self.places[row]

    @property
    def prediction(self) -> Any:
        """The network's output."""
        output = self.engine.state.output
        return output.get(CommonKeys.PRED) if isinstance(output, dict) else None

    @property
    def label(self) -> Any:
        """Ground truth: a tensor, tensors by head, or None."""
        return self._fed.label

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The inputs of the network by name, in call order."""
        return self._fed.inputs

    @property
    def call(self) -> CallForm:
        """How the network takes them."""
        return self._fed.call

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the cases: the batch's own, else from file names, else their number in the epoch.

        A file name without a number, such as ``flair.nii.gz`` or ``T1.nii.gz``, names a kind of image and no case: its
        folder is put in front.
        """
        made_up = [f"case{self.place(i)}" for i in range(self.size)]
        return tuple(map(as_name, made_up if self._given_names is None else self._given_names))

    @property
    def has_names(self) -> bool:
        """Whether the cases have names of their own, and are not only counted."""
        return self._given_names is not None

    @cached_property
    def _given_names(self) -> list[Any] | None:
        batch = self.engine.state.batch
        if not isinstance(batch, Mapping):
            return None
        names = batch.get(self.case_key)
        if names is not None:
            return _as_list(names)
        image = batch.get(CommonKeys.IMAGE)
        files = image.meta.get("filename_or_obj") if isinstance(image, MetaTensor) else None
        return None if files is None else [case_of(file) for file in _as_list(files)]

    @cached_property
    def _fed(self) -> Fed:
        fed = _read(self.engine)
        output = self.engine.state.output
        if isinstance(output, dict) and fed.call not in ("mapping", "sequence"):
            own = output.get(CommonKeys.IMAGE)
            label = output.get(CommonKeys.LABEL, fed.label)
            label = fed.label if isinstance(label, list | tuple) and not label else label
            inputs = fed.inputs if own is None else {**fed.inputs, CommonKeys.IMAGE: own}
            return replace(fed, inputs=inputs, label=label)
        return fed


@dataclass(frozen=True, eq=False)
class Fed:
    """What a network was fed with, and how.

    Args:
        inputs: by name, in call order.
        label: ground truth.
        call: how the network takes its inputs.
    """

    inputs: Mapping[str, Tensor]
    label: Any
    call: CallForm = "arguments"


def _read(engine: Engine) -> Fed:
    """Read the batch as the engine's own ``prepare_batch`` does; of a plain engine, as image and label.

    Of an engine that calls its inferer in a way of its own, read what it has called it with.
    """
    inferer = getattr(engine, "inferer", None)
    if isinstance(inferer, RecordingInferer) and isinstance(inferer.inputs, Tensor):
        return _read_recorded(inferer.inputs)
    prepare = getattr(engine, "prepare_batch", None)
    if prepare is None:
        return _read_plain(engine.state.batch)
    with preserved_generators():
        batch = prepare(
            engine.state.batch,
            engine.state.device,
            engine.non_blocking,
            **engine.to_kwargs,
        )
    image, label, *further = batch
    label = None if isinstance(label, list | tuple) and not label else label
    arguments, keywords = further or ((), {})
    if isinstance(image, Mapping):
        return Fed(_tensors(image), label, "mapping")
    if isinstance(image, list | tuple):
        return Fed(_tensors({f"input{i}": x for i, x in enumerate(image)}), label, "sequence")
    given = getattr(prepare, "extra_keys", None)
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Sequence) or len(names) != len(arguments):
        names = [f"input{i + 1}" for i in range(len(arguments))]
    inputs = {CommonKeys.IMAGE.value: image, **dict(zip(names, arguments, strict=True)), **keywords}
    return Fed(_tensors(inputs), label, tuple(keywords) if keywords else "arguments")


def _read_recorded(inputs: Tensor) -> Fed:
    if len(inputs) > 1:
        raise InputError(
            "An engine that calls its inferer in a way of its own, with prompts say, can be explained one case at a "
            f"time, got a batch of {len(inputs)}: set the batch size of its data loader to 1."
        )
    return Fed({CommonKeys.IMAGE.value: inputs}, None)


def _read_plain(batch: Any) -> Fed:
    if isinstance(batch, Mapping) and CommonKeys.IMAGE in batch:
        return Fed(_tensors({CommonKeys.IMAGE.value: batch[CommonKeys.IMAGE]}), batch.get(CommonKeys.LABEL))
    if isinstance(batch, list | tuple) and len(batch) in (1, 2):
        label = batch[1] if len(batch) == 2 else None
        return Fed(_tensors({CommonKeys.IMAGE.value: batch[0]}), label)
    raise InputError(
        f"The batch of a plain ignite engine must be a dict with {CommonKeys.IMAGE.value!r} (and "
        f"{CommonKeys.LABEL.value!r}), or a pair of image and label, got {_describe(batch)}. Use a MONAI engine with a "
        "prepare_batch, or call an Explainer in a handler of your own."
    )


def _tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return inputs that are all tensors.

    Raises:
        InputError: naming one that is none, such as a modality that is absent in a case.
    """
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise InputError(
                f"The input {name!r} of the network is {_describe(x)}, not a tensor: every case needs it. Give absent "
                "modalities the value that the network saw for them in training, or leave the case out."
            )
    return {str(name): x for name, x in inputs.items()}


def row_of(value: Any, row: int) -> Any:
    """Return one row of a batched tensor, or of the tensors in a list or dict, with a batch axis of one."""
    if isinstance(value, Tensor):
        return value[row : row + 1]
    if isinstance(value, Mapping):
        return {key: row_of(part, row) for key, part in value.items()}
    return [row_of(part, row) for part in value] if isinstance(value, list | tuple) else value


_OF_A_KIND = re.compile(
    r"""(?<![a-z])(
    t[12](?!\d)                                          # T1, T2
    | (?<=[_-])n4(?!\d) | n4(?=[_-])                     # the correction N4, beside another word
    | [23]d(?![a-z])
    | mni152
    | iso\d+(_\d+)?mm | \d+(\.\d+|_\d+)?(x\d+(\.\d+)?)*mm  # size of voxels
    | \d(\.\d)?t(?![a-z])                               # strength of the field
    )""",
    re.IGNORECASE | re.VERBOSE,
)
"""Numbers that tell the sequence, correction, size of voxels, space or field of a scan, and not the patient."""


def case_of(file: Any) -> str:
    """Return the name of the case that a file is of: with that of its folder, where its own is that of a kind of scan.

    Example:
        >>> case_of("scans/BRATS_001.nii.gz"), case_of("patient19/T1POST_N4_regtoMNI.nii.gz")
        ('BRATS_001', 'patient19_T1POST_N4_regtoMNI')
    """
    path = Path(str(file).removesuffix(".gz"))
    is_kind = not any(letter.isdigit() for letter in _OF_A_KIND.sub("", _words(path.stem)))
    return f"{path.parent.name}_{path.stem}" if is_kind and path.parent.name else path.stem


def _words(name: str) -> str:
    """Return a name with its words apart where a capital begins one, as in ``brainT1``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)


def as_name(value: Any) -> str:
    """Return a name that can be printed, also of a file whose name is no text."""
    name = str(value.item() if isinstance(value, Tensor) else value)
    return name.encode("utf-8", "backslashreplace").decode()


def _first_tensor(value: Any) -> Any:
    while isinstance(value, Mapping | list | tuple):
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return value


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _describe(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
