"""Methods that change the rules of backpropagation by hooks, computed by Captum, term by term."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import captum.attr
import torch
from torch import Tensor

from monai_xai.attributors.base import (
    Attribution,
    Attributor,
    BaselineAttributor,
    average,
    refuse_repeated_calls,
)
from monai_xai.baselines import BaselineLike, Blur
from monai_xai.errors import UnsupportedNetworkError
from monai_xai.forward import Scoring, Tensors, Term
from monai_xai.networks import require_relu, require_rescale_rules


@dataclass(frozen=True)
class DeepLift(BaselineAttributor):
    """Differences of activations between input and baseline, passed back by the rescale rule.

    Args:
        baseline: what the input is held against; attributions are averaged over several (``Samples``), which is
            Captum's ``DeepLiftShap``.

    Networks with modules for which Captum has no rule (PReLU, instance norm, GELU, …) are refused. What other
    operations leave open (functional activations, products, pooling beside a skip) shows in ``delta``.

    Reference: Shrikumar et al., "Learning Important Features Through Propagating Activation Differences", ICML 2017
    (arXiv:1704.02685), rescale rule.
    """

    baseline: BaselineLike = field(default_factory=Blur)

    complete: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    by_hooks: ClassVar[bool] = True
    cause_of_gap: ClassVar[str] = (
        "the network has operations that DeepLift treats as linear (functional activations, products, max-pooling "
        "beside a skip); use IntegratedGradients()"
    )

    def attribute(self, scoring: Scoring) -> Attribution:
        refuse_repeated_calls(self, scoring)
        require_rescale_rules(scoring.terms[0].network, self.name)
        return average([self._propagate(scoring, baseline) for baseline in self.draws(scoring)])

    def _propagate(self, scoring: Scoring, baseline: Tensors) -> Attribution:
        def attribute(term: Term, inputs: Tensors, start: Tensors) -> Tensors:
            method, starts = captum.attr.DeepLift(term.function), _contiguous(start)
            with _reuse_named(self.name):
                return _call(method, inputs, baselines=starts, additional_forward_args=term.selection())

        maps = scoring.accumulate(self.name, attribute, scoring.values, baseline)
        return Attribution(
            dict(zip(scoring.inputs, maps, strict=True)), scoring.score(), scoring.score(baseline)
        )


@dataclass(frozen=True)
class GuidedBackprop(Attributor):
    """The gradient, in which every ReLU lets only positive gradients pass.

    Networks whose activations are not ReLU modules are refused: there it would silently be the plain gradient.

    Reference: Springenberg et al., "Striving for Simplicity: The All Convolutional Net", ICLR workshop 2015
    (arXiv:1412.6806).
    """

    by_hooks: ClassVar[bool] = True

    def attribute(self, scoring: Scoring) -> Attribution:
        refuse_repeated_calls(self, scoring)
        term, (part,) = next(scoring.parts(self.name, scoring.values))
        require_relu(term.network, self.name, lambda: term(part))

        def attribute(term: Term, inputs: Tensors) -> Tensors:
            method = captum.attr.GuidedBackprop(term.function)
            return _call(method, inputs, additional_forward_args=term.selection())

        maps = scoring.accumulate(self.name, attribute, scoring.values)
        return Attribution(dict(zip(scoring.inputs, maps, strict=True)), scoring.score())


@contextmanager
def _reuse_named(method: str) -> Iterator[None]:
    """Say what helps where Captum finds that an activation module is called more than once."""
    try:
        yield
    except RuntimeError as error:
        if "used more than once" not in str(error):
            raise
        raise UnsupportedNetworkError(
            f"{method} needs every activation module to be called once for a prediction, and this network calls one "
            f"again (as MONAI's ResNet, SegResNet and DynUNet do): {error} Use IntegratedGradients()."
        ) from error


def _call(method: captum.attr.GradientAttribution, inputs: Tensors, **options: Tensors) -> Tensors:
    """Call Captum without its notices that it sets hooks and gradients, which are taken off again here."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(Setting forward, backward hooks|Setting backward hooks|required_grads).*"
        )
        maps: tuple[Tensor, ...] = method.attribute(
            tuple(x.detach().clone(memory_format=torch.contiguous_format) for x in inputs), **options
        )
    return tuple(values.detach() for values in maps)


def _contiguous(tensors: Tensors) -> Tensors:
    return tuple(x.contiguous() for x in tensors)
