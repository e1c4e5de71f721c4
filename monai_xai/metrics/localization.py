"""Does the attribution lie where it is expected? Judged by maps and masks alone.

All functions take ``maps`` of shape (N, C, *spatial), signed, and look at their sum over channels; ``region`` of shape
(N, 1, *spatial), bool or 0 and 1; and ``within``, the body or organ to look within, of the same shape (None:
everywhere). They compute where the maps are, in 2D and 3D, one value per sample: :class:`~monai_xai.metrics.Scores`.

A region that is empty, lies outside of ``within`` or fills it says nothing about a map: there every score is undefined.
None of them says whether the *model* uses the region; that takes a change of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import ceil, floor, inf, nan
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from monai_xai.errors import InputError
from monai_xai.metrics.base import (
    CONSTANT,
    EMPTY_BODY,
    EMPTY_REGION,
    NOT_EXPLAINED,
    NOT_FINITE,
    NOTHING,
    NOTHING_POSITIVE,
    REGION_FILLS,
    REGION_OUTSIDE,
    Scores,
    as_mask,
    as_one_map,
    body_of,
    real,
    spacing_of,
    undefined_where,
)

Part = Literal["positive", "negative", "absolute"]
Cause = tuple[Tensor, str]

_PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "positive": lambda values: values.clamp(min=0),
    "negative": lambda values: (-values).clamp(min=0),
    "absolute": torch.abs,
}
_BINS = 256
_TOLERANCE_FILLS = "the region with its tolerance fills all there is to look within"
_ROUNDING = 1e-5


class Lesion(NamedTuple):
    """One connected component of a region, and what a map shows of it.

    Args:
        sample: index of the sample.
        lesion: number within the sample, from the largest, 0.
        voxels: its size.
        center: its center of mass, in voxels.
        mass: share of the positive attribution within the body; NaN if there is none.
        hit: share of the highest points that it holds when it stands alone against what is no lesion, 1 or 0 unless
            several points are equally high; NaN where that is undefined.
    """

    sample: int
    lesion: int
    voxels: int
    center: tuple[float, ...]
    mass: float
    hit: float


class Structure(NamedTuple):
    """One structure of an atlas in one sample, and what of the attribution lies in it.

    Args:
        sample: index of the sample.
        structure: its name.
        voxels: its size within the body.
        total: signed sum of its attribution, in units of the map.
        share: share of the attribution within the body; NaN where undefined.
        enrichment: the share over the share of voxels: 1 is what chance gives; NaN where undefined.
        reason: "" or why share or enrichment are undefined.
    """

    sample: int
    structure: str
    voxels: int
    total: float
    share: float
    enrichment: float
    reason: str


class Zones(NamedTuple):
    """Shares of the attribution inside a region, in a ring around it, and in the context further away; sum 1."""

    inside: Scores
    ring: Scores
    context: Scores


# ------------------------------------------------------------------------------------------------------------- mass


def relevance_mass(
    maps: Tensor, region: Tensor, within: Tensor | None = None, *, part: Part = "positive"
) -> Scores:
    """Return the share of the attribution that falls into the region, in [0, 1]; higher is better.

    ``sum_R a+ / sum_V a+``; a map that is equal everywhere gets ``|R| / |V|``.

    Args:
        maps: shape (N, C, *spatial), signed.
        region: R, shape (N, 1, *spatial), bool or 0 and 1.
        within: V, shape (N, 1, *spatial); None: everywhere.
        part: the positive part of the map, its negative part or its magnitude.

    Returns:
        One share per sample. Undefined where the map holds nothing of that part, or the region is empty, lies
        outside of V or fills it.

    Raises:
        InputError: if shapes do not fit, a mask holds other values than 0 and 1, or the part is unknown.

    Reference: Arras, Osman, Samek, "CLEVR-XAI", Information Fusion 2022 (doi:10.1016/j.inffus.2021.11.008), on the
    positive part: on signed maps, sums were seen to give -75 and +19.

    Example:
        >>> maps = torch.tensor([[[[3.0, 1.0], [-5.0, 0.0]]]])
        >>> relevance_mass(maps, maps == 3.0).values
        tensor([0.7500], dtype=torch.float64)
    """
    a, r, v, causes = _prepared(maps, region, within)
    mass = _magnitude(a, part) * v
    total = mass.sum(1)
    return undefined_where((mass * r).sum(1) / total, *causes, _nothing(total, part))


def enrichment(
    maps: Tensor,
    region: Tensor,
    within: Tensor | None = None,
    *,
    part: Part = "positive",
    k: int | None = None,
) -> Scores:
    """Return how many times more attribution the region holds than its size gives by chance; 1 is chance.

    Relevance mass over ``|R| / |V|``. With ``k``, the share of the k highest voxels that lie in the region takes the
    place of the mass (concept influence).

    Args:
        maps: shape (N, C, *spatial), signed.
        region: shape (N, 1, *spatial).
        within: shape (N, 1, *spatial); None: everywhere.
        part: see :func:`relevance_mass`; without effect where ``k`` is given.
        k: count of the highest voxels to look at.

    Returns:
        One ratio per sample, undefined where the relevance mass (or the rank accuracy) is. Show it on a log scale.

    Raises:
        InputError: as :func:`relevance_mass` and :func:`rank_accuracy`.

    Reference: the form with ``k``: Theiner, Müller-Budack, Ewerth, "Interpretable semantic photo geolocation", WACV
    2022.
    """
    by_mass = k is None
    share = (
        relevance_mass(maps, region, within, part=part)
        if by_mass
        else rank_accuracy(maps, region, within, k=k)
    )
    return Scores(share.values / prevalence(region, within, like=maps).values, share.reasons)


def shares(
    maps: Tensor,
    region: Tensor,
    ring_mm: float,
    spacing: Sequence[float] | None = None,
    *,
    within: Tensor | None = None,
    part: Part = "positive",
) -> Zones:
    """Return which shares of the attribution lie inside a region, in a ring around it, and in the context beyond.

    For a segmentation the region is the predicted mask: there the target itself dominates, so that the context alone
    tells what else the network looked at.

    Args:
        maps: shape (N, C, *spatial), signed.
        region: shape (N, 1, *spatial).
        ring_mm: width of the ring in millimeters, from voxel center to voxel center.
        spacing: size of a voxel along each axis, in millimeters; None takes it from the affine of a ``MetaTensor``.
        within: shape (N, 1, *spatial); None: everywhere.
        part: see :func:`relevance_mass`.

    Returns:
        Three shares per sample, which add up to 1. Undefined as :func:`relevance_mass`; ring and context also where
        they hold no voxel.

    Raises:
        InputError: as :func:`relevance_mass`; and if the width is not positive or the voxel size is not known.
    """
    if not 0 < ring_mm < inf:
        raise InputError(f"shares(ring_mm={ring_mm}) must be a width above 0 mm.")
    a, r, v, causes = _prepared(maps, region, within)
    near = widened(as_mask(region, as_one_map(maps)), ring_mm, spacing_of(maps, spacing)).flatten(1) & v
    mass = _magnitude(a, part) * v
    total = mass.sum(1)
    causes = (*causes, _nothing(total, part))

    def share(zone: Tensor, name: str) -> Scores:
        no_voxel = (~zone.any(1), f"the {name} holds no voxel: choose another ring_mm")
        return undefined_where((mass * zone).sum(1) / total, *causes, no_voxel)

    return Zones(share(r, "region"), share(near & ~r, "ring"), share(v & ~near, "context"))


def structure_table(
    maps: Tensor,
    atlas: Tensor,
    names: Mapping[int, str] | None = None,
    within: Tensor | None = None,
    *,
    part: Part = "positive",
) -> list[Structure]:
    """Return what lies in which structure of an atlas, for every sample.

    Args:
        maps: shape (N, C, *spatial), signed.
        atlas: label of each voxel, integers from 0, shape (N, 1, *spatial) or (1, 1, *spatial).
        names: names of labels; None takes every label that occurs. Voxels of other labels are ``elsewhere``.
        within: shape (N, 1, *spatial); None: everywhere.
        part: of the attribution that is shared out, see :func:`relevance_mass`.

    Returns:
        A row per sample and structure, in the order of the names; shares of a sample add up to 1. A structure that
        does not occur within the body has a share of NaN, and a reason.

    Raises:
        InputError: if shapes do not fit, or the atlas holds something else than labels from 0.
    """
    one = as_one_map(maps)
    labels = _labels(atlas, one)
    known = dict(names) if names is not None else {i: str(i) for i in labels.unique().tolist()}
    places = torch.full((max([int(labels.max()), *known]) + 1,), len(known), device=labels.device)
    for place, label in enumerate(known):
        places[label] = place
    titles = [*known.values(), "elsewhere"]
    rows = zip(one.flatten(1), places[labels], body_of(within, one).flatten(1), strict=True)
    return [
        row
        for sample, (values, where, body) in enumerate(rows)
        for row in _structures(sample, values[body], where[body], titles, part)
    ]


def modality_specific_importance(
    maps: Tensor,
    region: Tensor,
    importance: Tensor,
    within: Tensor | None = None,
    *,
    mode: Literal["max", "jin"] = "max",
) -> Scores:
    """Return how well a map tells both which modality matters and where in it (MSFI), in [0, 1]; higher is better.

    ``sum_m phi_m mass_m / sum_m phi_m``, with the relevance mass of each modality and the importance phi that it has
    for the model.

    Args:
        maps: a channel per modality, shape (N, M, *spatial), signed.
        region: where each modality shows the finding, shape (N, M, *spatial), or (N, 1, *spatial) for all alike.
        importance: of the modalities for the model, shape (N, M): Shapley values of
            :class:`~monai_xai.ModalityShapley`, say.
        within: shape (N, 1, *spatial); None: everywhere.
        mode: "max" rescales importance to ``max(phi, 0) / max phi``. "jin" takes the extremes to 0 and 1, as the
            authors' code does: the weakest modality then counts for nothing, and equal ones are undefined.

    Returns:
        One value per sample. A modality that matters but has no positive attribution counts with a mass of 0: the map
        missed it. Undefined where no modality matters, the whole map holds nothing positive, or the region of a
        modality that matters is empty, outside of the body or all of it.

    Raises:
        InputError: if shapes do not fit.

    Reference: Jin, Li, Hamarneh, "Evaluating explainable AI on a multi-modal medical imaging task", AAAI 2022.
    """
    n, m = maps.shape[:2]
    if importance.shape != (n, m):
        raise InputError(
            f"importance must have shape {(n, m)}, one per modality, got {tuple(importance.shape)}."
        )
    if region.shape[1] not in (1, m):
        raise InputError(f"region must have 1 or {m} channels, one per modality, got {tuple(region.shape)}.")
    if mode not in ("max", "jin"):
        raise InputError(f"modality_specific_importance(mode={mode!r}): choose 'max' or 'jin'.")
    phi = real(importance).to(maps.device)
    lowest = phi.amin(1, keepdim=True) if mode == "jin" else torch.zeros_like(phi[:, :1])
    weights = ((phi - lowest) / (phi.amax(1, keepdim=True) - lowest)).clamp(min=0)
    regions = region.expand(-1, m, *region.shape[2:])
    each = [relevance_mass(maps[:, i : i + 1], regions[:, i : i + 1], within) for i in range(m)]
    counts = weights > 0
    mass = torch.stack([one.values.nan_to_num(0.0) for one in each], 1)
    values = (weights * mass).sum(1) / weights.sum(1)
    causes = [
        (~phi.isfinite().all(1), "the importance of a modality is not finite"),
        (
            phi.amax(1) <= lowest[:, 0],
            "no modality matters" if mode == "max" else "all modalities matter alike",
        ),
    ]
    for reason in (NOT_EXPLAINED, NOT_FINITE, EMPTY_BODY, EMPTY_REGION, REGION_OUTSIDE, REGION_FILLS):
        fails = torch.stack([_flags(found == reason for found in one.reasons) for one in each], 1)
        causes.append(((fails.to(counts.device) & counts).any(1), f"in a modality that matters {reason}"))
    positive = real(maps).clamp(min=0).masked_fill(~body_of(within, as_one_map(maps)), 0.0)
    return undefined_where(values, *causes, (positive.flatten(1).sum(1) <= 0, NOTHING_POSITIVE))


# ------------------------------------------------------------------------------------------------------------- rank


def rank_accuracy(
    maps: Tensor, region: Tensor, within: Tensor | None = None, *, k: int | None = None
) -> Scores:
    """Return which share of the highest voxels lies in the region, in [0, 1]; higher is better.

    Of the ``|R|`` highest voxels of V, the share in R. Voxels that tie for the last places count by the share of them
    that lies in R, as if the places were drawn: a constant map gets ``|R| / |V|``.

    Args:
        maps: shape (N, C, *spatial), signed.
        region: shape (N, 1, *spatial).
        within: shape (N, 1, *spatial); None: everywhere.
        k: look at the k highest voxels in place of ``|R|`` (top-k intersection).

    Returns:
        One share per sample; undefined where the region is empty, outside of V or all of it, or V has less than k
        voxels.

    Raises:
        InputError: as :func:`relevance_mass`; and if k is below 1.

    Reference: Arras, Osman, Samek, "CLEVR-XAI", Information Fusion 2022 (doi:10.1016/j.inffus.2021.11.008); with
    ``k``: Theiner, Müller-Budack, Ewerth, WACV 2022.
    """
    if k is not None and k < 1:
        raise InputError(f"rank_accuracy(k={k}) must look at 1 voxel at least.")
    a, r, v, causes = _prepared(maps, region, within)
    places = r.sum(1) if k is None else torch.full_like(r.sum(1), k)
    size = v.sum(1)
    ranked = a.masked_fill(~v, -inf).sort(1, descending=True).values
    last = torch.minimum(places, size).clamp(min=1)[:, None] - 1
    threshold = ranked.gather(1, last)
    above, equal = v & (a > threshold), v & (a == threshold)
    left = (places - above.sum(1)).to(a.dtype) / equal.sum(1)
    hits = (above & r).sum(1) + left * (equal & r).sum(1)
    too_few = (places > size, "there are fewer voxels than k to look within")
    return undefined_where(hits / places, *causes, too_few)


def average_precision(maps: Tensor, region: Tensor, within: Tensor | None = None) -> Scores:
    """Return the area under the precision-recall curve of a map as a detector of the region; higher is better.

    ``sum_n (R_n - R_{n-1}) P_n`` over the distinct values of the map. A constant map gets the prevalence of the region,
    which is what chance gives: report it beside :func:`prevalence` and :func:`mean_mask_precision`.

    Args:
        maps: shape (N, C, *spatial), signed.
        region: shape (N, 1, *spatial).
        within: shape (N, 1, *spatial); None: everywhere.

    Returns:
        One value per sample; undefined where the region is empty, outside of V or all of it.

    Raises:
        InputError: as :func:`relevance_mass`.

    Reference: Arun et al., "Assessing the trustworthiness of saliency maps for localizing abnormalities in medical
    imaging", Radiology: Artificial Intelligence 2021 (doi:10.1148/ryai.2021200267).
    """
    return _by_detection(maps, region, within, _precision)


def roc_auc(maps: Tensor, region: Tensor, within: Tensor | None = None) -> Scores:
    """Return the probability that a voxel of the region is higher than one outside; ties count half; 0.5 is chance.

    For small regions it is close to 1 for any map that is roughly right: prefer :func:`average_precision`.

    Args:
        maps: shape (N, C, *spatial), signed.
        region: shape (N, 1, *spatial).
        within: shape (N, 1, *spatial); None: everywhere.

    Returns:
        One value per sample; undefined where the region is empty, outside of V or all of it.

    Raises:
        InputError: as :func:`relevance_mass`.

    Reference: Fawcett, "An introduction to ROC analysis", Pattern Recognition Letters 2006
    (doi:10.1016/j.patrec.2005.10.010).
    """
    return _by_detection(maps, region, within, _concordance)


def prevalence(region: Tensor, within: Tensor | None = None, *, like: Tensor | None = None) -> Scores:
    """Return the share of voxels that lie in the region: what chance gives in mass, rank accuracy and precision.

    Args:
        region: shape (N, 1, *spatial).
        within: shape (N, 1, *spatial); None: everywhere.
        like: maps, for their number of samples and device.

    Returns:
        One share per sample; undefined where the region is empty, outside of the body or all of it.

    Raises:
        InputError: as :func:`relevance_mass`.
    """
    blank = torch.zeros_like(as_one_map(region.new_zeros(region.shape) if like is None else like))
    _, r, v, causes = _prepared(blank, region, within)
    return undefined_where(r.sum(1).to(blank.dtype) / v.sum(1), *causes)


def mean_mask_precision(
    region: Tensor, within: Tensor | None = None, *, mean_mask: Tensor | None = None
) -> Scores:
    """Return the average precision of the mean mask: what knowing only where findings usually are would reach.

    Args:
        region: aligned masks, shape (N, 1, *spatial).
        within: shape (N, 1, *spatial); None: everywhere.
        mean_mask: how often each voxel belongs to a finding, shape (1, 1, *spatial); None takes the mean of the other
            samples' regions.

    Returns:
        One value per sample; undefined as :func:`average_precision`, and for a single sample without a mean mask.

    Raises:
        InputError: as :func:`relevance_mass`.

    Reference: Arun et al., Radiology: Artificial Intelligence 2021 (the average mask of their code).
    """
    masks = real(region)
    n = masks.shape[0]
    if mean_mask is not None:
        mean = real(mean_mask).to(masks.device).expand_as(masks)
    else:
        mean = (masks.sum(0, keepdim=True) - masks) / max(n - 1, 1)
    found = average_precision(mean, region, within)
    alone = torch.full_like(found.values, n == 1 and mean_mask is None).bool()
    lonely = (alone, "a mean mask needs other samples, or mean_mask")
    known = [
        (_flags(x == reason for x in found.reasons), reason)
        for reason in dict.fromkeys(found.reasons)
        if reason
    ]
    return undefined_where(found.values, *((mask.to(alone.device), reason) for mask, reason in known), lonely)


# ----------------------------------------------------------------------------------------------------------- points


def pointing_game(
    maps: Tensor,
    region: Tensor,
    within: Tensor | None = None,
    *,
    tolerance_mm: float = 0.0,
    spacing: Sequence[float] | None = None,
) -> Scores:
    """Return whether the highest point of a map lies in the region, or so close to it: 1 or 0.

    Where several points are equally high, the share of them that does.

    Args:
        maps: shape (N, C, *spatial), signed.
        region: shape (N, 1, *spatial).
        within: shape (N, 1, *spatial); None: everywhere.
        tolerance_mm: distance to the center of the closest voxel of the region that is still a hit, in millimeters.
        spacing: size of a voxel along each axis, in millimeters; None takes it from the affine of a ``MetaTensor``.
            Not needed without tolerance.

    Returns:
        One value per sample; undefined where the region is empty, outside of V or all of it, and for maps that are
        constant or hold nothing positive. The tolerance must not make the region all of V.

    Raises:
        InputError: as :func:`relevance_mass`; and if the tolerance is negative or the voxel size is not known.

    Reference: Zhang et al., "Top-down neural attention by excitation backprop", IJCV 2018
    (doi:10.1007/s11263-017-1059-x), with 15 pixels as tolerance.
    """
    one, body, causes = _pointed(maps, region, within)
    goal = widened(as_mask(region, one), tolerance_mm, _sizes(maps, tolerance_mm, spacing)) & body
    fills = ((goal | ~body).flatten(1).all(1), _TOLERANCE_FILLS)
    values = torch.stack([_hit(*sample) for sample in zip(one, goal, body, strict=True)])
    return undefined_where(values, *causes, fills)


def lesion_hit_rate(
    maps: Tensor,
    region: Tensor,
    within: Tensor | None = None,
    *,
    tolerance_mm: float = 0.0,
    spacing: Sequence[float] | None = None,
) -> Scores:
    """Return the share of lesions that a map points at, in [0, 1]; higher is better.

    Lesions are the connected components of the region (face, edge or corner). Each plays the :func:`pointing_game` on
    its own, with the other lesions left out: it is hit if its highest point is higher than every point outside of all
    lesions. With one lesion, this is the pointing game.

    Args:
        maps: shape (N, C, *spatial), signed.
        region: shape (N, 1, *spatial).
        within: shape (N, 1, *spatial); None: everywhere.
        tolerance_mm: see :func:`pointing_game`.
        spacing: see :func:`pointing_game`.

    Returns:
        One share per sample; undefined as :func:`pointing_game`. Single lesions are in :func:`lesion_table`.

    Raises:
        InputError: as :func:`pointing_game`.

    Reference: hit rate: Saporta et al., "Benchmarking saliency methods for chest X-ray interpretation", Nature Machine
    Intelligence 2022 (doi:10.1038/s42256-022-00536-x), here per lesion.
    """
    one, body, causes = _pointed(maps, region, within)
    whole, sizes = as_mask(region, one), _sizes(maps, tolerance_mm, spacing)
    rows = [_Lesions(*sample, tolerance_mm).hits() for sample in zip(one, whole, body, sizes, strict=True)]
    values = torch.stack([torch.stack(hits or [one.new_tensor(nan)]).nanmean() for hits in rows])
    return undefined_where(values, *causes, (values.isnan(), _TOLERANCE_FILLS))


def lesion_table(
    maps: Tensor,
    region: Tensor,
    within: Tensor | None = None,
    *,
    tolerance_mm: float = 0.0,
    spacing: Sequence[float] | None = None,
) -> list[Lesion]:
    """Return size, place, mass and hit of every lesion, the largest of each sample first.

    For lesions by size: the gap between maps and people is widest for small ones (Saporta et al. 2022).

    Args:
        maps: shape (N, C, *spatial), signed.
        region: shape (N, 1, *spatial).
        within: shape (N, 1, *spatial); None: everywhere.
        tolerance_mm: see :func:`pointing_game`.
        spacing: see :func:`pointing_game`.

    Returns:
        One row per lesion, none for a sample without lesions.

    Raises:
        InputError: as :func:`pointing_game`.
    """
    one = as_one_map(maps)
    whole, body, sizes = as_mask(region, one), body_of(within, one), _sizes(maps, tolerance_mm, spacing)
    defined = lesion_hit_rate(maps, region, within, tolerance_mm=tolerance_mm, spacing=spacing).defined
    rows = []
    for i, sample in enumerate(zip(one, whole, body, sizes, strict=True)):
        lesions = _Lesions(*sample, tolerance_mm)
        columns = zip(lesions.voxels(), lesions.masses(), lesions.hits(), strict=True)
        for k, (voxels, mass, hit) in enumerate(columns):
            center = tuple(voxels.double().mean(0).tolist())
            rows.append(Lesion(i, k, len(voxels), center, mass, float(hit) if defined[i] else nan))
    return rows


# ---------------------------------------------------------------------------------------------------------- overlap


def overlap(
    maps: Tensor, region: Tensor, within: Tensor | None = None, *, threshold: float | None = None
) -> Scores:
    """Return the intersection over union of the region and the map above a threshold, in [0, 1]; higher is better.

    Args:
        maps: shape (N, C, *spatial), signed; their positive part is taken.
        region: shape (N, 1, *spatial).
        within: shape (N, 1, *spatial); None: everywhere.
        threshold: share of the highest value, in [0, 1), such as one tuned on a validation set; None takes Otsu's
            threshold of each map. Voxels above it are marked.

    Returns:
        One value per sample; undefined where the region is empty, outside of V or all of it, and for maps that are
        constant or hold nothing positive.

    Raises:
        InputError: as :func:`relevance_mass`; and if the threshold is not in [0, 1).

    Reference: Saporta et al., Nature Machine Intelligence 2022 (doi:10.1038/s42256-022-00536-x); Otsu, "A threshold
    selection method from gray-level histograms", IEEE Transactions on Systems, Man, and Cybernetics 1979.
    """
    if threshold is not None and not 0 <= threshold < 1:
        raise InputError(f"overlap(threshold={threshold}) must be a share of the highest value in [0, 1).")
    a, r, v, causes = _prepared(maps, region, within)
    a = a.clamp(min=0)
    causes = (*causes, _nothing((a * v).sum(1), "positive"), _flat(a, v))
    values = []
    for values_of, region_of, body in zip(a, r, v, strict=True):
        cut = (
            values_of[body].amax() * threshold
            if threshold is not None and body.any()
            else otsu(values_of[body])
        )
        marked = (values_of > cut) & body
        values.append((marked & region_of).sum().to(a.dtype) / (marked | region_of).sum())
    return undefined_where(torch.stack(values), *causes)


def otsu(values: Tensor) -> Tensor:
    """Return Otsu's threshold: the center of the bin, of 256, that parts the values with most variance in between.

    Args:
        values: any shape; NaN comes back for values that are constant, not finite, or none at all.
    """
    if values.numel() == 0 or not values.isfinite().all() or values.amin() == values.amax():
        return values.new_full((), nan)
    low, high = values.amin(), values.amax()
    place = ((values.flatten() - low) / (high - low) * _BINS).long().clamp(max=_BINS - 1)
    counts = place.bincount(minlength=_BINS).cpu().double()  # on a GPU, cumsum is not deterministic
    centers = float(low) + (torch.arange(_BINS, dtype=torch.float64) + 0.5) / _BINS * float(high - low)
    below, above = counts.cumsum(0)[:-1], counts.flip(0).cumsum(0).flip(0)[1:]
    total = (counts * centers).cumsum(0)
    between = below * above * (total[:-1] / below - (total[-1] - total[:-1]) / above) ** 2
    return centers[between.argmax()].to(values)


# -------------------------------------------------------------------------------------------------------- the pieces


def widened(mask: Tensor, radius_mm: float, spacing: Sequence[Sequence[float]]) -> Tensor:
    """Return a mask with every voxel whose center is within a distance of the center of one of its voxels.

    The distance is exact and Euclidean, one axis after the other, on the device of the mask.

    Args:
        mask: shape (N, 1, *spatial), bool.
        radius_mm: distance in millimeters; 0 changes nothing.
        spacing: size of a voxel in millimeters along each axis, for each sample.

    Raises:
        InputError: if the distance is negative or not finite.
    """
    if not 0 <= radius_mm < inf:
        raise InputError(f"A distance must be 0 mm or more, got {radius_mm} mm.")
    return torch.stack(
        [_widened(m[0], radius_mm, sizes)[None] for m, sizes in zip(mask, spacing, strict=True)]
    )


def _widened(mask: Tensor, radius_mm: float, spacing: Sequence[float]) -> Tensor:
    limit = radius_mm**2 * (1 + _ROUNDING)  # a distance of exactly the radius counts, however it is rounded
    squared = torch.where(mask, 0.0, inf)
    for axis, size in enumerate(spacing):
        n = mask.shape[axis]
        best = squared.clone()
        for step in range(1, min(floor(radius_mm / size * (1 + _ROUNDING)), n - 1) + 1):
            cost = (step * size) ** 2
            for ahead, behind in (((0, n - step), (step, n)), ((step, n), (0, n - step))):
                target = best.narrow(axis, ahead[0], ahead[1] - ahead[0])
                source = squared.narrow(axis, behind[0], behind[1] - behind[0])
                torch.minimum(target, source + cost, out=target)
        squared = best
    return squared <= limit


def components(mask: Tensor) -> tuple[Tensor, list[tuple[slice, ...]]]:
    """Return the connected components of a mask (face, edge or corner), the largest first.

    Args:
        mask: shape (*spatial), bool.

    Returns:
        Their numbers from 1, 0 elsewhere, shape (*spatial), on the device of the mask; and the box around each.
    """
    array = mask.cpu().numpy()
    labels, count = ndimage.label(array, structure=np.ones((3,) * array.ndim))
    order = np.argsort(-np.bincount(labels.ravel(), minlength=count + 1)[1:], kind="stable")
    boxes = ndimage.find_objects(labels)
    rank = np.zeros(count + 1, dtype=np.int64)
    rank[order + 1] = np.arange(1, count + 1)
    return torch.from_numpy(rank[labels]).to(mask.device), [boxes[i] for i in order]


class _Lesions:
    """The lesions of one sample, the largest first; each is looked at in a box around it."""

    def __init__(
        self, values: Tensor, region: Tensor, body: Tensor, sizes: Sequence[float], tolerance_mm: float
    ) -> None:
        self.values, self.region, self.body = values[0], region[0], body[0]
        self.sizes, self.tolerance_mm = sizes, tolerance_mm
        self.labels, self.boxes = components(self.region)

    def voxels(self) -> list[Tensor]:
        """Return where the voxels of each lesion are, (voxels, axes)."""
        corners = [
            torch.tensor([axis.start for axis in box], device=self.labels.device) for box in self.boxes
        ]
        crops = [self.labels[box] == k for k, box in enumerate(self.boxes, 1)]
        return [crop.nonzero() + corner for crop, corner in zip(crops, corners, strict=True)]

    def masses(self) -> list[float]:
        """Return the share of the positive attribution in each lesion, NaN if there is none."""
        mass = self.values[self.body].clamp(min=0)
        sums = _sum_by(self.labels[self.body], mass, len(self.boxes) + 1)
        return [float(x) if 0 < mass.sum() < inf else nan for x in (sums / mass.sum())[1:]]

    def hits(self) -> list[Tensor]:
        """Return the share of the highest points that each lesion holds against what is close to none of them.

        NaN for a lesion outside of the body, and for all if nothing is left.
        """
        close = widened(self.region[None, None], self.tolerance_mm, [self.sizes])[0, 0]
        away = self.values[self.body & ~close]
        return [self._hit(k, box, away) for k, box in enumerate(self.boxes, 1)]

    def _hit(self, k: int, box: tuple[slice, ...], away: Tensor) -> Tensor:
        steps = (ceil(self.tolerance_mm / size) for size in self.sizes)
        around = tuple(slice(max(x.start - n, 0), x.stop + n) for x, n in zip(box, steps, strict=True))
        lesion, body = self.labels[around] == k, self.body[around]
        if not (lesion & body).any() or away.numel() == 0:
            return self.values.new_tensor(nan)
        own = self.values[around][_widened(lesion, self.tolerance_mm, self.sizes) & body]
        highest = torch.maximum(own.amax(), away.amax())
        hits, misses = (own == highest).sum(), (away == highest).sum()
        return hits.to(own.dtype) / (hits + misses)


def _prepared(
    maps: Tensor, region: Tensor, within: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Cause, ...]]:
    """Return map (0 where not looked at), region and body, each (N, voxels), and what makes scores undefined."""
    one = as_one_map(maps)
    r, v = as_mask(region, one).flatten(1), body_of(within, one).flatten(1)
    a = one.flatten(1)
    causes = (*_of_map(a, v), *_of_region(r, v))
    return a.masked_fill(~v, 0.0), r & v, v, causes


def _of_map(a: Tensor, v: Tensor) -> tuple[Cause, ...]:
    return (
        (a.isnan().all(1), NOT_EXPLAINED),
        (~v.any(1), EMPTY_BODY),
        (~(a.isfinite() | ~v).all(1), NOT_FINITE),
    )


def _of_region(r: Tensor, v: Tensor) -> tuple[Cause, ...]:
    return (
        (~r.any(1), EMPTY_REGION),
        (~(r & v).any(1), REGION_OUTSIDE),
        ((r | ~v).all(1), REGION_FILLS),
    )


def _pointed(maps: Tensor, region: Tensor, within: Tensor | None) -> tuple[Tensor, Tensor, tuple[Cause, ...]]:
    """Return map and body with their axes, and what makes the game undefined."""
    one = as_one_map(maps)
    body = body_of(within, one)
    a, _, v, causes = _prepared(one, region, within)
    highest = a.masked_fill(~v, -inf).amax(1)
    return one, body, (*causes, _flat(a, v), (highest <= 0, NOTHING_POSITIVE))


def _flat(a: Tensor, v: Tensor) -> Cause:
    """Return where a map has only one value within the body."""
    lowest, highest = a.masked_fill(~v, inf).amin(1), a.masked_fill(~v, -inf).amax(1)
    return lowest >= highest, CONSTANT


def _nothing(total: Tensor, part: Part) -> Cause:
    return total <= 0, _nothing_of(part)


def _nothing_of(part: Part) -> str:
    return {"positive": NOTHING_POSITIVE, "negative": "the map holds nothing negative"}.get(part, NOTHING)


def _reason_for(values: Tensor, total: float, part: Part) -> str:
    """Return why the attribution of one sample has no shares, "" if it has."""
    if values.numel() == 0:
        return EMPTY_BODY
    if not values.isfinite().all():
        return NOT_EXPLAINED if values.isnan().all() else NOT_FINITE
    return "" if total > 0 else _nothing_of(part)


def _magnitude(values: Tensor, part: Part) -> Tensor:
    if part not in _PARTS:
        raise InputError(f"part={part!r}: choose one of {', '.join(_PARTS)}.")
    return _PARTS[part](values)


def _flags(conditions: Iterable[bool]) -> Tensor:
    return torch.tensor(list(conditions), dtype=torch.bool)


def _structures(
    sample: int, values: Tensor, where: Tensor, titles: Sequence[str], part: Part
) -> Iterator[Structure]:
    """Yield what lies in each structure of one sample; the last one, all the rest, if it has voxels."""
    count = len(titles)
    voxels = where.bincount(minlength=count).tolist()
    totals, masses = (_sum_by(where, x, count) for x in (values, _magnitude(values, part)))
    whole = _reason_for(values, float(masses.sum()), part)
    columns = zip(titles, voxels, totals.tolist(), (masses / masses.sum()).tolist(), strict=True)
    for place, (title, n, total, share) in enumerate(columns):
        reason = whole or ("" if n else "the structure does not occur within the body")
        if n or place < count - 1:
            share = nan if reason else share
            yield Structure(sample, title, n, total, share, share * len(values) / n if n else nan, reason)


def _labels(atlas: Tensor, one: Tensor) -> Tensor:
    """Return the labels of an atlas as integers, shape (N, voxels)."""
    plain = real(atlas).to(one.device)
    if plain.shape[1:] != one.shape[1:] or plain.shape[0] not in (1, one.shape[0]):
        raise InputError(f"The atlas must have shape {tuple(one.shape)}, got {tuple(plain.shape)}.")
    if not plain.isfinite().all() or (plain < 0).any() or (plain != plain.round()).any():
        raise InputError("The atlas must hold labels: integers from 0.")
    return plain.long().expand(one.shape).flatten(1)


def _sum_by(places: Tensor, values: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add_(0, places, values)


def _by_detection(
    maps: Tensor, region: Tensor, within: Tensor | None, judge: Callable[[Tensor, Tensor], Tensor]
) -> Scores:
    """Judge each map as a detector by the counts of hits and of all voxels at each of its distinct values."""
    a, r, v, causes = _prepared(maps, region, within)
    values = [_judged(x[body], inside[body], judge) for x, inside, body in zip(a, r, v, strict=True)]
    return undefined_where(torch.stack(values), *causes)


def _judged(x: Tensor, inside: Tensor, judge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    if x.numel() == 0 or not inside.any() or inside.all():
        return x.new_full((), nan)
    ranked, order = x.sort(descending=True)
    last = torch.cat([ranked[1:] != ranked[:-1], ranked.new_ones(1, dtype=torch.bool)])
    hits = inside[order].cumsum(0)[last]
    marked = torch.arange(1, len(x) + 1, device=x.device)[last]
    return judge(hits.to(x.dtype), marked.to(x.dtype))


def _precision(hits: Tensor, marked: Tensor) -> Tensor:
    recall = hits / hits[-1]
    return (recall.diff(prepend=recall.new_zeros(1)) * hits / marked).sum()


def _concordance(hits: Tensor, marked: Tensor) -> Tensor:
    zero = hits.new_zeros(1)
    true, false = torch.cat([zero, hits / hits[-1]]), torch.cat([zero, marked - hits])
    return torch.trapezoid(true, false / false[-1])


def _sizes(maps: Tensor, tolerance_mm: float, spacing: Sequence[float] | None) -> list[tuple[float, ...]]:
    """Return the size of a voxel for each sample; without a tolerance it need not be known."""
    return spacing_of(maps, spacing) if tolerance_mm else [(1.0,) * (maps.ndim - 2)] * len(maps)


def _hit(values: Tensor, goal: Tensor, body: Tensor) -> Tensor:
    """Return the share of the highest points of one map that lie in the goal; NaN where it has none."""
    highest = (values == values.masked_fill(~body, -inf).amax()) & body
    return (highest & goal).sum().to(values.dtype) / highest.sum()
