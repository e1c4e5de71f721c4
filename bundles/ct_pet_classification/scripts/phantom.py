"""Thorax phantoms with one lung lesion in CT and PET, whose label can be read from planted cues and nothing else.

A phantom answers what no real scan can: which scan, and which voxels, *should* an explanation point at? In the CT the
lesion is solid and spiculated or a smooth haze; in the PET it is hot or cold. These two *cues* are drawn independently
of each other. What `plant` names decides which of them the label follows; the other is a distractor that looks the
same and says nothing. Place and size of the lesion, the shape of the body, the uptake of the heart, and noise know
nothing of the label. Two sets of phantoms that differ in `plant` alone are equal, bit for bit, in all that the plant
does not touch: "ct", "pet" and "xor" share every voxel, and differ in their labels only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from .anatomy import TISSUE, Grid, Thorax, Volume, ellipsoid, share

logger = logging.getLogger(__name__)

EVIDENCE: Mapping[str, tuple[str, ...]] = {  # by plant, the inputs whose voxels tell the label
    "pet": ("pet",),
    "ct": ("image",),
    "redundant": ("image", "pet"),
    "xor": ("image", "pet"),
    "shortcut": ("image",),
}
DATALIST_FILE = "datalist.json"
TRUTH_FILE = "truth.json"
CT_SHAPE, CT_SPACING_MM = (36, 30, 30), (3.9, 3.9, 4.1)
PET_SHAPE, PET_SPACING_MM = (32, 26, 28), (5.6, 5.6, 5.3)
BLOCK = 8  # cases in which every combination of the two cues and a marker occurs once
HELD_OUT_EVERY = 4  # the first of so many blocks is held out
__version__ = 2  # of the voxels: raise it whenever a change to this file or to anatomy.py changes them


@dataclass(frozen=True)
class Phantom:
    """Everything that the voxels and labels of a set of phantoms depend on.

    Args:
        plant: what makes a lesion malignant. `pet`: it is hot. `ct`: it is solid and spiculated. `redundant`: it is
            both; the scans always agree. `xor`: one of the two but not both, so that a single scan says nothing.
            `shortcut`: a metal tag lies outside of the body in the CT, the lesion itself says nothing.
        n_cases: how many cases, a multiple of 8; they are named phantom001, phantom002, and so on.
        seed: of all random streams.

    Raises:
        ValueError: if the plant is unknown, or if the number of cases does not allow balanced labels and a split.

    Example:
        >>> Phantom(plant="redundant").evidence
        ('image', 'pet')
    """

    plant: str = "pet"
    n_cases: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.plant not in EVIDENCE:
            raise ValueError(f"plant={self.plant!r} must be one of {', '.join(EVIDENCE)}.")
        if self.n_cases < 2 * BLOCK or self.n_cases % BLOCK:
            raise ValueError(
                f"n_cases={self.n_cases} must be a multiple of {BLOCK}, and at least {2 * BLOCK}, so that labels are "
                "balanced in training and in testing."
            )

    @property
    def evidence(self) -> tuple[str, ...]:
        """The inputs whose voxels tell the label: `image` is the CT, `pet` the PET."""
        return EVIDENCE[self.plant]

    @property
    def name(self) -> str:
        """Name of the folder that holds these phantoms; it differs whenever their voxels do."""
        facts = [__version__, CT_SHAPE, CT_SPACING_MM, PET_SHAPE, PET_SPACING_MM, asdict(self)]
        return f"{self.plant}_{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:6]}"


@dataclass(frozen=True)
class Cues:
    """What can be seen in one case.

    Args:
        is_solid: whether the lesion is solid and spiculated in the CT.
        is_hot: whether it takes up much tracer in the PET.
        has_tag: whether a metal tag lies beside the body in the CT.
    """

    is_solid: bool
    is_hot: bool
    has_tag: bool


@dataclass(frozen=True)
class Case:
    """One phantom and the truth about it.

    Args:
        ct: int16 on the CT grid, in HU.
        pet: float32 on the PET grid, in SUV.
        lesion_ct: bool on the CT grid, the lesion.
        lesion_pet: bool on the PET grid, the lesion.
        tag_ct: bool on the CT grid, the metal tag; all False without one.
        ct_affine: (4, 4), voxels of the CT to millimeters (RAS).
        pet_affine: (4, 4), the same for the PET.
        label: 0 is benign, 1 is malignant.
        truth: what was planted where, as written to truth.json.
    """

    ct: NDArray[np.int16]
    pet: NDArray[np.float32]
    lesion_ct: NDArray[np.bool_]
    lesion_pet: NDArray[np.bool_]
    tag_ct: NDArray[np.bool_]
    ct_affine: NDArray[np.float64]
    pet_affine: NDArray[np.float64]
    label: int
    truth: Mapping[str, object]


def write_phantom(root: str | os.PathLike[str], phantom: Phantom) -> str:
    """Write the phantoms, their datalist and the truth, unless they are on disk already, and return their folder.

    Args:
        root: holds one folder for every setting, so that phantoms of several settings live side by side.
        phantom: what to write.
    """
    folder = Path(root).expanduser() / phantom.name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write(scratch, phantom)
            scratch.rename(folder)  # whole or not at all
        except OSError:
            if not folder.is_dir():  # otherwise another run has been faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        logger.info("wrote %d phantoms to %s", phantom.n_cases, folder)
    return str(folder)


def make_case(phantom: Phantom, number: int) -> Case:
    """Make the case with this number, counted from 1."""

    def draw(word: str) -> np.random.Generator:
        return np.random.default_rng([phantom.seed, number, zlib.crc32(word.encode())])

    cues = _cues(phantom, number)
    thorax = Thorax(draw("body"))
    lesion = _Lesion.draw(thorax, draw("lesion"))
    ct_grid, pet_grid = _ct_grid(draw("ct grid")), _pet_grid(draw("pet grid"))
    tag = _tag(ct_grid) * cues.has_tag
    label = _label(phantom.plant, cues)
    return Case(
        ct=_scan_ct(ct_grid, thorax, lesion, tag, is_solid=cues.is_solid, rng=draw("ct")),
        pet=_scan_pet(pet_grid, thorax, lesion, is_hot=cues.is_hot, rng=draw("pet")),
        lesion_ct=lesion.depth(ct_grid.points) > 0,
        lesion_pet=lesion.depth(pet_grid.points) > 0,
        tag_ct=tag > 0.5,
        ct_affine=ct_grid.affine,
        pet_affine=pet_grid.affine,
        label=label,
        truth={
            "label": label,
            **asdict(cues),
            "center_mm": [round(float(value), 1) for value in lesion.center],
            "radius_mm": round(lesion.radius_mm, 1),
        },
    )


def _cues(phantom: Phantom, number: int) -> Cues:
    """In every block of cases each combination occurs once, in random order."""
    block, place = divmod(number - 1, BLOCK)
    order = np.random.default_rng([phantom.seed, block, zlib.crc32(b"cues")]).permutation(BLOCK)
    solid, hot, tag = (bool(order[place] >> bit & 1) for bit in range(3))
    is_agreed = phantom.plant == "redundant"
    return Cues(solid, solid if is_agreed else hot, tag and phantom.plant == "shortcut")


def _label(plant: str, cues: Cues) -> int:
    follows = {"pet": cues.is_hot, "ct": cues.is_solid, "redundant": cues.is_solid, "shortcut": cues.has_tag}
    return int(follows.get(plant, cues.is_solid != cues.is_hot))


@dataclass(frozen=True)
class _Lesion:
    center: NDArray[np.float64]
    radius_mm: float
    spikes: NDArray[np.float64]  # (n, 3), unit vectors

    @classmethod
    def draw(cls, thorax: Thorax, rng: np.random.Generator) -> _Lesion:
        """A lesion somewhere in a lung, with room around it."""
        radius = float(rng.uniform(11.0, 14.0))
        candidates = rng.uniform([-55, -40, -36], [55, 40, 42], size=(2000, 3))
        depth = thorax.lungs(thorax.straighten(candidates.T))
        center = candidates[depth > np.quantile(depth, 0.8)][0]
        spikes = rng.standard_normal((14, 3))
        return cls(center, radius, spikes / np.linalg.norm(spikes, axis=1, keepdims=True))

    def depth(self, points: Volume) -> Volume:
        """Depth below the surface of the round lesion."""
        return ellipsoid(points, tuple(self.center), (self.radius_mm,) * 3)

    def spicules(self, points: Volume) -> Volume:
        """Depth below the surface of the strands that reach out from it, up to twice its radius."""
        offset = points - self.center[:, None, None, None]
        along = np.einsum("na,axyz->nxyz", self.spikes, offset)
        away = np.sqrt(np.clip((offset**2).sum(0) - along**2, 0, None))
        strand = np.where(along > 0, 3.0 * (1 - along / (2 * self.radius_mm)) - away, -1e3)
        depth: Volume = strand.max(0)
        return depth


def _ct_grid(rng: np.random.Generator) -> Grid:
    """Stored from left to right and from the back to the front, as scanners do: two axes point against RAS."""
    return _grid(CT_SHAPE, CT_SPACING_MM, (-1.0, -1.0, 1.0), rng.uniform(-2, 2, size=3))


def _pet_grid(rng: np.random.Generator) -> Grid:
    """Larger than that of the CT, and with another middle."""
    return _grid(PET_SHAPE, PET_SPACING_MM, (1.0, -1.0, -1.0), rng.uniform(-9, 9, size=3))


def _grid(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    directions: tuple[float, float, float],
    middle: NDArray[np.float64],
) -> Grid:
    affine = np.diag([*np.array(spacing) * directions, 1.0])
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


def _tag(grid: Grid) -> Volume:
    """A metal tag in the air in front of the right shoulder, (X, Y, Z)."""
    return share(ellipsoid(grid.points, (54.0, 44.0, 34.0), (8.0, 8.0, 8.0)))


def _scan_ct(
    grid: Grid, thorax: Thorax, lesion: _Lesion, tag: Volume, *, is_solid: bool, rng: np.random.Generator
) -> NDArray[np.int16]:
    points = thorax.straighten(grid.points)
    density = np.full(grid.shape, TISSUE["air"][0])
    for tissue, mask in thorax.layers(points):
        density += mask * (TISSUE[tissue][0] - density)
    density += share(thorax.lungs(points) - 2) * 40.0 * grid.noise(rng, 3.5)  # vessels and airways
    solid, haze = rng.uniform(700, 1000), rng.uniform(0, 60)
    mask, value = share(lesion.depth(grid.points)), haze
    if is_solid:
        spicules = share(lesion.spicules(grid.points)) * share(thorax.lungs(points))
        mask, value = np.maximum(mask, spicules), solid
    density += mask * (value - density)
    density += tag * (2800.0 - density)
    density += 15.0 * grid.noise(rng, 2.0)
    return np.round(np.clip(density, -1024, 3071)).astype(np.int16)


def _scan_pet(
    grid: Grid, thorax: Thorax, lesion: _Lesion, *, is_hot: bool, rng: np.random.Generator
) -> NDArray[np.float32]:
    points = thorax.straighten(grid.points)
    uptake = np.zeros(grid.shape)
    for tissue, mask in thorax.layers(points):
        uptake += mask * (TISSUE[tissue][1] - uptake)
    heart = thorax.heart(points)
    wall, blood = rng.uniform(2.0, 6.0), 1.6  # what the muscle of the heart takes up depends on the last meal
    uptake += share(heart) * (wall - uptake) + share(heart - 9.0) * (blood - wall)
    hot, cold = rng.uniform(8.0, 13.0), rng.uniform(0.8, 1.4)
    uptake += share(lesion.depth(grid.points)) * ((hot if is_hot else cold) - uptake)
    seen = grid.blur(uptake, 2.6)  # 6 mm full width at half maximum
    seen += (0.03 + 0.12 * np.sqrt(np.clip(seen, 0, None))) * grid.noise(rng, 2.5)
    return np.clip(seen, 0, None).astype(np.float32)


def _write(folder: Path, phantom: Phantom) -> None:
    datalist: dict[str, list[dict[str, object]]] = {"training": [], "testing": []}
    truth: dict[str, object] = {}
    for number in range(1, phantom.n_cases + 1):
        name, case = f"phantom{number:03d}", make_case(phantom, number)
        _write_case(folder / name, case)
        is_held_out = (number - 1) // BLOCK % HELD_OUT_EVERY == 0
        datalist["testing" if is_held_out else "training"].append(
            {"case_id": name, "image": f"{name}/ct.nii.gz", "pet": f"{name}/pet.nii.gz", "label": case.label}
        )
        truth[name] = case.truth
    facts = {"phantom": asdict(phantom), "evidence": list(phantom.evidence), "cases": truth}
    (folder / TRUTH_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    (folder / DATALIST_FILE).write_text(json.dumps(datalist, indent=2) + "\n")


def _write_case(target: Path, case: Case) -> None:
    target.mkdir()
    volumes = {
        "ct": (case.ct, case.ct_affine),
        "pet": (case.pet, case.pet_affine),
        "lesion_ct": (case.lesion_ct, case.ct_affine),
        "lesion_pet": (case.lesion_pet, case.pet_affine),
        **({"tag_ct": (case.tag_ct, case.ct_affine)} if case.tag_ct.any() else {}),
    }
    for name, (voxels, affine) in volumes.items():
        image = nibabel.Nifti1Image(voxels.astype(np.uint8) if voxels.dtype == bool else voxels, affine)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, target / f"{name}.nii.gz")
