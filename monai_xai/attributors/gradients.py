"""Methods around one gradient, and the averaging of any method over noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from monai_xai.attributors.base import Attribution, Attributor, BaselineAttributor, sum_over
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.errors import InputError
from monai_xai.forward import Scoring
from monai_xai.terms import Tensors


@dataclass(frozen=True)
class Saliency(Attributor):
    """The gradient of the score with respect to the input.

    Args:
        absolute: whether to return its absolute value, as the paper and Captum do; by default the sign is kept.

    Reference: Simonyan et al., "Deep Inside Convolutional Networks: Visualising Image Classification Models and
    Saliency Maps", ICLR workshop 2014 (arXiv:1312.6034).
    """

    absolute: bool = False

    by_window: ClassVar[bool] = True

    @property
    def spreads(self) -> bool:
        return not self.absolute  # the absolute value is that of the sum

    def attribute(self, scoring: Scoring) -> Attribution:
        score, gradients = scoring.gradient()
        maps = zip(scoring.inputs, gradients, strict=True)
        return Attribution({name: g.abs() if self.absolute else g for name, g in maps}, score)


@dataclass(frozen=True)
class InputXGradient(Attributor):
    """The input times the gradient: a contribution to the score as far as the network is linear.

    Reference: Shrikumar et al., "Not Just a Black Box: Learning Important Features Through Propagating Activation
    Differences", 2016 (arXiv:1605.01713).
    """

    summable: ClassVar[bool] = True
    by_window: ClassVar[bool] = True

    def attribute(self, scoring: Scoring) -> Attribution:
        score, gradients = scoring.gradient()
        maps = zip(scoring.inputs.items(), gradients, strict=True)
        return Attribution({name: x * g for (name, x), g in maps}, score)


@dataclass(frozen=True)
class GradientShap(BaselineAttributor):
    """Gradients at random points between baselines and the input, times the difference: a sampled expectation.

    Args:
        n_samples: how many points.
        baseline: what the input is held against; each point draws one of several (``Samples``).
        seed: seed of points, draws and noise.
        stdev_spread: noise on the input, as a share of each channel's range.

    The points are stratified (one in each of ``n_samples`` equal parts of the way), which keeps the expectation and
    lowers the variance. ``delta`` holds what the sampling left open; ``facts["error_of_sum"]`` is the standard error of
    the sum over all maps, the largest of a batch, from how far neighbors on the way differ: it says rather too much,
    since what the gradient changes from part to part counts as well.

    Reference: Lundberg & Lee, "A Unified Approach to Interpreting Model Predictions", NeurIPS 2017
    (arXiv:1705.07874); Erion et al. 2021 (doi:10.1038/s42256-021-00343-w), equation 4.
    """

    n_samples: int = 16
    baseline: BaselineLike = field(default_factory=Blur)
    seed: int = 0
    stdev_spread: float = 0.0

    complete: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True
    by_window: ClassVar[bool] = True
    cause_of_gap: ClassVar[str] = "raise n_samples"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_samples(self, self.n_samples)

    @property
    def ends_early(self) -> bool:
        return True

    def remedies(self) -> Iterator[Attributor]:
        yield replace(self, n_samples=4 * self.n_samples)
        yield from super().remedies()

    def attribute(self, scoring: Scoring) -> Attribution:
        generator = torch.Generator().manual_seed(self.seed)
        draws = self.draws(scoring)
        chosen = torch.randint(len(draws), (self.n_samples,), generator=generator).tolist()
        strata = torch.randperm(self.n_samples, generator=generator).tolist()
        totals = [torch.zeros_like(x) for x in scoring.values]
        planned = scoring.track(list(zip(chosen, strata, strict=True)), self.name)
        taken, sums = [], {}
        for choice, stratum in scoring.clock.limit(planned, least=1):
            taken.append(choice)
            inputs = noisy(scoring, self.stdev_spread, generator)
            alpha = (stratum + float(torch.rand((), generator=generator))) / self.n_samples
            points = [b + alpha * (x - b) for x, b in zip(inputs, draws[choice], strict=True)]
            _, gradients = scoring.gradient(points)
            parts = [(x - b) * g for x, b, g in zip(inputs, draws[choice], gradients, strict=True)]
            for total, part in zip(totals, parts, strict=True):
                total += part
            sums[stratum] = choice, sum_over(parts)
        scores = {choice: scoring.score(draws[choice]) for choice in sorted(set(taken))}
        baseline_score = torch.stack([scores[choice] for choice in taken]).mean(0)
        maps = scoring.named([total / len(taken) for total in totals])
        ordered = [scores[choice] + total for _, (choice, total) in sorted(sums.items())]
        facts = {"passes": len(taken), **_error_of_sum(ordered, is_whole=len(taken) == self.n_samples)}
        return Attribution(maps, scoring.score(), baseline_score, facts)


def _error_of_sum(sums: Sequence[Tensor], is_whole: bool) -> dict[str, float]:
    """Return the standard error of the mean of samples, each (N,), in their order on the way; nothing of a single one.

    Args:
        sums: the samples.
        is_whole: whether there is one from every part of the way: only then what differs between parts is no chance.
    """
    if len(sums) < 2:
        return {}
    samples = torch.stack(list(sums))
    variance = samples.diff(dim=0).square().mean(0) / 2 if is_whole else samples.var(0)
    return {"error_of_sum": float((variance / len(sums)).sqrt().max())}


@dataclass(frozen=True)
class NoiseTunnel(Attributor):
    """Any method, averaged over noise on the input: SmoothGrad, SmoothGrad², VarGrad.

    Args:
        attributor: the method.
        kind: "smoothgrad" (mean of maps), "smoothgrad_sq" (mean of their squares) or "vargrad" (their variance).
        n_samples: how many noisy copies.
        stdev_spread: standard deviation of the noise, as a share of each channel's range.
        seed: seed of the noise.

    The noise is drawn on the whole input, once per copy, before windows are cut.

    Reference: Smilkov et al., "SmoothGrad: removing noise by adding noise", 2017 (arXiv:1706.03825); Hooker et al.,
    "A Benchmark for Interpretability Methods in Deep Neural Networks", NeurIPS 2019 (SmoothGrad²); Adebayo et al.,
    "Sanity Checks for Saliency Maps", NeurIPS 2018 (VarGrad).
    """

    attributor: Attributor = field(default_factory=Saliency)
    kind: Literal["smoothgrad", "smoothgrad_sq", "vargrad"] = "smoothgrad"
    n_samples: int = 25
    stdev_spread: float = 0.15
    seed: int = 0

    linear: ClassVar[bool] = False
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_samples(self, self.n_samples)
        if not isinstance(self.attributor, Attributor):
            raise InputError(f"NoiseTunnel needs an attributor such as Saliency(), got {self.attributor!r}.")
        if self.kind not in ("smoothgrad", "smoothgrad_sq", "vargrad"):
            raise InputError(
                f"NoiseTunnel(kind={self.kind!r}): choose 'smoothgrad', 'smoothgrad_sq' or 'vargrad'."
            )

    @property
    def ends_early(self) -> bool:
        return True

    @property
    def name(self) -> str:
        """The method's name, with the one inside."""
        return f"NoiseTunnel({self.attributor.name}, {self.kind})"

    def attribute(self, scoring: Scoring) -> Attribution:
        means: dict[str, Tensor] = {}
        variances: dict[str, Tensor] = {}
        number = 0
        for number, maps in enumerate(self._noisy_maps(scoring), start=1):
            for name, values in maps.items():
                values = values.square() if self.kind == "smoothgrad_sq" else values
                mean = means.setdefault(name, torch.zeros_like(values))
                change = values - mean
                mean += change / number
                if self.kind == "vargrad":  # Welford's update, which does not cancel
                    variance = variances.setdefault(name, torch.zeros_like(values))
                    variance += change * (values - mean)
        variances = {name: total / number for name, total in variances.items()}
        return Attribution(
            variances if self.kind == "vargrad" else means, scoring.score(), facts={"samples": number}
        )

    def _noisy_maps(self, scoring: Scoring) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        samples = scoring.track(scoring.split(self.n_samples), self.name, self.n_samples)
        for part in scoring.clock.limit(samples, least=2):
            copy = part.at(noisy(scoring, self.stdev_spread, generator))
            yield dict(self.attributor.attribute(copy).maps)


def noisy(scoring: Scoring, stdev_spread: float, generator: torch.Generator) -> Tensors:
    """Return the inputs with Gaussian noise, its standard deviation a share of each channel's range.

    All samples of a batch get the same noise, so that a sample does not depend on its neighbors.
    """
    return (
        tuple(_add_noise(x, stdev_spread, generator) for x in scoring.values)
        if stdev_spread
        else scoring.values
    )


def _add_noise(x: Tensor, stdev_spread: float, generator: torch.Generator) -> Tensor:
    axes = tuple(range(2, x.ndim)) or (1,)
    noise = torch.randn(x.shape[1:], generator=generator, dtype=x.dtype).to(x.device)
    return x + stdev_spread * (x.amax(axes, keepdim=True) - x.amin(axes, keepdim=True)) * noise


def _require_samples(attributor: Attributor, n_samples: int) -> None:
    if n_samples < 1:
        raise InputError(f"{type(attributor).__name__}(n_samples={n_samples}) needs at least one sample.")
