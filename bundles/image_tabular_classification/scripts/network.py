"""Two small networks, one for the radiograph and one for the record, whose features meet late."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class ImageTableNet(nn.Module):
    """An encoder for the image, another for the clinical vector, and a head with one hidden layer over both.

    The hidden layer can learn what neither says alone, and does so quickly because the features of both come to it on
    one scale, by batch norm: means over a whole image hardly differ from one patient to the next. Every module is used
    once, and ReLU is always a module, so that rules which go by modules (DeepLift, guided backpropagation, layer-wise
    relevance) hold. The image may have any size.

    Args:
        clinical_features: length of the vector.
        channels: of the convolutions, each of which halves the image.
        table_width: of both layers of the encoder of the vector.
        hidden: width of the hidden layer of the head.
        out_channels: how many classes.

    Shapes: image (N, 1, rows, columns); clinical (N, clinical_features); result (N, out_channels), logits.

    Example:
        >>> ImageTableNet(clinical_features=13)(torch.zeros(2, 1, 64, 64), torch.zeros(2, 13)).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        clinical_features: int,
        channels: Sequence[int] = (8, 16, 32, 32),
        table_width: int = 16,
        hidden: int = 32,
        out_channels: int = 2,
    ) -> None:
        super().__init__()
        widths = [1, *channels]
        blocks = [_block(*pair) for pair in pairwise(widths)]
        self.image_encoder = nn.Sequential(
            *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(channels[-1])
        )
        self.clinical_encoder = nn.Sequential(
            nn.Linear(clinical_features, table_width),
            nn.ReLU(),
            nn.Linear(table_width, table_width),
            nn.BatchNorm1d(table_width),
            nn.ReLU(),
        )
        self.head = nn.Sequential(
            nn.Linear(channels[-1] + table_width, hidden), nn.ReLU(), nn.Linear(hidden, out_channels)
        )

    def forward(self, image: Tensor, clinical: Tensor) -> Tensor:
        return self.head(torch.cat([self.image_encoder(image), self.clinical_encoder(clinical)], dim=1))


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())
