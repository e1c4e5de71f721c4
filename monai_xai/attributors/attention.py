"""Attention rollout: where the tokens of a transformer get their content from, mapped back to voxels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from monai_xai.attributors.base import Attribution, Attributor, refuse_repeated_calls
from monai_xai.errors import InputError, UnsupportedNetworkError
from monai_xai.forward import Scoring
from monai_xai.networks import refuse_quantized
from monai_xai.operations import Operation, Watch, trace
from monai_xai.terms import Tensors, Term, pull_back


@dataclass(frozen=True)
class AttentionRollout(Attributor):
    """How much each patch of the image contributes to the tokens at the end, by the attention of all blocks.

    Args:
        is_weighted: whether each attention counts by the gradient of the score there (only where that is positive),
            which makes the map one of the target; plain rollout is the same for every target.

    For transformers whose tokens are all patches of the image (ViT, UNETR), with or without a class token. Attention
    within shifted windows (SwinUNETR) has no rollout and is refused. The map is one per patch, never negative.

    Reference: Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020 (arXiv:2005.00928); weighted:
    Chefer et al., "Generic Attention-model Explainability", ICCV 2021, equations 5 and 6 (arXiv:2103.15679).
    """

    is_weighted: bool = False

    linear: ClassVar[bool] = False
    by_hooks: ClassVar[bool] = True

    def attribute(self, scoring: Scoring) -> Attribution:
        refuse_repeated_calls(self, scoring)
        images = [(i, name) for i, (name, x) in enumerate(scoring.inputs.items()) if x.ndim > 2]
        if len(images) != 1:
            raise InputError(f"{self.name} needs one image among the inputs {list(scoring.inputs)}.")
        place, name = images[0]
        refuse_quantized(scoring.terms[0].network)
        scores: list[Tensor] = []
        total = torch.zeros_like(scoring.padding.pad(scoring.inputs[name][:, :1]))
        for term, (inputs,) in scoring.parts(self.name, scoring.values):
            score, tokens = self._roll(term, inputs)
            scores.append(score)
            patches = _patches(self.name, tokens, inputs[place])
            fine = functional.interpolate(patches, tuple(inputs[place].shape[2:]), mode="nearest")
            term.add([total], [fine.to(total) * term.blending()])
        return Attribution({name: scoring.padding.crop(total)}, scoring.sum_scores(scores))

    def _roll(self, term: Term, inputs: Tensors) -> tuple[Tensor, Tensor]:
        """Return the score, and how much every token contributes, shape (n, tokens)."""
        score, _ = trace(term, inputs, watch := _Attentions())
        if not watch.found:
            raise UnsupportedNetworkError(
                f"{self.name} needs a transformer, and this network has no attention."
            )
        maps: list[Tensor] = [attention.detach() for attention in watch.found]
        if self.is_weighted:
            gradients = pull_back(score, watch.found)
            maps = [(a * g).relu() for a, g in zip(maps, gradients, strict=True)]
        if len({attention.shape[-1] for attention in maps}) != 1 or maps[0].shape[0] != len(inputs[0]):
            raise UnsupportedNetworkError(
                f"{self.name} needs the same tokens in every block, got attention of shapes "
                f"{sorted({tuple(a.shape) for a in maps})} (windowed attention?). Use GradCam, LRP or DeepLift."
            )
        return score.detach(), self._multiply([attention.mean(1) for attention in maps])

    def _multiply(self, attentions: list[Tensor]) -> Tensor:
        identity = torch.eye(attentions[0].shape[-1]).to(attentions[0])
        flow = identity.expand_as(attentions[0])
        for attention in attentions:
            step = identity + attention
            if not self.is_weighted:
                step = step / step.sum(-1, keepdim=True)
            flow = step @ flow
        return flow


class _Attentions(Watch):
    """Notes every softmax over pairs of tokens, shape (n, heads, tokens, tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def handle(self, operation: Operation) -> Any:
        result = operation.run()
        if operation.name == "softmax" and result.ndim == 4 and result.shape[-1] == result.shape[-2]:
            self.found.append(result)
        return result


def _patches(method: str, flow: Tensor, image: Tensor) -> Tensor:
    """Return what every patch contributes, shape (n, 1, *grid of patches), to the class token or to all tokens."""
    spatial = tuple(image.shape[2:])
    for extra in (0, 1):
        size = (math.prod(spatial) / max(flow.shape[-1] - extra, 1)) ** (1 / len(spatial))
        grid = tuple(round(n / size) for n in spatial)
        if math.prod(grid) == flow.shape[-1] - extra:
            row = flow[:, 0, 1:] if extra else flow.mean(1)
            return row.reshape(len(flow), 1, *grid)
    raise UnsupportedNetworkError(
        f"{method}: {flow.shape[-1]} tokens are no grid of equal patches of an image {spatial}."
    )
