"""Small networks and inputs that several tests share."""

from __future__ import annotations

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn


def small_unet(dims: int = 2, *, channels: int = 2, act: str = "RELU", norm: str = "BATCH") -> UNet:
    """Return a float64 U-Net in evaluation mode, with batch statistics that are not the initial ones."""
    torch.manual_seed(0)
    network = UNet(dims, channels, 2, (4, 8), (2,), act=act, norm=norm).double()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(4, channels, *[16] * dims, dtype=torch.float64))
    return network.eval()


def random_image(*shape: int, seed: int = 0) -> Tensor:
    """Return float64 noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class LinearImage(nn.Module):
    """``score = <w, x>`` for images: every method has a closed form."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(random_image(1, *shape, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).flatten(1).sum(1, keepdim=True)


class ImageAndVector(nn.Module):
    """A segmentation network whose channels are scaled by a clinical vector."""

    def __init__(self, images: int = 1, features: int = 3) -> None:
        super().__init__()
        self.images = images
        self.body = small_unet(2, channels=images)
        self.scale = nn.Linear(features, 2).double()

    def forward(self, *inputs: Tensor) -> Tensor:
        image, vector = torch.cat(inputs[:-1], 1), inputs[-1]
        return self.body(image) * self.scale(vector).tanh()[:, :, None, None]


class Rows(nn.Module):
    """Counts the samples of every batch that goes through a network, outside of what is restored afterwards.

    Args:
        network: the network.
        batches: gets the number of samples of each call.
        traced: count only calls that make a graph.
    """

    def __init__(self, network: nn.Module, batches: list[int], *, traced: bool = False) -> None:
        super().__init__()
        self.network = network
        self.note = batches.append
        self.traced = traced

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad or not self.traced:
            self.note(len(x))
        return self.network(x)
