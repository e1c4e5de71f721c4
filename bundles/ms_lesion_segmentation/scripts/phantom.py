"""Four-sequence head phantoms with lesions whose evidence is planted in named sequences only.

A phantom answers what no real scan can: which sequence and which voxels *should* an explanation point at? Anatomy,
distractors, bias fields and noise come from random streams that know nothing of the lesions, and a lesion changes
the signal of the sequences in ``evidence`` and of no other. Two phantoms that differ in ``evidence`` only are
therefore equal, bit for bit, in every sequence that neither of them names.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from .anatomy import SHAPE, SIGNAL, SPACING_MM, Grid, Head, Volume, oblique_affine, share

logger = logging.getLogger(__name__)

SEQUENCES = ("FLAIR", "T1", "T1POST", "T2")
LESION_CONTRAST: Mapping[str, float] = {"FLAIR": 32.0, "T1": -28.0, "T1POST": 32.0, "T2": 32.0}
TRUTH_FILE = "truth.json"
DESCRIPTION_FILE = "phantom.json"
TWIN = 5  # with a shortcut, this many numbers lie between a case and the same head without a cap


@dataclass(frozen=True)
class Phantom:
    """Everything that the voxels of a set of phantoms depend on.

    Args:
        evidence: the sequences in which a lesion can be seen, out of FLAIR, T1, T1POST, T2.
        shortcut: whether a cap around the head gives the label away. Then every head is there twice, such as
            phantom01 and phantom06: with a cap, and without one and without its lesions being labeled.
        n_cases: how many cases, named phantom01, phantom02, and so on.
        seed: of all random streams.

    Raises:
        ValueError: if a sequence is unknown or none is named, if there are no cases, or if ``shortcut`` is no truth
            value: on a command line, ``false`` is a word, and would count as true.

    Example:
        >>> Phantom(evidence=["FLAIR", "T2"]).evidence
        ('FLAIR', 'T2')
    """

    evidence: Sequence[str] = ("FLAIR",)
    shortcut: bool = False
    n_cases: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        named = (self.evidence,) if isinstance(self.evidence, str) else tuple(self.evidence)
        if not named or not set(named) <= set(SEQUENCES):
            raise ValueError(f"evidence={list(named)} must name one or more of {', '.join(SEQUENCES)}.")
        if not isinstance(self.shortcut, bool):
            raise ValueError(f"shortcut={self.shortcut!r} must be True or False: write --shortcut False.")
        if self.n_cases < 1:
            raise ValueError(f"n_cases={self.n_cases} must be at least 1.")
        object.__setattr__(self, "evidence", named)

    @property
    def name(self) -> str:
        """Name of the folder that holds these phantoms; it differs whenever their voxels do."""
        facts = json.dumps([__version__, SHAPE, SPACING_MM, self.evidence, self.shortcut, self.seed])
        digest = hashlib.sha256(facts.encode()).hexdigest()[:6]
        return "_".join([*self.evidence, *(["shortcut"] if self.shortcut else []), digest]).lower()


__version__ = 1  # of the voxels: raise it whenever a change to this file or to anatomy.py changes them


@dataclass(frozen=True)
class Case:
    """One phantom and the truth about it, all on one voxel grid.

    Args:
        images: (X, Y, Z) int16 by sequence, in the arbitrary units of a scanner.
        lesion: (X, Y, Z), bool, the label.
        marker: (X, Y, Z), bool, the cap around the head; all False without a shortcut.
        affine: (4, 4), voxels to millimeters (RAS).
        truth: what was planted where, as written to truth.json.
    """

    images: Mapping[str, NDArray[np.int16]]
    lesion: NDArray[np.bool_]
    marker: NDArray[np.bool_]
    affine: NDArray[np.float64]
    truth: Mapping[str, object]


def write_phantom(root: str | os.PathLike[str], phantom: Phantom) -> str:
    """Write those cases that are not on disk yet, and return the folder of these phantoms.

    Args:
        root: holds one folder for every setting, so that phantoms of several settings live side by side.
        phantom: what to write.
    """
    folder = Path(root).expanduser() / phantom.name
    folder.mkdir(parents=True, exist_ok=True)
    targets = {number: folder / f"phantom{number:02d}" for number in range(1, phantom.n_cases + 1)}
    missing = [number for number, target in targets.items() if not target.is_dir()]
    for number in missing:
        _write_case(targets[number], make_case(phantom, number))
    if missing:
        (folder / DESCRIPTION_FILE).write_text(json.dumps(asdict(phantom), indent=2) + "\n")
        logger.info("wrote %d phantoms to %s", len(missing), folder)
    return str(folder)


def make_case(phantom: Phantom, number: int) -> Case:
    """Make the case with this number, counted from 1."""
    is_marked = phantom.shortcut and (number - 1) // TWIN % 2 == 0
    head_number = number - TWIN if phantom.shortcut and not is_marked else number

    def draw(*words: str, of: int = head_number) -> np.random.Generator:
        return np.random.default_rng([phantom.seed, of, *(zlib.crc32(word.encode()) for word in words)])

    grid = Grid(oblique_affine(draw("pose")))
    head = Head(grid, draw("head"))
    signal = head.signal()
    sites = _Sites(head, superficial=phantom.shortcut)

    planted = sites.draw(draw("lesions"), count=8 if phantom.shortcut else 10)
    lesions, lookalikes = ([], planted) if phantom.shortcut and not is_marked else (planted, [])
    distractors = {name: sites.draw(draw("distractors", name), count=6) for name in SEQUENCES}

    for channel, name in enumerate(SEQUENCES):
        contrast = LESION_CONTRAST[name]
        is_evidence = name in phantom.evidence
        signal[channel] += (-0.7 if is_evidence else 1.0) * contrast * sites.paint(distractors[name])
        if is_evidence:
            signal[channel] += contrast * sites.paint(planted)
    marker = _cap(head) if is_marked else np.zeros(SHAPE)
    signal += marker * (np.array(SIGNAL["marker"])[:, None, None, None] - signal)

    truth = {
        "evidence": list(phantom.evidence),
        "shortcut": phantom.shortcut,
        "lesions": [blob.describe(grid) for blob in lesions],
        "lookalikes": [blob.describe(grid) for blob in lookalikes],
        "distractors": {name: [blob.describe(grid) for blob in blobs] for name, blobs in distractors.items()},
    }
    images = {
        name: _scan(grid, signal[channel], draw("scanner", name, of=number))
        for channel, name in enumerate(SEQUENCES)
    }
    return Case(images, sites.paint(lesions) > 0.5, marker > 0.5, grid.affine, truth)


@dataclass(frozen=True)
class _Blob:
    voxel: tuple[int, int, int]
    radius_mm: float

    def center(self, grid: Grid) -> NDArray[np.float64]:
        return grid.points[(slice(None), *self.voxel)]

    def describe(self, grid: Grid) -> dict[str, object]:
        center = [round(float(value), 1) for value in self.center(grid)]
        return {"voxel": list(self.voxel), "center_mm": center, "radius_mm": round(self.radius_mm, 1)}


class _Sites:
    """Where blobs may lie in a head, and how they look there.

    Args:
        head: the head.
        superficial: whether they lie below the cortex and apart from each other, rather than around the ventricles.
    """

    def __init__(self, head: Head, *, superficial: bool) -> None:
        self.head = head
        self.gap_mm = 26.0 if superficial else 12.0
        self.outline = head.grid.field(head.rng, 6.0)
        solid = (head.white_matter > 0.95) & (head.points[2] > -12)
        near_skin = (head.skin < 30) & (head.points[2] > 6)
        weight = near_skin * 1.0 if superficial else 0.15 + np.exp(np.clip(head.ventricles, None, 0) / 6)
        self.weight = (solid * weight).ravel()

    def draw(self, rng: np.random.Generator, count: int) -> list[_Blob]:
        """Up to `count` blobs, as many as find room."""
        blobs: list[_Blob] = []
        voxels = rng.choice(self.weight.size, size=60 * count, p=self.weight / self.weight.sum())
        radii = rng.uniform(4.5, 9.5, size=count)
        for index in voxels:
            x, y, z = (int(value) for value in np.unravel_index(index, SHAPE))
            blob = _Blob((x, y, z), float(radii[len(blobs)]))
            if all(self._distance(blob, other) > self.gap_mm for other in blobs):
                blobs.append(blob)
            if len(blobs) == count:
                break
        return blobs

    def paint(self, blobs: Sequence[_Blob]) -> Volume:
        """Share of every voxel that is blob, in white matter only, (X, Y, Z)."""
        inside = np.zeros(SHAPE)
        for blob in blobs:
            center = self.head.grid.points - blob.center(self.head.grid)[:, None, None, None]
            depth = blob.radius_mm * (1 + 0.22 * self.outline) - np.sqrt((center**2).sum(0))
            inside = np.maximum(inside, share(depth))
        painted: Volume = inside * self.head.white_matter
        return painted

    def _distance(self, one: _Blob, other: _Blob) -> float:
        return float(np.linalg.norm(one.center(self.head.grid) - other.center(self.head.grid)))


def _cap(head: Head) -> Volume:
    """A cap of bright gel in the air around the head, which it does not touch, (X, Y, Z)."""
    cap: Volume = share(3.5 - np.abs(-head.skin - 6.5)) * share(head.points[2])
    return cap


def _scan(grid: Grid, signal: Volume, rng: np.random.Generator) -> NDArray[np.int16]:
    """What a scanner makes of the signal: coil sensitivity, texture, Rician noise, arbitrary units."""
    coil = np.exp(0.16 * grid.field(rng, 45.0))
    texture = 1 + 0.02 * grid.field(rng, 3.0)
    real, imaginary = rng.normal(scale=3.0, size=(2, *SHAPE))
    magnitude = np.hypot(signal * coil * texture + real, imaginary)
    return np.round(rng.uniform(4.0, 9.0) * magnitude).astype(np.int16)


def _write_case(target: Path, case: Case) -> None:
    """Write a case whole or not at all."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, image in case.images.items():
            nibabel.save(_nifti(image, case.affine), scratch / f"{name}.nii.gz")
        nibabel.save(_nifti(case.lesion, case.affine), scratch / "lesion.nii.gz")
        nibabel.save(_nifti(case.marker, case.affine), scratch / "marker.nii.gz")
        (scratch / TRUTH_FILE).write_text(json.dumps(case.truth, indent=2) + "\n")
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _nifti(volume: NDArray[np.bool_] | NDArray[np.int16], affine: NDArray[np.float64]) -> nibabel.Nifti1Image:
    image = nibabel.Nifti1Image(volume.astype(np.uint8) if volume.dtype == bool else volume, affine)
    image.header.set_xyzt_units("mm")
    return image
