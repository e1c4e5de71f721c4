"""Statistics: intervals, paired tests, corrections for many tests, agreement, and what chance gives a map.

The two null models of location answer different doubts. :func:`shift_null` holds the region at its place against the
same region at every other place where it fits: smoothness of the map is in both. :func:`swap_null` holds it against the
regions of other patients: where findings and maps usually lie is in both. Voxels shuffled at random would be neither:
on smooth maps a third of all p-values falls below 0.05 by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, false_discovery_control, mannwhitneyu, wilcoxon
from torch import Tensor

from monai_xai.errors import InputError
from monai_xai.grids import bounding_box

Numbers = NDArray[np.float64]

_MOST_ENUMERATED = 12
_NORMAL = 1.96  # standard errors in half of a 95 % interval
_TIE = 1e-9  # of the whole mass: what two sums by FFT may differ by and still be equal


class NullTest(NamedTuple):
    """A value, what chance gives instead, and how often chance gives as much.

    Args:
        value: what was measured; NaN where undefined.
        null: the same under the null, the measured one included; empty where undefined.
        p: share of the null that is at least the value; NaN where undefined.
        reason: why it is undefined, else "".
    """

    value: float
    null: Numbers
    p: float
    reason: str = ""


def interval(
    values: Numbers, seed: int = 0, error: float = 0.0, weights: Numbers | None = None
) -> tuple[float, float]:
    """Return the 95 % bias-corrected and accelerated bootstrap interval of a mean; NaN below 5 values.

    Args:
        values: one for each case.
        seed: seed of the bootstrap.
        error: standard error that all values share, by which the interval is widened (in quadrature).
        weights: of a weighted mean, one for each case, drawn with its value; None: all the same.

    Reference: Efron, "Better Bootstrap Confidence Intervals", JASA 1987.
    """
    if len(values) < 5:
        return float("nan"), float("nan")
    if np.ptp(values) < 1e-12 * max(float(np.abs(values).max()), 1e-300):
        return float(values[0]) - _NORMAL * error, float(values[0]) + _NORMAL * error
    drawn, statistic = ((values,), np.mean) if weights is None else ((values, weights), _weighted_mean)
    found = bootstrap(
        drawn, statistic, paired=weights is not None, n_resamples=2000, method="BCa",
        random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    mean, shared = float(statistic(*drawn)), _NORMAL * error
    return mean - float(np.hypot(mean - found.low, shared)), mean + float(np.hypot(found.high - mean, shared))


def _weighted_mean(values: Numbers, weights: Numbers, axis: int = -1) -> Numbers:
    return np.asarray((values * weights).sum(axis) / weights.sum(axis))


def sign_flip_test(values: Numbers, seed: int = 0, n_permutations: int = 9999) -> float:
    """Return the two-sided p-value of a mean of 0 by flipping signs: all of them up to 12 values, drawn above.

    Reference: Good, "Permutation, Parametric, and Bootstrap Tests of Hypotheses", 2005, section 3.2.
    """
    n, observed = len(values), abs(values.mean()) if len(values) else 0.0
    if n == 0 or not observed:
        return 1.0
    if n <= _MOST_ENUMERATED:
        signs = np.array(list(product((-1.0, 1.0), repeat=n)))
        return float((np.abs(signs @ values) / n >= observed * (1 - 1e-12)).mean())
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(n_permutations, n))
    larger = (np.abs(signs @ values) / n >= observed * (1 - 1e-12)).sum()
    return float((larger + 1) / (n_permutations + 1))


def signed_rank_test(differences: ArrayLike) -> float:
    """Return the one-sided p-value of paired differences that are no larger than 0; NaN differences are left out.

    Exact up to 50 differences without ties; 1 where all are 0; NaN where there is none.

    Reference: Wilcoxon, "Individual Comparisons by Ranking Methods", Biometrics Bulletin 1945.
    """
    values = _known(differences)
    if not len(values):
        return math.nan
    if not values.any():
        return 1.0
    return float(wilcoxon(values, alternative="greater").pvalue)


def rank_sum_test(larger: ArrayLike, smaller: ArrayLike) -> float:
    """Return the one-sided p-value of a first group that is no larger than a second; NaN below 2 values in one.

    Reference: Mann & Whitney, "On a Test of Whether one of Two Random Variables is Stochastically Larger than the
    Other", Annals of Mathematical Statistics 1947.
    """
    first, second = _known(larger), _known(smaller)
    if min(len(first), len(second)) < 2:
        return math.nan
    return float(mannwhitneyu(first, second, alternative="greater").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number.

    Reference: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 1979.
    """
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected so that the expected share of false ones among those kept stays below the level.

    NaN stays NaN and does not count.

    Reference: Benjamini & Hochberg, "Controlling the False Discovery Rate", JRSS B 1995.
    """
    given = np.asarray(p_values, dtype=np.float64)
    known, corrected = ~np.isnan(given), np.full(given.shape, np.nan)
    if known.any():
        corrected[known] = false_discovery_control(given[known])
    return [float(p) for p in corrected]


def icc21(ratings: ArrayLike) -> float:
    """Return ICC(2,1): agreement in absolute value of single ratings, raters drawn at random; at most 1.

    Bands of Koo & Li (J Chiropr Med 2016): below 0.5 poor, 0.75 moderate, 0.9 good, above excellent.

    Args:
        ratings: one row per subject, one column per rater (scan, seed, network), shape (n, k).

    Returns:
        NaN below 2 subjects or 2 raters, for ratings that are all equal, and for ratings with NaN.

    Raises:
        InputError: if ratings are no table.

    Reference: Shrout & Fleiss, "Intraclass correlations: uses in assessing rater reliability", Psychological Bulletin
    1979, table 1 and the formula of ICC(2,1).
    """
    table = np.asarray(ratings, dtype=np.float64)
    if table.ndim != 2:
        raise InputError(f"icc21 needs ratings of shape (subjects, raters), got {table.shape}.")
    n, k = table.shape
    if min(n, k) < 2 or np.isnan(table).any() or not np.ptp(table):
        return math.nan
    mean, subjects, raters = table.mean(), table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    between = k * float(((subjects - mean) ** 2).sum()) / (n - 1)
    judges = n * float(((raters - mean) ** 2).sum()) / (k - 1)
    rest = float(((table - subjects - raters + mean) ** 2).sum()) / ((n - 1) * (k - 1))
    below = between + (k - 1) * rest + k * (judges - rest) / n
    return (between - rest) / below if below else math.nan


def shift_null(
    values: Tensor,
    region: Tensor,
    within: Tensor | None = None,
    *,
    inside: float = 0.95,
    min_places: int = 100,
) -> NullTest:
    """Hold the share of a map inside a region against that at every other place where the region fits.

    The share is that of positive values within the body, as in the relevance mass. All whole shifts that leave enough
    of the region inside the body are taken, the region's own place included, by one cross-correlation.

    Args:
        values: the map, shape (*spatial), any real.
        region: shape (*spatial), bool or 0 and 1.
        within: the body, shape (*spatial); None: everywhere.
        inside: which share of the region must stay inside the body.
        min_places: below this many places there is no p-value.

    Returns:
        The share, the shares at all places, and the share of places that have as much. Undefined, with its reason, for
        an empty region, one that lies outside of the body or fills it, and for a map without anything positive.

    Raises:
        InputError: if shapes differ.
    """
    positive, region, body = _spatial(values, region, within)
    if reason := _undefined(positive, region, body):
        return _nothing(reason)
    total, size = float(positive.sum()), int(region.sum())
    own = int((region & body).sum()) / size
    if own < inside:
        return _nothing(f"only {own:.0%} of the region lie inside the body")
    kernel = region[bounding_box(region)]
    fits = _correlate(body.double(), kernel.double()).round() >= inside * size
    value = float(positive[region].sum()) / total
    shares = (_correlate(positive, kernel.double())[fits] / total).cpu().numpy()
    if len(shares) < min_places:
        return NullTest(
            value, shares, math.nan, f"the region fills the body: it fits in {len(shares)} places only"
        )
    return NullTest(value, shares, float((shares >= value - _TIE).mean()))


def swap_null(
    values: Tensor, region: Tensor, others: Sequence[Tensor], within: Tensor | None = None
) -> NullTest:
    """Hold the density of a map inside its own region against that inside the regions of other patients.

    The density is that of the relevance mass: the share of the positive map in the region over the share of the region
    in the body (the enrichment), so that large and small regions compare.

    Args:
        values: the map, shape (*spatial), any real.
        region: shape (*spatial), bool or 0 and 1.
        others: regions of other patients on the same grid, aligned; those outside of this body are left out.
        within: the body, shape (*spatial); None: everywhere.

    Returns:
        The density, the densities in all regions (the own one first), and the share of these that are as high.

    Raises:
        InputError: if shapes differ.
    """
    positive, region, body = _spatial(values, region, within)
    if reason := _undefined(positive, region, body):
        return _nothing(reason)
    found = region_densities(values, [region, *others], within)
    found = found[~np.isnan(found)]
    if len(found) < 2:
        return NullTest(float(found[0]), found, math.nan, "no region of another patient lies inside the body")
    return NullTest(float(found[0]), found, float((found >= found[0] * (1 - _TIE)).mean()))


def region_densities(values: Tensor, regions: Sequence[Tensor], within: Tensor | None = None) -> Numbers:
    """Return how dense the positive map is inside each region, 1 as in the whole body; NaN for those outside of it.

    Args:
        values: the map, shape (*spatial), any real.
        regions: shape (*spatial) each, bool or 0 and 1.
        within: the body, shape (*spatial); None: everywhere.

    Raises:
        InputError: if shapes differ.
    """
    found = []
    for region in regions:
        positive, mask, body = _spatial(values, region, within)
        level = float(positive[body].mean()) if body.any() else 0.0
        inside = mask & body
        found.append(float(positive[inside].mean()) / level if level and inside.any() else math.nan)
    return np.array(found)


def exchange_test(densities: ArrayLike, *, seed: int = 0, n_draws: int = 9999) -> tuple[Numbers, float]:
    """Hold the mean density of maps in their own regions against that after regions are exchanged between patients.

    A permutation test: each draw gives every case another region, none twice. Densities that are not defined do not
    count in the mean.

    Args:
        densities: of map i in region j, shape (n, m): region i is that of case i, those beyond n are of further
            patients.
        seed: of the draws.
        n_draws: how many.

    Returns:
        The means after exchange, and the p-value; NaN below two regions, or where no own density is defined.

    Raises:
        InputError: if there are fewer regions than cases.
    """
    table = np.asarray(densities, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] > table.shape[1]:
        raise InputError(
            f"exchange_test needs densities of shape (cases, at least as many regions), got {table.shape}."
        )
    n, m = table.shape
    own = table.diagonal()
    if n < 1 or m < 2 or np.isnan(own).all():
        return np.zeros(0), math.nan
    generator = np.random.default_rng(seed)
    chosen = np.stack([generator.permutation(m)[:n] for _ in range(n_draws)])
    drawn = table[np.arange(n), chosen]
    known = ~np.isnan(drawn)
    drawn, known = drawn[known.any(1)], known[known.any(1)]
    means = np.where(known, drawn, 0.0).sum(1) / known.sum(1)
    return means, float(((means >= np.nanmean(own) * (1 - _TIE)).sum() + 1) / (len(means) + 1))


def cohort_p(tests: Sequence[NullTest], *, seed: int = 0, n_draws: int = 9999) -> tuple[Numbers, float]:
    """Hold a mean over cases against means of one draw from the null of each: return these, and the p-value.

    Cases whose test is undefined are left out; NaN without any.
    """
    known = [test for test in tests if not test.reason]
    if not known:
        return np.zeros(0), math.nan
    generator = np.random.default_rng(seed)
    means = np.mean([generator.choice(test.null, size=n_draws) for test in known], axis=0)
    value = np.mean([test.value for test in known])
    return means, float(((means >= value * (1 - _TIE)).sum() + 1) / (n_draws + 1))


def _known(values: ArrayLike) -> Numbers:
    found = np.asarray(values, dtype=np.float64)
    return found[~np.isnan(found)]


def _nothing(reason: str) -> NullTest:
    return NullTest(math.nan, np.zeros(0), math.nan, reason)


def _spatial(values: Tensor, region: Tensor, within: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the positive map within the body, the region and the body, all of one shape."""
    values = torch.as_tensor(values).detach().double()
    body = torch.ones_like(values, dtype=torch.bool) if within is None else torch.as_tensor(within)
    region = torch.as_tensor(region)
    if not values.shape == region.shape == body.shape:
        raise InputError(
            f"Map, region and body must have one shape, got {tuple(values.shape)}, {tuple(region.shape)} and "
            f"{tuple(body.shape)}."
        )
    region, body = region.to(values.device) > 0, body.to(values.device) > 0
    return values.clamp(min=0) * body, region, body


def _undefined(positive: Tensor, region: Tensor, body: Tensor) -> str:
    """Say why there is no share of the map inside the region, or nothing."""
    causes = (
        (not body.any(), "the body is empty"),
        (not region.any(), "the region is empty"),
        (not (region & body).any(), "the region does not overlap the body"),
        (bool((region | ~body).all()), "the region fills the body"),
        (not torch.isfinite(positive).all(), "the map holds values that are not finite"),
        (not positive.any(), "the map holds nothing positive"),
    )
    return next((reason for holds, reason in causes if holds), "")


def _correlate(values: Tensor, kernel: Tensor) -> Tensor:
    """Return sums of values under a kernel at every place where the two meet at all, by FFT, without wrapping."""
    shape = [n + k - 1 for n, k in zip(values.shape, kernel.shape, strict=True)]
    # Lengths that an FFT likes; what lies beyond the wanted shape is zero.
    fast = [_fast_length(n) for n in shape]
    spectrum = torch.fft.rfftn(values, s=fast) * torch.fft.rfftn(
        kernel.flip(tuple(range(kernel.ndim))), s=fast
    )
    return torch.fft.irfftn(spectrum, s=fast)[tuple(slice(n) for n in shape)]


def _fast_length(n: int) -> int:
    """Return the next number that has no prime factor above 5."""
    while True:
        rest = n
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return n
        n += 1
