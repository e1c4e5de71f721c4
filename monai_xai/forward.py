"""From a network and a target to scores: the functions that attributors attribute.

A :class:`Scoring` is the score of one frozen selection as a function of whole inputs. It is a sum of *terms*, each one
call of a function on a part of the inputs: one term for a network that sees whole inputs, one per active window for a
sliding-window prediction (:mod:`monai_xai.windows`). A method that works term by term works on both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from monai_xai.baselines import Baseline, draw_baselines
from monai_xai.calls import EmbeddedInput
from monai_xai.clock import Clock
from monai_xai.errors import AttributionError, XaiError
from monai_xai.joined import Asking, JoinedGradients, JoinedScores
from monai_xai.networks import refuse_quantized
from monai_xai.ranks import Crew
from monai_xai.terms import Tensors, Term
from monai_xai.trials import Trial

T = TypeVar("T")


class Padding:
    """How whole inputs become what terms are cut from: here, not at all."""

    def pad(self, x: Tensor) -> Tensor:
        """Return the padded input."""
        return x

    def unpad(self, total: Tensor) -> Tensor:
        """Return maps of the padded input as maps of the input: the adjoint of the linear part of :meth:`pad`."""
        return total

    def crop(self, x: Tensor) -> Tensor:
        """Return the part of a padded image that the image occupies."""
        return x


@dataclass(frozen=True)
class Scoring:
    """The score of a frozen selection as a function of whole inputs: a sum of terms.

    Args:
        inputs: plain tensors by name, in call order; shape (N, C, *spatial) or (N, F).
        terms: what is summed.
        padding: how whole inputs become what terms are cut from.
        repeats_calls: whether one term calls the network several times (an inferer inside), which methods that work
            by hooks cannot bear.
        progress: whether long work shows a bar.
        drawn: the baselines of these inputs that were drawn already, by identity: several targets share them.
        embedded: inputs that were whole numbers and are explained at the output of their embedding.
        memory_gib: what a batch of parts may take; None leaves it to :mod:`monai_xai.joined`.
        joined_scores: gives the scores of parts, in batches.
        joined_gradients: gives the gradients of parts, in batches.
        clock: how long a method that can end early may go on.
        crew: the processes that share all terms, of which these are this one's.
    """

    inputs: Mapping[str, Tensor]
    terms: Sequence[Term]
    padding: Padding = field(default_factory=Padding)
    repeats_calls: bool = False
    progress: bool = False
    drawn: dict[int, list[Tensors]] = field(default_factory=dict)
    embedded: Mapping[str, EmbeddedInput] = field(default_factory=dict)
    memory_gib: float | None = None
    joined_scores: JoinedScores = field(default_factory=JoinedScores)
    joined_gradients: JoinedGradients = field(default_factory=JoinedGradients)
    clock: Clock = field(default_factory=Clock)
    crew: Crew = field(default_factory=Crew)

    @property
    def values(self) -> Tensors:
        """The inputs in call order."""
        return tuple(self.inputs.values())

    def at(self, inputs: Sequence[Tensor]) -> Scoring:
        """Return the same score, to be explained at other inputs."""
        return replace(self, inputs=dict(zip(self.inputs, inputs, strict=True)), drawn={})

    def split(self, total: int) -> Iterator[Scoring]:
        """Iterate over the same score with equal parts of the time, one after another."""
        return (replace(self, clock=clock) for clock in self.clock.split(total))

    def draw(self, baseline: Baseline | Mapping[str, Baseline]) -> list[Tensors]:
        """Return the baselines of the inputs, one tuple in call order for each draw."""
        if id(baseline) not in self.drawn:
            sources = {
                name: self.embedded[name].numbers if name in self.embedded else x
                for name, x in self.inputs.items()
            }
            self.drawn[id(baseline)] = [self._embed(draw) for draw in draw_baselines(baseline, sources)]
        return self.drawn[id(baseline)]

    def _embed(self, draw: Tensors) -> Tensors:
        named = zip(self.inputs, draw, strict=True)
        return tuple(self.embedded[name].embed(x) if name in self.embedded else x for name, x in named)

    def track(self, work: Iterable[T], name: str, total: int | None = None) -> Iterator[T]:
        """Iterate with a progress bar that appears once the work has taken two seconds."""
        return iter(with_progress(work, name, total=total, shown=self.progress))

    def track_within(self, work: Iterable[T], name: str) -> Iterator[T]:
        """Iterate over the work of one term, with a progress bar if there is no other term to show progress by."""
        return self.track(work, name) if len(self.terms) == 1 else iter(work)

    def parts(self, name: str, *wholes: Sequence[Tensor]) -> Iterator[tuple[Term, tuple[Tensors, ...]]]:
        """Iterate over the terms with what each sees of some whole inputs.

        An error inside the loop body is not seen here; wrap the body with :meth:`guard`.
        """
        padded = [[self.padding.pad(x) for x in whole] for whole in wholes]
        for term in self.track(self.terms, name) if len(self.terms) > 1 else self.terms:
            yield term, tuple(term.cut(whole) for whole in padded)

    def score(self, inputs: Sequence[Tensor] | None = None) -> Tensor:
        """Return the scores at whole inputs (default: the inputs themselves), shape (N,)."""
        return self.sum_scores(self.term_scores(inputs))

    def term_scores(self, inputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the score of every term at whole inputs (default: the inputs themselves), each of shape (n,)."""
        trials = self._trials("score", self.values if inputs is None else inputs)
        return [score for _, score in self.joined_scores(trials)]

    def _trials(self, name: str, inputs: Sequence[Tensor]) -> Iterator[Trial[Term]]:
        return (Trial(term, term, part) for term, (part,) in self.parts(name, inputs))

    def sum_scores(self, scores: Iterable[Tensor]) -> Tensor:
        """Sum one score per term, each of shape (n,), to scores of shape (N,)."""
        first = self.values[0]
        total = torch.zeros(first.shape[0], dtype=first.dtype, device=first.device)
        for term, score in zip(self.terms, scores, strict=True):
            total[term.samples] += score.to(total)
        return total

    def gradient(self, inputs: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensors]:
        """Return scores (N,) and their gradient with respect to every whole input.

        The first gradient of a score warns of a network that cuts its own graph.
        """
        refuse_quantized(self.terms[0].network)
        totals, scores = self._zeros(), list[Tensor]()
        with self._guard("gradient"):
            trials = self._trials("gradient", self.values if inputs is None else inputs)
            for term, (score, gradients) in self.joined_gradients(trials):
                scores.append(score)
                term.add(totals, gradients)
        return self.sum_scores(scores), self._whole(totals)

    def propagate(
        self,
        name: str,
        attribute: Callable[..., tuple[Tensor, Sequence[Tensor]]],
        *wholes: Sequence[Tensor],
    ) -> tuple[Tensor, Tensors]:
        """Return scores (N,) and maps, summed over what ``attribute(term, *parts)`` gives of both."""
        scores: list[Tensor] = []

        def keep_score(term: Term, *parts: Tensors) -> Sequence[Tensor]:
            score, maps = attribute(term, *parts)
            scores.append(score)
            return maps

        maps = self.accumulate(name, keep_score, *wholes)
        return self.sum_scores(scores), maps

    def named(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return maps by the names of their inputs."""
        return dict(zip(self.inputs, maps, strict=True))

    def accumulate(
        self, name: str, attribute: Callable[..., Sequence[Tensor]], *wholes: Sequence[Tensor]
    ) -> Tensors:
        """Sum the maps that ``attribute(term, *parts)`` gives over all terms.

        Args:
            name: what the progress bar says.
            attribute: gets a term and what it sees of each of ``wholes``; returns one map per input.
            wholes: whole inputs, baselines, …, each in call order.

        Raises:
            AttributionError: naming the window and its shapes, if ``attribute`` fails.
            UnsupportedNetworkError: if the network is quantized, so that nothing comes back through it.
        """
        refuse_quantized(self.terms[0].network)
        totals = self._zeros()
        for number, (term, parts) in enumerate(self.parts(name, *wholes)):
            with guard(self._where(name, number, number), parts[0]):
                term.add(totals, attribute(term, *parts))
        return self._whole(totals)

    def accumulate_jointly(
        self, name: str, attribute: Callable[..., Asking[Tensors]], *wholes: Sequence[Tensor], held: int
    ) -> Tensors:
        """Sum the maps of all terms as :meth:`accumulate` does, by computations that share calls of the network.

        Args:
            name: what the progress bar says.
            attribute: gets a term and what it sees of each of ``wholes``; asks for gradients in turn, and returns one
                map per input.
            wholes: whole inputs, baselines, …, each in call order.
            held: how many maps of a term one computation may hold on to.
        """
        refuse_quantized(self.terms[0].network)
        totals = self._zeros()

        def work() -> Iterator[Asking[tuple[Term, Tensors]]]:
            for term, parts in self.parts(name, *wholes):
                yield keep_term(term, parts)

        def keep_term(term: Term, parts: Sequence[Tensors]) -> Asking[tuple[Term, Tensors]]:
            rounds, routine = self.track_within(itertools.count(), name), attribute(term, *parts)
            asked = next(routine)
            while True:
                next(rounds)
                try:
                    asked = routine.send((yield asked))
                except StopIteration as end:
                    return term, end.value

        size = sum(x.nbytes for x in self.terms[0].cut(totals))
        with self._guard(name):
            for term, maps in self.joined_gradients.side_by_side(work(), held * size):
                term.add(totals, maps)
        return self._whole(totals)

    def _where(self, name: str, first: int, last: int) -> str:
        """Return what goes on, and in which terms."""
        if len(self.terms) == 1:
            return name
        windows = f"window {first + 1}" if first == last else f"windows {first + 1} to {last + 1}"
        return f"{name}, {windows} of {len(self.terms)}"

    @contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        """Turn an error of the host, inside of calls for gradients, into one that says in which windows it came."""
        try:
            yield
        except Exception as error:
            trials = self.joined_gradients.at_work
            numbers = [n for n, term in enumerate(self.terms) if any(term is t.term for t in trials)]
            where = self._where(name, numbers[0], numbers[-1]) if numbers else name
            with guard(where, trials[0].part if trials else self.values):
                raise error

    def _zeros(self) -> list[Tensor]:
        """Return a map of zeros of every padded input."""
        return [torch.zeros_like(self.padding.pad(x)) for x in self.values]

    def _whole(self, totals: Sequence[Tensor]) -> Tensors:
        """Return maps of padded inputs as maps of the inputs."""
        return tuple(self.padding.unpad(total) for total in totals)


def with_progress(
    work: Iterable[T], name: str, *, total: int | None = None, shown: bool = True
) -> Iterable[T]:
    """Return work with a progress bar that appears in a terminal once it has taken two seconds."""
    bar: Iterable[T] = tqdm(
        work, desc=name, total=total, leave=False, delay=2.0, disable=None if shown else True
    )
    return bar


@contextmanager
def guard(where: str, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Turn an error of the host into one that says where it happened and what may help."""
    try:
        yield
    except XaiError:
        raise
    except torch.OutOfMemoryError as error:
        raise AttributionError(
            f"Out of memory in {where}, inputs {[tuple(x.shape) for x in inputs]}. Use smaller windows "
            "(SlidingWindowInferer(roi_size=...)), explain fewer samples at a time, or another device."
        ) from error
    except Exception as error:
        raise AttributionError(
            f"{where} failed on inputs {[tuple(x.shape) for x in inputs]}: {type(error).__name__}: {error}"
        ) from error
