"""Stitched predictions: a network behind a sliding window as one function of whole inputs.

For targets that are not linear in the stitched prediction, see :mod:`monai_xai.windows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from monai_xai.forward import with_progress
from monai_xai.joined import JoinedGradients
from monai_xai.memory import GIB
from monai_xai.targets import pick_head
from monai_xai.terms import ScoreFunction, Tensors, Term, WholeTerm
from monai_xai.trials import Trial
from monai_xai.windows import (
    Place,
    Windows,
    WindowTerm,
    plan_windows,
    share_among_windows,
    window_output,
    window_terms,
)


class StitchedNetwork(nn.Module):
    """A network seen through a sliding-window inferer, as one differentiable function of whole inputs.

    Forward is the inferer's own call, without a graph. Backward recomputes window by window and pulls the cotangent
    back through ``a_w / A``, so that memory stays within one window's graph, or that of as many small ones as fill a
    fixed room.

    Args:
        network: sees windows of every image, and every vector whole.
        inferer: the sliding-window inferer.
        head: the part of the network's output that is stitched.
        progress: whether a long backward pass shows a bar.
        memory_gib: what a batch of windows in the backward pass may take, see :mod:`monai_xai.joined`.
    """

    def __init__(
        self,
        network: nn.Module,
        inferer: SlidingWindowInferer,
        head: str | int | None = None,
        *,
        progress: bool = False,
        memory_gib: float | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.inferer = inferer
        self.head = head
        self.progress = progress
        self._gradients = JoinedGradients(memory_gib)

    def forward(self, *inputs: Tensor) -> Tensor:
        return _Stitch.apply(self, *inputs)  # type: ignore[no-untyped-call]

    def predict(self, *inputs: Tensor) -> Tensor:
        """Return the stitched prediction, shape (N, C, *spatial), by the inferer's own call."""
        windows = plan_windows(self.inferer, inputs)
        if len(inputs) == 1:
            return self._infer(windows, inputs[0], inputs)
        rows = []
        for sample in range(inputs[0].shape[0]):
            row = [x[sample : sample + 1] for x in inputs]
            images = torch.cat([x for x in row if windows.is_image(x)], dim=1)
            rows.append(self._infer(windows, images, row))
        return torch.cat(rows)

    def _infer(self, windows: Windows, images: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """Call the inferer on concatenated images; the predictor splits them and adds vectors of the one sample."""
        channels = [x.shape[1] for x in inputs if windows.is_image(x)]

        def predict(window: Tensor) -> Tensor:
            parts = iter(window.split(channels, dim=1))
            row = (
                next(parts).clone() if windows.is_image(x) else x.expand(len(window), -1).to(window)
                for x in inputs
            )
            return window_output(self.network(*row), self.head, window.shape[2:])

        return pick_head(self.inferer(images, predict), None).to(images.device)

    def pull_back(
        self, cotangent: Tensor, inputs: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradient of ``sum(cotangent * output)`` with respect to the needed inputs."""
        windows = plan_windows(self.inferer, inputs)
        padded = [windows.pad(x.detach()) for x in inputs]
        totals = [torch.zeros_like(x) for x in padded]
        weights = share_among_windows(windows, cotangent)
        terms = window_terms(windows, _Contraction(self.network, self.head, len(inputs)), weights, inputs)
        shown = with_progress(terms, "windows", shown=self.progress)
        trials = (Trial(term, term, term.cut(padded)) for term in shown)
        for term, (_, gradients) in self._gradients(trials):
            term.add(totals, gradients)
        return [windows.unpad(total) if need else None for total, need in zip(totals, needed, strict=True)]


class _Stitch(torch.autograd.Function):
    """Stitch without a graph; recompute window by window in the backward pass."""

    @staticmethod
    def forward(ctx: Any, stitched: StitchedNetwork, *inputs: Tensor) -> Tensor:
        ctx.stitched = stitched
        ctx.save_for_backward(*inputs)
        return stitched.predict(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.stitched.pull_back(cotangent, ctx.saved_tensors, ctx.needs_input_grad[1:])


class _Contraction(nn.Module):
    """The network's window output, contracted with weights: ``(*inputs, weights)`` to (n,)."""

    def __init__(self, network: nn.Module, head: str | int | None, n_inputs: int) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.n_inputs = n_inputs

    def forward(self, *arguments: Tensor) -> Tensor:
        inputs, weights = arguments[: self.n_inputs], arguments[self.n_inputs]
        output = window_output(self.network(*inputs), self.head, weights.shape[2:])
        return (output * weights).flatten(1).sum(1)


@dataclass(frozen=True)
class StitchedTerm(WholeTerm):
    """The one term of a score that is not linear in the stitched prediction: the whole prediction is looked at.

    Args:
        function: around a :class:`StitchedNetwork`.
        selected: the further arguments of the function.
    """

    def near(self, inputs: Sequence[Tensor]) -> Term:
        assert isinstance(self.function, ScoreFunction) and isinstance(self.function.network, StitchedNetwork)
        return _NearTerm(self.function, self.selected, clean=_Stitching(self.function.network, inputs))


@dataclass(frozen=True)
class _NearTerm(StitchedTerm):
    """A :class:`StitchedTerm` at inputs near some clean ones: only windows that see a difference are computed.

    Args:
        function: around a :class:`StitchedNetwork`.
        selected: the further arguments of the function.
        clean: the clean prediction.
    """

    clean: _Stitching = field(kw_only=True)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        assert isinstance(self.function, ScoreFunction)
        with torch.no_grad(), self.clean.updated(inputs) as output:
            return self.function.target.score(output.clone(), *self.selected)


KEPT_GIB = 1.0
"""GiB of clean window outputs that are kept while a stitched prediction is updated; others are computed again."""


class _Stitching:
    """A stitched prediction that is updated in place where inputs differ from clean ones, and then restored.

    Args:
        stitched: the network.
        inputs: the clean inputs.
    """

    def __init__(self, stitched: StitchedNetwork, inputs: Sequence[Tensor]) -> None:
        self._stitched, self._inputs = stitched, inputs
        self._windows = plan_windows(stitched.inferer, inputs)
        self._clean = [self._windows.pad(x) for x in inputs]
        self._kept: dict[int, Tensor] = {}

    @cached_property
    def _output(self) -> Tensor:
        """The prediction, on the padded grid."""
        return self._windows.pad_with_zeros(self._stitched.predict(*self._inputs))

    @cached_property
    def _terms(self) -> list[WindowTerm]:
        outputs = _Output(self._stitched.network, self._stitched.head, self._windows.size)
        return window_terms(self._windows, outputs, torch.ones_like(self._output[:, :1]), self._inputs)

    @contextmanager
    def updated(self, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        """Give the prediction at other inputs, shape (N, C, *spatial), inside the block."""
        padded = [self._windows.pad(x) for x in inputs]
        before: list[tuple[Place, Tensor]] = []
        try:
            for number, term in enumerate(self._terms):
                part, clean = term.cut(padded), term.cut(self._clean)
                if all(map(torch.equal, part, clean)):
                    continue
                change = term.function(*(x.clone() for x in part)) - self._clean_output(number, clean)
                index = term.index(self._output)
                before.append((index, self._output[index].clone()))
                self._output[index] += change.to(self._output) * term.blending()
            yield self._windows.crop(self._output)
        finally:
            for index, values in reversed(before):
                self._output[index] = values

    def _clean_output(self, number: int, part: Tensors) -> Tensor:
        """Return what the network gives for a window of the clean inputs."""
        if number in self._kept:
            return self._kept[number]
        output: Tensor = self._terms[number].function(*(x.clone() for x in part))
        if (len(self._kept) + 1) * output.nbytes <= KEPT_GIB * GIB:
            self._kept[number] = output
        return output


class _Output(nn.Module):
    """The network's output on a window, on the grid of the window."""

    def __init__(self, network: nn.Module, head: str | int | None, size: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.size = size

    def forward(self, *inputs: Tensor) -> Tensor:
        return window_output(self.network(*inputs), self.head, self.size)
