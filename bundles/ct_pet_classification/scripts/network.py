"""Two small 3D networks, one per scan, whose features meet late."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

MOMENTUM = 0.3  # of the batch norms: few iterations have to suffice for their statistics


class LateFusionNet(nn.Module):
    """An encoder for the CT, another for the PET, and a head with one hidden layer over the features of both.

    The hidden layer can learn what neither scan says alone. Every module is used once, and ReLU is always a module,
    so that rules which go by modules (DeepLift, guided backpropagation, layer-wise relevance) hold. The scans may
    have any size, and need not have the same.

    Args:
        channels: of the convolutions of each encoder, each of which halves the scan.
        hidden: width of the hidden layer.
        out_channels: how many classes.

    Shapes: ct (N, 1, X, Y, Z); pet (N, 1, X', Y', Z'); result (N, out_channels), logits.

    Example:
        >>> LateFusionNet().eval()(torch.zeros(2, 1, 36, 30, 30), torch.zeros(2, 1, 28, 22, 22)).shape
        torch.Size([2, 2])
    """

    def __init__(
        self, channels: Sequence[int] = (8, 16, 32), hidden: int = 32, out_channels: int = 2
    ) -> None:
        super().__init__()
        self.ct_encoder = _encoder(channels)
        self.pet_encoder = _encoder(channels)
        self.head = nn.Sequential(
            nn.Linear(2 * channels[-1], hidden), nn.ReLU(), nn.Linear(hidden, out_channels)
        )

    def forward(self, ct: Tensor, pet: Tensor) -> Tensor:
        return self.head(torch.cat([self.ct_encoder(ct), self.pet_encoder(pet)], dim=1))


def _encoder(channels: Sequence[int]) -> nn.Sequential:
    widths = [1, *channels]
    blocks = [_block(*pair) for pair in pairwise(widths)]
    # A lesion moves the mean over a whole scan but a little: the last norm makes as much of it as of all else.
    pooled = [nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.BatchNorm1d(widths[-1], momentum=MOMENTUM)]
    return nn.Sequential(*blocks, *pooled)


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.Conv3d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm3d(out_channels, momentum=MOMENTUM), nn.ReLU())
