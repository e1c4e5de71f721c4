"""Cohorts: what modalities contribute over many cases, with intervals, tests, and a flag for those that collapse."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from monai_xai.errors import InputError
from monai_xai.files import as_csv, as_json, write_whole
from monai_xai.modalities import ModalityExplanation
from monai_xai.statistics import holm, interval, sign_flip_test


class CohortRow(NamedTuple):
    """One modality under one baseline, over all cases.

    Args:
        baseline: name of the baseline.
        modality: name of the modality.
        n: number of cases.
        mean: mean signed value, in units of the score.
        low: lower end of its 95 % interval: a bias-corrected and accelerated bootstrap over cases, widened by the
            error of drawn baselines, which all cases share; NaN below 5 cases.
        high: upper end.
        p: sign-flip permutation test of a mean of 0, Holm-corrected over the modalities of the baseline.
        along: mean value in the direction in which the score of each case moves; signed means cancel in a cohort of
            both directions.
        along_low: lower end of its 95 % interval.
        along_high: upper end.
        share: mean share of the sum of absolute values, over cases whose score changes; NaN if there is none.
        share_high: upper end of its 95 % interval.
        collapsed: whether the network hardly uses it: ``share_high`` is below the threshold.
    """

    baseline: str
    modality: str
    n: int
    mean: float
    low: float
    high: float
    p: float
    along: float
    along_low: float
    along_high: float
    share: float
    share_high: float
    collapsed: bool


class ModalityCohort:
    """The modality explanations of many cases.

    Args:
        collapse_below: a modality has collapsed if the upper end of the interval of its share is below this.
        seed: seed of the bootstrap and of permutations.
    """

    def __init__(self, collapse_below: float = 0.01, seed: int = 0) -> None:
        self.collapse_below = collapse_below
        self.seed = seed
        self.cases: dict[str, ModalityExplanation] = {}

    def add(self, case: str, explanation: ModalityExplanation) -> None:
        """Add a case, a batch of one; the last of two explanations of one case counts.

        Raises:
            InputError: if its modalities or baselines are others than those of the cases before.
        """
        first = next(iter(self.cases.values()), explanation)
        if (first.modalities, first.baselines) != (explanation.modalities, explanation.baselines):
            raise InputError(
                f"{case} has the modalities {explanation.modalities} under {explanation.baselines}, the cases before "
                f"have {first.modalities} under {first.baselines}."
            )
        self.cases[case] = explanation

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities."""
        return next(iter(self.cases.values())).modalities if self.cases else ()

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the baselines."""
        return next(iter(self.cases.values())).baselines if self.cases else ()

    def values(self, baseline: str) -> NDArray[np.float64]:
        """Return signed values, shape (cases, M)."""
        return np.array([e.values[baseline][0].tolist() for e in self.cases.values()])

    def errors(self, baseline: str) -> NDArray[np.float64]:
        """Return standard errors of the values from what was drawn, shape (cases, M)."""
        return np.array([e.standard_errors[baseline][0].tolist() for e in self.cases.values()])

    def shares(self, baseline: str) -> NDArray[np.float64]:
        """Return shares, shape (cases, M), NaN where the score of a case does not change."""
        return np.array([e.shares(baseline)[0].tolist() for e in self.cases.values()])

    def along(self, baseline: str) -> NDArray[np.float64]:
        """Return values in the direction in which the score of each case moves, shape (cases, M)."""
        values = self.values(baseline)
        return np.asarray(values * np.sign(values.sum(1, keepdims=True)))

    def synergies(self, baseline: str) -> NDArray[np.float64] | None:
        """Return interactions, above 0 for synergy, below for redundancy, shape (cases, M, M); None where sampled."""
        if any(e.interactions is None for e in self.cases.values()):
            return None
        return np.array([e.synergies(baseline)[0].tolist() for e in self.cases.values()])

    def interactions(self, baseline: str) -> NDArray[np.float64] | None:
        """Return mean interactions, shape (M, M); None where coalitions were sampled."""
        found = [
            e.interactions[baseline][0].tolist() for e in self.cases.values() if e.interactions is not None
        ]
        return np.mean(found, axis=0) if found else None

    def rows(self) -> list[CohortRow]:
        """Return one row per baseline and modality."""
        found = []
        for baseline in self.baselines:
            values, shares, along = self.values(baseline), self.shares(baseline), self.along(baseline)
            known = shares[np.isfinite(shares).all(1)]
            errors = self.errors(baseline).mean(0)  # all cases draw alike, so that it does not average out
            tests = holm([sign_flip_test(column, self.seed) for column in values.T])
            for m, modality in enumerate(self.modalities):
                low, high = interval(values[:, m], self.seed, errors[m])
                share = float(known[:, m].mean()) if len(known) else float("nan")
                share_high = interval(known[:, m], self.seed)[1] if len(known) else float("nan")
                collapsed = bool(share_high < self.collapse_below)
                found.append(
                    CohortRow(
                        baseline, modality, len(values), float(values[:, m].mean()), low, high, tests[m],
                        float(along[:, m].mean()), *interval(along[:, m], self.seed, errors[m]),
                        share, share_high, collapsed,
                    )
                )  # fmt: skip
        return found

    def pairs(self) -> list[dict[str, str | float]]:
        """Return one row per baseline and pair of modalities: their mean synergy with its 95 % interval."""
        found: list[dict[str, str | float]] = []
        for baseline in self.baselines:
            synergies = self.synergies(baseline)
            if synergies is None:
                continue
            for i, j in combinations(range(len(self.modalities)), 2):
                low, high = interval(synergies[:, i, j], self.seed)
                names = {"baseline": baseline, "modality": self.modalities[i], "with": self.modalities[j]}
                found.append({**names, "synergy": float(synergies[:, i, j].mean()), "low": low, "high": high})
        return found

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write every number of every case as ``modalities.csv``, and the summary with it as ``modalities.json``.

        Raises:
            OSError: if a file cannot be written; what was there before is left as it was.
        """
        cases = [row for case, explanation in self.cases.items() for row in explanation.rows(case)]
        Path(folder).mkdir(parents=True, exist_ok=True)
        table, document = Path(folder, "modalities.csv"), Path(folder, "modalities.json")
        write_whole(table, as_csv(cases))
        summary = [row._asdict() for row in self.rows()]
        write_whole(document, as_json({"cohort": summary, "pairs": self.pairs(), "cases": cases}))
        return table, document
