"""What every metric gives back, and the checks that all of them share.

A metric has one value per sample. Where it is undefined (no region, nothing positive in the map, one sample where two
are needed), the value is NaN and a reason says so: it is never a silent 0 or 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_xai.errors import InputError

NOT_EXPLAINED = "the sample has not been explained"
NOT_FINITE = "the map holds values that are not finite"
EMPTY_BODY = "the mask to look within is empty"
EMPTY_REGION = "the region is empty"
REGION_OUTSIDE = "the region does not overlap the mask to look within"
REGION_FILLS = "the region fills all there is to look within"
NOTHING_POSITIVE = "the map holds nothing positive"
NOTHING = "the map is zero everywhere"
CONSTANT = "the map is constant"


@dataclass(frozen=True, eq=False)
class Scores:
    """One value per sample, and why it is undefined where it is.

    Args:
        values: shape (N,), float64 unless the maps are on a GPU; NaN where undefined.
        reasons: for each sample "" or why it is undefined.

    Raises:
        InputError: if there is not one reason per sample.

    Example:
        >>> scores = Scores(torch.tensor([0.5, float("nan")]), ("", "the region is empty"))
        >>> float(scores.mean()), scores.not_available()
        (0.5, {'the region is empty': 1})
    """

    values: Tensor
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        reasons = self.reasons or ("",) * len(self.values)
        if self.values.ndim != 1 or len(reasons) != len(self.values):
            raise InputError(
                f"Scores need one value and one reason per sample, got values of shape "
                f"{tuple(self.values.shape)} and {len(reasons)} reasons."
            )
        undefined = self.values.isnan().tolist()
        pairs = zip(reasons, undefined, strict=True)
        reasons = tuple((reason or "not a number") if is_nan else "" for reason, is_nan in pairs)
        object.__setattr__(self, "reasons", reasons)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def defined(self) -> Tensor:
        """Where there is a value, shape (N,), bool."""
        return ~self.values.isnan()

    def mean(self) -> Tensor:
        """Return the mean over samples that have a value; NaN if none has."""
        return self.values.nanmean()

    def not_available(self) -> dict[str, int]:
        """Return how many samples have no value, by reason."""
        return dict(Counter(reason for reason in self.reasons if reason))


def undefined_where(values: Tensor, *causes: tuple[Tensor, str]) -> Scores:
    """Return scores that are NaN wherever one of the causes holds; the first that holds is the reason.

    Args:
        values: shape (N,).
        causes: pairs of a mask of samples, shape (N,), and the reason.
    """
    if not causes:
        return Scores(values)
    holds = torch.stack([mask.expand(values.shape) for mask, _ in causes])
    reasons = tuple(
        next((reason for (_, reason), here in zip(causes, sample, strict=True) if here), "")
        for sample in holds.T.tolist()
    )
    return Scores(values.masked_fill(holds.any(0), float("nan")), reasons)


def as_one_map(maps: Tensor) -> Tensor:
    """Return the signed sum over channels: one map per sample, in float64 unless the maps are on a GPU.

    Args:
        maps: shape (N, C, *spatial), any real; also (N, F) for what is no image (then nothing is summed).

    Returns:
        Shape (N, 1, *spatial), or (N, 1, F).

    Raises:
        InputError: if they are no such maps.
    """
    if maps.ndim < 2 or maps.numel() == 0 or maps.is_complex():
        raise InputError(
            f"Maps must be real, of shape (N, C, *spatial), got {tuple(maps.shape)}, {maps.dtype}."
        )
    values = real(maps)
    return values.unsqueeze(1) if maps.ndim == 2 else values.sum(1, keepdim=True)


def real(maps: Tensor) -> Tensor:
    """Return a plain, detached tensor in float64 on the CPU, in float32 or what is finer elsewhere."""
    plain = maps.as_tensor() if isinstance(maps, MetaTensor) else maps
    on_cpu = plain.device.type == "cpu"
    return plain.detach().to(torch.float64 if on_cpu else torch.promote_types(plain.dtype, torch.float32))


def as_mask(mask: Tensor, like: Tensor, name: str = "region") -> Tensor:
    """Return a mask as bool on the device of the map, one per sample.

    Args:
        mask: shape (N, 1, *spatial) or (1, 1, *spatial), bool or 0 and 1.
        like: the map, shape (N, 1, *spatial).
        name: what errors call it.

    Raises:
        InputError: if it has another shape, or other values than 0 and 1.
    """
    plain = (mask.as_tensor() if isinstance(mask, MetaTensor) else mask).detach().to(like.device)
    if plain.shape[1:] != like.shape[1:] or plain.shape[0] not in (1, like.shape[0]):
        raise InputError(
            f"The {name} must have the shape of the map with one channel, {tuple(like.shape)}, "
            f"got {tuple(plain.shape)}."
        )
    if plain.dtype != torch.bool and not ((plain == 0) | (plain == 1)).all():
        found = plain.unique()[:5].tolist()
        raise InputError(
            f"The {name} must be bool or hold only 0 and 1, got {found}: choose a class, {name} == 1, say."
        )
    return plain.bool().expand(like.shape)


def body_of(within: Tensor | None, like: Tensor) -> Tensor:
    """Return the mask to look within, everywhere if there is none: shape (N, 1, *spatial), bool."""
    return torch.ones_like(like, dtype=torch.bool) if within is None else as_mask(within, like, "within")


def foreground(image: Tensor, background: float | None = None) -> Tensor:
    """Return where an image is not background: the mask to look within, where there is no better one.

    Args:
        image: shape (N, C, *spatial).
        background: value of the background in all channels; None: in each channel that of its first voxel, a corner.

    Returns:
        Shape (N, 1, *spatial), bool: voxels where any channel differs. With noise in the air that is nearly all.
    """
    values = real(image)
    corner = values.flatten(2)[..., :1].reshape(*values.shape[:2], *[1] * (values.ndim - 2))
    return (values != (corner if background is None else background)).any(1, keepdim=True)


def spacing_of(maps: Tensor, spacing: Sequence[float] | None) -> list[tuple[float, ...]]:
    """Return the size of a voxel in millimeters along each spatial axis, for each sample.

    Args:
        maps: shape (N, C, *spatial).
        spacing: one size per axis; None takes it from the affine of a ``MetaTensor``.

    Raises:
        InputError: if there is none, or it does not fit the maps.
    """
    dims, n = maps.ndim - 2, maps.shape[0]
    if spacing is not None:
        sizes = tuple(float(size) for size in spacing)
        if len(sizes) != dims or not all(0 < size < float("inf") for size in sizes):
            raise InputError(f"spacing={tuple(spacing)} must be {dims} positive sizes of a voxel in mm.")
        return [sizes] * n
    if not isinstance(maps, MetaTensor):
        raise InputError(
            "Distances are in mm: give the size of a voxel, spacing=(1.0, ...), or a MetaTensor."
        )
    affine = maps.affine.double().reshape(-1, *maps.affine.shape[-2:])
    columns = affine[:, :, :dims][:, :-1].norm(dim=1).tolist()
    if len(columns) not in (1, n) or not all(size > 0 for sizes in columns for size in sizes):
        raise InputError(
            f"The affine of the maps gives no voxel size for each of {n} samples: give spacing=(...)."
        )
    return [tuple(sizes) for sizes in columns] * (n // len(columns))


def grown(mask: Tensor, margins: Sequence[int]) -> Tensor:
    """Return a mask grown by a box.

    Args:
        mask: shape (N, 1, *spatial), bool.
        margins: by how many voxels to each side, for each spatial axis.
    """
    for axis, margin in enumerate(margins, 2):
        reach = min(margin, mask.shape[axis] - 1)
        mask = torch.stack([moved(mask, axis, step) for step in range(-reach, reach + 1)]).any(0)
    return mask


def moved(mask: Tensor, axis: int, step: int) -> Tensor:
    """Return a mask moved along one axis; what leaves the image is lost."""
    found, length = torch.zeros_like(mask), mask.shape[axis] - abs(step)
    if length > 0:
        found.narrow(axis, max(step, 0), length).copy_(mask.narrow(axis, max(-step, 0), length))
    return found
