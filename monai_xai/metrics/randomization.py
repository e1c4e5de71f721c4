"""Randomization: does the map change when the network's weights, or what it learned, are destroyed?

A map that survives shows structure of the image and not what the network makes of it. Every parameter and buffer is
drawn anew, also those that no module's ``reset_parameters`` knows of (attention projections, position embeddings), and
the network is found bit for bit as it was afterwards.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from monai_xai.errors import InputError
from monai_xai.explainer import Explainer
from monai_xai.explanation import Explanation
from monai_xai.forward import with_progress
from monai_xai.metrics.base import Scores
from monai_xai.metrics.faithfulness import infidelity
from monai_xai.metrics.questions import (
    Explained,
    OpenQuestion,
    ask,
    asked_alone,
    explain_again,
    named_maps,
    try_again,
)
from monai_xai.metrics.robustness import average_sensitivity
from monai_xai.metrics.similarity import KINDS, SimilarityKind, mean_similarity
from monai_xai.networks import refuse_quantized, require_module
from monai_xai.targets import ClassScore, MarginScore, OutputScore, RegionScore, Target, pick_head
from monai_xai.tasks import Inputs, Label

Direction = Literal["top_down", "bottom_up"]
Measure = Callable[..., Scores]


# ------------------------------------------------------------------------------------------------ the weights


@contextmanager
def randomize(network: nn.Module, seed: int = 0, names: Sequence[str] | None = None) -> Iterator[list[str]]:
    """Inside this block the weights are random; afterwards they are bit for bit what they were, also on an exception.

    Every parameter and buffer of real (or complex) numbers is drawn from a normal distribution with mean zero and the
    root mean square of its own values, so that activations keep their order of magnitude. Vectors (norm weights,
    biases) keep mean and standard deviation instead. Values that are all positive (running variances, norm weights) are
    drawn from a log-normal distribution, so that they stay positive. Tensors of zeros get a standard deviation of 0.02.
    What a tensor becomes depends on seed and name only. Whole numbers (counters, index tables) and ``.grad`` stay.

    Args:
        network: the network; unwrapped from ``DistributedDataParallel`` and ``torch.compile``.
        seed: of the draws.
        names: dotted names of modules (with all below), parameters or buffers; None is all of them.

    Yields:
        The names of what was drawn anew.

    Raises:
        InputError: if a name is none of the network's.
        UnsupportedNetworkError: if the weights are quantized or were made under ``torch.inference_mode``.

    Reference: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018 (arXiv:1810.03292).

    Example:
        >>> import torch
        >>> network = torch.nn.Linear(2, 1)
        >>> before = network.weight.clone()
        >>> with randomize(network) as drawn:
        ...     drawn, bool((network.weight != before).all())
        (['weight', 'bias'], True)
        >>> bool((network.weight == before).all())
        True
    """
    network = require_module(network)
    refuse_quantized(network)
    tensors = tensors_of(network)
    chosen = _choose(tensors, network, names)
    with ExitStack() as stack:
        for name in chosen:
            stack.callback(_restore, tensors[name], tensors[name].detach().clone())
        for name in chosen:
            # .data, so that a backward pass that is still to come does not find its weights "modified in place".
            tensors[name].data.copy_(_redraw(tensors[name].detach(), name, seed, _is_buffer(network, name)))
        yield chosen


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer that holds real or complex numbers, by dotted name; shared ones once."""
    named = [*network.named_parameters(), *network.named_buffers()]
    return {name: tensor for name, tensor in named if tensor.is_floating_point() or tensor.is_complex()}


def _choose(tensors: Mapping[str, Tensor], network: nn.Module, names: Sequence[str] | None) -> list[str]:
    if names is None:
        return list(tensors)
    known = {name for name, _ in network.named_modules()} | set(tensors)
    known |= {name for name, _ in network.named_parameters(remove_duplicate=False)}
    if unknown := [name for name in names if name not in known]:
        raise InputError(
            f"randomize(names=...): {type(network).__name__} has no {', '.join(map(repr, unknown))}."
        )
    return [
        name for name in tensors if any(not own or name == own or name.startswith(f"{own}.") for own in names)
    ]


def _is_buffer(network: nn.Module, name: str) -> bool:
    owner, _, own = name.rpartition(".")
    return own in network.get_submodule(owner)._buffers


def _restore(tensor: Tensor, values: Tensor) -> None:
    tensor.data.copy_(values)


def _redraw(values: Tensor, name: str, seed: int, is_buffer: bool) -> Tensor:
    """Return random values in place of a tensor's own, from seed and name alone."""
    if values.numel() == 0:
        return values
    generator = torch.Generator().manual_seed((seed * 4_294_967_291 + zlib.crc32(name.encode())) % 2**63)
    kind = torch.complex128 if values.is_complex() else torch.float64
    noise = torch.randn(values.shape, generator=generator, dtype=kind).to(values.device)
    wide = values.to(kind)
    if not values.is_complex() and bool((wide > 0).all()) and (is_buffer or values.ndim < 2):
        logarithms = wide.log()
        spread = logarithms.std(correction=0).clamp(min=0.2)
        return (logarithms.mean() + spread * noise).exp().to(values.dtype)
    if not torch.isfinite(wide).all():
        return noise.to(values.dtype)
    mean = wide.mean() if values.ndim < 2 and values.numel() > 1 else torch.zeros((), dtype=kind)
    spread = (wide - mean.to(wide)).abs().square().mean().sqrt()
    return (mean.to(wide) + noise * (spread if spread > 0 else 0.02)).to(values.dtype)


# ------------------------------------------------------------------------------------------------- stages


def execution_order(network: nn.Module, call: Callable[[], Any]) -> list[tuple[str, list[str]]]:
    """Return the modules that own weights in the order in which a call reaches them, each with its tensors.

    Weights of a module that is not called itself (the projection inside of an attention) go with the module around it
    that is. A tensor that several modules share goes with the first.

    Args:
        network: whose modules.
        call: runs it.
    """
    order: list[str] = []
    names = {module: name for name, module in network.named_modules()}

    def reached(module: nn.Module, *_: Any) -> None:
        if names[module] not in order:
            order.append(names[module])

    handles = [
        module.register_forward_pre_hook(reached)
        for module in names
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    order = order or [""]
    owned: dict[str, list[str]] = {name: [] for name in order}
    for tensor in tensors_of(network):
        owner = tensor.rpartition(".")[0]
        while owner not in owned and owner:
            owner = owner.rpartition(".")[0]
        owned.setdefault(owner, []).append(tensor)
    return [(name, tensors) for name, tensors in owned.items() if tensors]


@dataclass(frozen=True, eq=False)
class Cascade:
    """How a map changes while stage after stage of the network is randomized.

    Args:
        stages: names of the stages, in the order in which they were randomized; a stage of several modules is named by
            its first and last.
        similarity: to the map of the network as it is, by kind, shape (N, S), the mean over seeds; NaN where undefined.
        spread: standard deviation over the seeds, likewise; NaN for one seed.
        score_change: how far the score moved, shape (N, S), the mean over seeds of absolute changes.
        measures: what was measured on the randomized network, by name, shape (N, S).
        reasons: why a value is undefined, by stage and sample number.
        direction: "top_down", "bottom_up" or "independent".
        seeds: of the draws.
    """

    stages: tuple[str, ...]
    similarity: Mapping[str, Tensor]
    spread: Mapping[str, Tensor]
    score_change: Tensor
    direction: str
    seeds: tuple[int, ...]
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    reasons: Mapping[tuple[str, int], str] = field(default_factory=dict)


def cascading_randomization(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    direction: Direction = "top_down",
    n_stages: int | None = 12,
    seeds: Sequence[int] = (0,),
    kinds: Sequence[SimilarityKind] = KINDS,
    measures: Mapping[str, Measure] | None = None,
) -> Cascade:
    """Randomize the network stage by stage, each time explain again, and compare the maps.

    The last stage is the network with all of its weights random. The explained class and region stay what they were.

    Args:
        explainer: explains.
        network: the network; afterwards bit for bit as it was.
        inputs: as for the explainer.
        label: as for the explainer.
        explanation: of these inputs; None explains.
        direction: "top_down" starts with the modules that are called last, "bottom_up" with those called first.
        n_stages: modules that are called one after the other are put together into so many stages; None makes a stage
            of each.
        seeds: one cascade for each.
        kinds: of similarity.
        measures: what else to measure on each randomized network, by name: functions such as
            :func:`~monai_xai.metrics.infidelity`, called as ``measure(explainer, network, inputs, explanation=...)``.

    Reference: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018 (arXiv:1810.03292). The curve is for the
    eye: task and order confound it (Yona & Greenfeld, arXiv:2110.14297; Binder et al., CVPR 2023).
    """
    if direction not in ("top_down", "bottom_up"):
        raise InputError(f"direction={direction!r}: choose 'top_down' or 'bottom_up'.")
    question = _Randomization(
        explainer, network, inputs, label, explanation, n_stages, direction == "top_down"
    )
    names = [list(chain.from_iterable(question.tensors[: i + 1])) for i in range(len(question.stages))]
    return question.run(names, direction, seeds, kinds, measures or {})


def independent_randomization(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    n_stages: int | None = 12,
    seeds: Sequence[int] = (0,),
    kinds: Sequence[SimilarityKind] = KINDS,
    measures: Mapping[str, Measure] | None = None,
) -> Cascade:
    """Randomize one stage at a time, all others as they were; see :func:`cascading_randomization`."""
    question = _Randomization(explainer, network, inputs, label, explanation, n_stages, False)
    return question.run(question.tensors, "independent", seeds, kinds, measures or {})


def full_randomization(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    kind: SimilarityKind = "pearson",
) -> Scores:
    """Return how alike the maps of the network and of one with random weights are, the mean over seeds.

    Arguments as for :func:`cascading_randomization`.
    """
    question = _Randomization(explainer, network, inputs, label, explanation, 1, False)
    found = question.run(question.tensors, "independent", seeds, [kind], {})
    reasons = tuple(found.reasons.get((found.stages[0], i), "") for i in range(len(found.similarity[kind])))
    return Scores(found.similarity[kind][:, 0], reasons)


def randomization_uncertainty(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    direction: Direction = "top_down",
    n_stages: int | None = 12,
    seeds: Sequence[int] = (0,),
) -> Cascade:
    """Return infidelity and average sensitivity of the method on each randomized network, both of the same target.

    What TorchEsegeta calls the uncertainty of a method, for the target that is explained (there the infidelity sums
    over all outputs), and beside it the similarity of the maps. Arguments as for :func:`cascading_randomization`.

    Reference: Chatterjee et al., "TorchEsegeta: Framework for Interpretability and Explainability of Image-based Deep
    Learning Models", Applied Sciences 2022 (arXiv:2110.08429).
    """
    return cascading_randomization(
        explainer,
        network,
        inputs,
        label=label,
        explanation=explanation,
        direction=direction,
        n_stages=n_stages,
        seeds=seeds,
        measures={"infidelity": infidelity, "sensitivity": average_sensitivity},
    )


class _Randomization:
    """One batch, explained by the network as it is, and the stages of the network."""

    def __init__(
        self,
        explainer: Explainer,
        network: nn.Module,
        inputs: Inputs,
        label: Label,
        explained: Explained | None,
        n_stages: int | None,
        last_first: bool,
    ) -> None:
        if n_stages is not None and n_stages < 1:
            raise InputError(f"n_stages={n_stages} must be at least 1, or None for one stage per module.")
        self.network, self.inputs, self.progress = network, inputs, explainer.progress
        with ask(explainer, network, inputs, label) as asked:
            self.explainer = asked_alone(explainer, asked.target, progress=False)
            modules = execution_order(require_module(network), lambda: _call_once(asked))
            names = asked.names
            self.score = asked.scoring.score()
        given = explain_again(self.explainer, network, inputs) if explained is None else explained
        self.maps = named_maps(given, names)
        if not modules:
            raise InputError(f"{type(network).__name__} has no weights to randomize.")
        modules = modules[::-1] if last_first else modules
        groups = _grouped(modules, n_stages)
        self.stages = tuple(_span([name or type(network).__name__ for name, _ in group]) for group in groups)
        self.tensors: list[list[str]] = [
            list(chain.from_iterable(tensors for _, tensors in group)) for group in groups
        ]

    def run(
        self,
        names: Sequence[Sequence[str]],
        direction: str,
        seeds: Sequence[int],
        kinds: Sequence[SimilarityKind],
        measures: Mapping[str, Measure],
    ) -> Cascade:
        if not seeds:
            raise InputError("Randomization needs at least one seed.")
        kept: dict[str, list[Tensor]] = {key: [] for key in (*kinds, *measures, "")}
        reasons: dict[tuple[str, int], str] = {}
        work = [(stage, own, seed) for stage, own in zip(self.stages, names, strict=True) for seed in seeds]
        for stage, own, seed in with_progress(work, "randomization", shown=self.progress):
            with randomize(self.network, seed, own):
                found = try_again(self.explainer, self.network, self.inputs)
                scores: dict[str, Scores] = {kind: self._compare(found, kind) for kind in kinds}
                scores |= {name: self._measure(found, measure) for name, measure in measures.items()}
            change = self._change(found)
            for key, value in {**scores, "": change}.items():
                kept[key].append(value.values)
                reasons |= {(stage, i): reason for i, reason in enumerate(value.reasons) if reason and key}
        shaped = {
            key: torch.stack(rows, 1).unflatten(1, (len(self.stages), len(seeds)))
            for key, rows in kept.items()
        }
        return Cascade(
            self.stages,
            {kind: shaped[kind].nanmean(2) for kind in kinds},
            {kind: _deviation(shaped[kind]) for kind in kinds},
            shaped[""].nanmean(2),
            direction,
            tuple(seeds),
            {name: shaped[name].nanmean(2) for name in measures},
            reasons,
        )

    def _compare(self, found: Explanation | str, kind: SimilarityKind) -> Scores:
        if isinstance(found, str):
            return self._undefined(found)
        return mean_similarity(self.maps, named_maps(found, tuple(self.maps)), kind)

    def _measure(self, found: Explanation | str, measure: Measure) -> Scores:
        if isinstance(found, str):
            return self._undefined(found)
        return measure(self.explainer, self.network, self.inputs, explanation=found)

    def _change(self, found: Explanation | str) -> Scores:
        if isinstance(found, str):
            return self._undefined(found)
        return Scores((found.score.double() - self.score.double()).abs().to(_first(self.maps).device))

    def _undefined(self, reason: str) -> Scores:
        first = _first(self.maps)
        return Scores(torch.full((len(first),), torch.nan, dtype=torch.float64), (reason,) * len(first))


def _first(maps: Mapping[str, Tensor]) -> Tensor:
    return next(iter(maps.values()))


def _deviation(values: Tensor) -> Tensor:
    """Return the standard deviation over the last axis; NaN for one value."""
    if values.shape[-1] == 1:
        return torch.full_like(values[..., 0], torch.nan)
    return values.std(-1)


def _call_once(asked: OpenQuestion) -> None:
    for term, (part,) in asked.scoring.parts("the order of the modules", asked.scoring.values):
        term(part)
        return


def _grouped(
    modules: Sequence[tuple[str, list[str]]], count: int | None
) -> list[Sequence[tuple[str, list[str]]]]:
    """Put neighbors together into at most ``count`` groups of about as many modules."""
    count = len(modules) if count is None else min(count, len(modules))
    ends = [len(modules) * (i + 1) // count for i in range(count)]
    return [modules[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


# ---------------------------------------------------------------------------- other classes, other networks


def random_logit(
    explainer: Explainer,
    network: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    kind: SimilarityKind = "pearson",
    seed: int = 0,
) -> Scores:
    """Return how alike the maps of the explained class and of another one, drawn at random, are; 1 is bad.

    A region stays where it is, a margin is turned round. For ``FunctionTarget`` and others whose classes are not known,
    and for networks with one output, the value is undefined.

    Args:
        explainer: explains.
        network: the network.
        inputs: as for the explainer.
        label: as for the explainer.
        explanation: of these inputs; None explains.
        kind: of similarity.
        seed: of the other class.

    Reference: Sixt et al., "When Explanations Lie: Why Many Modified BP Attributions Fail", ICML 2020
    (arXiv:1912.09818).
    """
    with ask(explainer, network, inputs, label) as asked:
        channels = _count_channels(asked)
        target = asked.target
        other = _other_class(target.target, target.selection, channels, seed)
        names = asked.names
    if isinstance(other, str):
        nothing = torch.full((len(asked.scoring.values[0]),), torch.nan, dtype=torch.float64)
        return Scores(nothing, (other,) * len(nothing))
    frozen = asked_alone(explainer, target)
    given = explain_again(frozen, network, inputs) if explanation is None else explanation
    changed = replace(target, target=other[0], selection=other[1])
    against = explain_again(asked_alone(explainer, changed), network, inputs)
    return mean_similarity(named_maps(given, names), named_maps(against, names), kind)


def _count_channels(asked: OpenQuestion) -> int:
    """Return how many channels (classes, outputs) the network gives."""
    seen: list[Any] = []
    for term, (part,) in asked.scoring.parts("the number of classes", asked.scoring.values):
        handle = term.network.register_forward_hook(lambda module, arguments, output: seen.append(output))
        try:
            term(part)
        finally:
            handle.remove()
        output = pick_head(seen[0], asked.target.head)
        return int(output.shape[1]) if output.ndim > 1 else 1
    raise InputError("No window meets the region: there is no score.")


def _other_class(
    target: Target, selection: tuple[Tensor, ...], channels: int, seed: int
) -> tuple[Target, tuple[Tensor, ...]] | str:
    """Return the target of another class and its selection, or why there is none."""
    if isinstance(target, MarginScore):
        return replace(target, channel=target.against, against=target.channel), selection
    if not isinstance(target, ClassScore | RegionScore | OutputScore):
        return f"the other classes of {type(target).__name__} are not known"
    if channels < 2:
        return "the network has one output: there is no other class"
    generator = torch.Generator().manual_seed(seed)
    step = 1 + int(torch.randint(channels - 1, (1,), generator=generator))
    if isinstance(target, ClassScore):
        return replace(target, class_index=None), ((selection[0] + step) % channels,)
    if isinstance(target, OutputScore):
        return replace(target, index=(target.index + step) % channels), selection
    return replace(target, channel=(target.channel + step) % channels), selection


def label_randomization(
    explainer: Explainer,
    network: nn.Module,
    permuted: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    kind: SimilarityKind = "pearson",
) -> Scores:
    """Return how alike the maps of a network and of one that was trained on permuted labels are; 1 is bad.

    Args:
        explainer: explains both, about the class and region that the first predicts.
        network: the network.
        permuted: of the same task, trained on labels that were exchanged at random.
        inputs: as for the explainer.
        label: as for the explainer.
        explanation: of the first network; None explains.
        kind: of similarity.

    Reference: Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, section 5 (arXiv:1810.03292).
    """
    return _compare_networks(explainer, network, permuted, inputs, label, explanation, kind)


def repeatability(
    explainer: Explainer,
    network: nn.Module,
    other: nn.Module,
    inputs: Inputs,
    *,
    label: Label = None,
    explanation: Explained | None = None,
    kind: SimilarityKind = "pearson",
) -> Scores:
    """Return how alike the maps of two networks that were trained independently (folds, seeds) are; 1 is best.

    Arguments as for :func:`label_randomization`.

    Reference: Arun et al., "Assessing the Trustworthiness of Saliency Maps for Localizing Abnormalities in Medical
    Imaging", Radiology: AI 2021 (doi:10.1148/ryai.2021200267).
    """
    return _compare_networks(explainer, network, other, inputs, label, explanation, kind)


def _compare_networks(
    explainer: Explainer,
    network: nn.Module,
    other: nn.Module,
    inputs: Inputs,
    label: Label,
    explained: Explained | None,
    kind: SimilarityKind,
) -> Scores:
    with ask(explainer, network, inputs, label) as asked:
        frozen, names = asked_alone(explainer, asked.target), asked.names
    given = explain_again(frozen, network, inputs) if explained is None else explained
    found = try_again(frozen, other, inputs)
    if isinstance(found, str):
        maps = _first(named_maps(given, names))
        return Scores(torch.full((len(maps),), torch.nan, dtype=torch.float64), (found,) * len(maps))
    return mean_similarity(named_maps(given, names), named_maps(found, names), kind)
