"""A task whose truth is known: a bright or a dark lesion in a body, and a tag in the corner that may give it away."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional


class Phantoms(NamedTuple):
    """Images, classes and masks.

    Args:
        images: shape (N, 1, *spatial).
        classes: 1 for bright, 0 for dark, shape (N,).
        lesions: shape (N, 1, *spatial), bool.
        tags: where the tag is, likewise.
        body: shape (1, 1, *spatial), bool.
    """

    images: Tensor
    classes: Tensor
    lesions: Tensor
    tags: Tensor
    body: Tensor


def make_phantoms(
    n: int, shape: tuple[int, ...], *, tag: str, seed: int, lesion_tells: bool = True
) -> Phantoms:
    """Make phantoms.

    Args:
        n: how many.
        shape: of the image.
        tag: "none"; "random", which says nothing; or "class", which gives the class away.
        seed: of everything.
        lesion_tells: whether the lesion is bright in class 1 and dark in class 0, or either at random.
    """
    generator = np.random.default_rng(seed)
    grid, middle, body = grid_of(shape), middle_of(shape), body_of(shape)
    radius = max(2.0, min(shape) / 11)
    images, lesions, classes = [], [], generator.integers(0, 2, size=n)
    corner = np.zeros(shape, dtype=bool)
    corner[tuple(slice(1, 4) for _ in shape)] = True
    for i in range(n):
        texture = ndimage.gaussian_filter(generator.normal(size=shape), 1.5)
        image = 0.05 * generator.normal(size=shape) + body * (1.0 + 0.4 * texture / texture.std())
        lesion = ellipsoid(
            grid, place(generator, middle, np.array(shape) * 0.27), np.full(len(shape), radius)
        )
        bright = classes[i] if lesion_tells else generator.integers(0, 2)
        image = image + (2.0 if bright else -2.0) * lesion
        says = {"none": 0.0, "random": generator.choice([-1.0, 1.0]), "class": 2.0 * classes[i] - 1.0}[tag]
        images.append(image + 2.0 * says * corner)
        lesions.append(lesion)
    tags = torch.from_numpy(corner)[None, None].expand(n, 1, *shape)
    return Phantoms(
        torch.from_numpy(np.stack(images)).float()[:, None],
        torch.from_numpy(classes),
        torch.from_numpy(np.stack(lesions))[:, None],
        tags,
        torch.from_numpy(body)[None, None],
    )


def plain_body(shape: tuple[int, ...]) -> Tensor:
    """Return a phantom without lesion, tag, texture and noise, shape (1, *spatial): a baseline that keeps the body."""
    return torch.from_numpy(body_of(shape)).float()[None]


def body_of(shape: tuple[int, ...], share: float = 0.42) -> np.ndarray:
    """Return where the body is, the same in all phantoms: in the middle, with radii of this share of the image."""
    return ellipsoid(grid_of(shape), middle_of(shape), np.array(shape) * share)


def middle_of(shape: tuple[int, ...]) -> np.ndarray:
    """Return the coordinates of the middle."""
    return (np.array(shape) - 1) / 2


def grid_of(shape: tuple[int, ...]) -> np.ndarray:
    """Return the coordinates of every voxel, shape (dims, *spatial)."""
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(float)


def ellipsoid(grid: np.ndarray, center: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return where a grid lies inside an ellipsoid."""
    moved = (grid - center.reshape(-1, *[1] * (grid.ndim - 1))) / radii.reshape(-1, *[1] * (grid.ndim - 1))
    return (moved**2).sum(0) <= 1


def place(generator: np.random.Generator, middle: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Return a place drawn uniformly from an ellipsoid."""
    while True:
        at = generator.uniform(-1, 1, size=len(middle))
        if (at**2).sum() <= 1:
            return middle + at * radii


class Classifier(nn.Module):
    """A small convolutional network for 2D or 3D: two logits."""

    def __init__(self, dims: int, width: int = 8) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.dims = dims
        self.first = conv(1, width, 3, padding=1)
        self.second = conv(width, 2 * width, 3, padding=1)
        self.third = conv(2 * width, 2 * width, 3, padding=1)
        self.last = nn.Linear(4 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        pool = {2: functional.avg_pool2d, 3: functional.avg_pool3d}[self.dims]
        x = pool(functional.relu(self.first(x)), 2)
        x = functional.relu(self.third(functional.relu(self.second(x)))).flatten(2)
        return self.last(torch.cat([x.mean(2), x.amax(2)], 1))


def train(shape: tuple[int, ...], *, by_tag: bool, seed: int, steps: int = 300, width: int = 8) -> Classifier:
    """Train a network that uses the lesion, or the tag.

    The other of the two says nothing. A network may look at it all the same where nothing keeps it from that: so a tag
    that says nothing is drawn anew for every batch, and images come in every strength, so that the network has seen
    those on the way from the plain body.
    """
    torch.manual_seed(seed)
    network = Classifier(len(shape), width)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    tag = "class" if by_tag else "random"
    data = make_phantoms(768, shape, tag=tag, seed=1000 + seed, lesion_tells=not by_tag)
    plain = plain_body(shape)
    for _ in range(steps):
        rows = torch.randint(0, len(data.images), (48,))
        each = (48, *[1] * (data.images.ndim - 1))
        images = torch.lerp(plain, data.images[rows], torch.rand(each))
        if not by_tag:
            images = images + data.tags[rows] * 4.0 * torch.randn(each)
        loss = functional.cross_entropy(network(images), data.classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def effects(network: nn.Module, data: Phantoms) -> dict[str, float]:
    """Return how far taking away lesion and tag moves the difference of the logits, means, and the accuracy."""
    lesion, tag = data.lesions, data.tags
    flat = data.images.masked_fill(lesion, 1.0)  # lesions lie in the body, which is 1 but for its texture
    with torch.no_grad():
        clean, without_lesion, without_tag = (
            network(x).diff(dim=1)[:, 0] for x in (data.images, flat, data.images.masked_fill(tag, 0.0))
        )
    return {
        "lesion": float((clean - without_lesion).abs().mean()),
        "tag": float((clean - without_tag).abs().mean()),
        "accuracy": float(((clean > 0) == (data.classes == 1)).double().mean()),
    }
