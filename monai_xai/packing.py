"""Explanations as plain values, to be written to JSON or handed to another process, and back without loss."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils.enums import MetaKeys
from torch import Tensor

from monai_xai.explanation import Explanation
from monai_xai.modalities import ModalityExplanation

_CLASSES = {"Explanation": Explanation, "ModalityExplanation": ModalityExplanation}
_CLASS, _TENSOR, _AFFINE, _ITEMS = "__class__", "__tensor__", "__affine__", "__items__"


def pack(value: Any, of_tensor: Callable[[Tensor], Any] | None = None) -> Any:
    """Return a value of dicts, lists, tensors, texts and numbers, which ``torch.load(weights_only=True)`` takes.

    Of the metadata of a ``MetaTensor``, its place in space is kept.

    Args:
        value: explanations, tensors, and mappings and sequences of them.
        of_tensor: what becomes of a tensor; None keeps it.
    """
    if isinstance(value, MetaTensor):
        places = {
            key: value.meta[key] for key in (MetaKeys.ORIGINAL_AFFINE, MetaKeys.SPACE) if key in value.meta
        }
        plain = pack(value.as_tensor(), of_tensor)
        return {_TENSOR: plain, _AFFINE: [pack(value.affine), pack({str(k): v for k, v in places.items()})]}
    if isinstance(value, Tensor):
        plain = value.detach().cpu()
        return plain if of_tensor is None else of_tensor(plain)
    if isinstance(value, Mapping):
        return {_ITEMS: [[pack(key), pack(part, of_tensor)] for key, part in value.items()]}
    if type(value).__name__ in _CLASSES:
        named = {f.name: pack(getattr(value, f.name), of_tensor) for f in fields(value)}
        return {_CLASS: type(value).__name__, **named}
    if isinstance(value, list | tuple):
        return [pack(part, of_tensor) for part in value]
    if isinstance(value, np.ndarray | np.generic):
        return pack(torch.as_tensor(value), of_tensor)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def unpack(value: Any) -> Any:
    """Return what was packed; sequences come back as tuples."""
    if isinstance(value, list):
        return tuple(unpack(part) for part in value)
    if not isinstance(value, Mapping):
        return value
    if _ITEMS in value:
        return {unpack(key): unpack(part) for key, part in value[_ITEMS]}
    if _AFFINE in value:
        affine, places = (unpack(part) for part in value[_AFFINE])
        return MetaTensor(unpack(value[_TENSOR]), affine=affine, meta=places)
    if _CLASS in value:
        named = {name: unpack(part) for name, part in value.items() if name != _CLASS}
        return _CLASSES[value[_CLASS]](**named)
    return _from_text(value)


def as_text(tensor: Tensor) -> dict[str, Any]:
    """Return a tensor as JSON knows it, exactly, for :func:`pack`."""
    array = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    data = base64.b64encode(array.contiguous().numpy().tobytes()).decode()
    return {_TENSOR: data, "dtype": str(array.numpy().dtype), "shape": list(tensor.shape)}


def _from_text(value: Mapping[str, Any]) -> Tensor:
    data = np.frombuffer(base64.b64decode(value[_TENSOR]), dtype=value["dtype"])
    return torch.from_numpy(data.reshape(value["shape"]).copy())
