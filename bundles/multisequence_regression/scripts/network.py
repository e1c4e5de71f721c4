"""A small 3D network that reads one number off several sequences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class BiomarkerNet(nn.Module):
    """Convolutions, the mean over the image, two linear layers; the result is in the unit of the biomarker.

    Every module is used once, and ReLU is always a module, so that rules which go by modules (DeepLift, guided
    backpropagation, layer-wise relevance) hold. The image may have any size.

    Args:
        in_channels: how many sequences.
        channels: of the convolutions, each of which halves the image.
        hidden: width between the linear layers.
        center: a typical value of the biomarker, in its unit. What the last layer says is in multiples of `spread`
            around it. Both are stored with the weights.
        spread: a typical deviation from it.

    Shapes: image (N, in_channels, X, Y, Z); result (N, 1).

    Example:
        >>> BiomarkerNet(center=45.0, spread=15.0)(torch.zeros(2, 4, 40, 48, 40)).shape
        torch.Size([2, 1])
    """

    center: Tensor
    spread: Tensor

    def __init__(
        self,
        in_channels: int = 4,
        channels: Sequence[int] = (8, 16, 32, 64),
        hidden: int = 32,
        center: float = 0.0,
        spread: float = 1.0,
    ) -> None:
        super().__init__()
        widths = [in_channels, *channels]
        self.features = nn.Sequential(*(_block(*pair) for pair in pairwise(widths)))
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )
        self.register_buffer("center", torch.tensor(float(center)))
        self.register_buffer("spread", torch.tensor(float(spread)))

    def forward(self, image: Tensor) -> Tensor:
        return self.center + self.spread * self.head(self.features(image))


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.Conv3d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm3d(out_channels), nn.ReLU())
