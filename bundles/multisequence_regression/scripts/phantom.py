"""Four-sequence head phantoms whose age can be read from planted cues and from nothing else.

A phantom answers what no real scan can: which sequence and which voxels *should* an explanation point at? Every
sequence shows lateral ventricles of a size of its own, drawn independently of all others. This is the *cue* of the
sequence, between -1 (5 ml) and 1 (51 ml). What `plant` names decides which cues the age follows; all others are
distractors that look the same and say nothing. Streams of random numbers go by sequence, so phantoms that differ in
`plant` alone are equal, bit for bit, in all that the plant does not touch.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from .anatomy import FLUID, SHAPE, SPACING_MM, Grid, Head, Volume, ellipsoid, oblique_affine, share

logger = logging.getLogger(__name__)

SEQUENCES = ("FLAIR", "T1", "T1POST", "T2")
PLANTS: Mapping[str, tuple[str, ...]] = {  # and the sequences whose voxels tell the age
    "t2": ("T2",),
    "redundant": ("FLAIR", "T2"),
    "interaction": ("FLAIR", "T1"),
    "useless": ("FLAIR", "T1", "T2"),
    "shortcut": SEQUENCES,
}
TRUTH_FILE = "truth.json"
DESCRIPTION_FILE = "phantom.json"
TABLE_FILE = "patient_info.csv"
__version__ = 1  # of the voxels: raise it whenever a change to this file or to anatomy.py changes them


@dataclass(frozen=True)
class Phantom:
    """Everything that the voxels of a set of phantoms depend on.

    Args:
        plant: what the age follows. `t2`: the cue of T2. `redundant`: one cue that FLAIR and T2 share. `interaction`:
            the product of the cues of FLAIR and T1, each of which alone says nothing. `useless`: the mean of the
            cues of FLAIR, T1 and T2, so that T1POST is of no use. `shortcut`: the brightness of a marker beside the
            head, in all sequences.
        n_cases: how many cases, named phantom001, phantom002, and so on.
        seed: of all random streams.

    Raises:
        ValueError: if the plant is unknown, or if there are no cases.

    Example:
        >>> Phantom(plant="redundant").evidence
        ('FLAIR', 'T2')
    """

    plant: str = "t2"
    n_cases: int = 120
    seed: int = 0

    def __post_init__(self) -> None:
        if self.plant not in PLANTS:
            raise ValueError(f"plant={self.plant!r} must be one of {', '.join(PLANTS)}.")
        if self.n_cases < 1:
            raise ValueError(f"n_cases={self.n_cases} must be at least 1.")

    @property
    def evidence(self) -> tuple[str, ...]:
        """The sequences whose voxels tell the age."""
        return PLANTS[self.plant]

    @property
    def name(self) -> str:
        """Name of the folder that holds these phantoms; it differs whenever their voxels do."""
        facts = json.dumps([__version__, SHAPE, SPACING_MM, self.plant, self.n_cases, self.seed])
        return f"{self.plant}_{hashlib.sha256(facts.encode()).hexdigest()[:6]}"


@dataclass(frozen=True)
class Case:
    """One phantom and the truth about it, all on one voxel grid.

    Args:
        images: (X, Y, Z) int16 by sequence, in the arbitrary units of a scanner.
        age: in years, what is to be predicted.
        evidence: (X, Y, Z), bool, the voxels that tell the age: the ventricles, or the marker.
        affine: (4, 4), voxels to millimeters (RAS).
        truth: what was planted where, as written to truth.json.
    """

    images: Mapping[str, NDArray[np.int16]]
    age: float
    evidence: NDArray[np.bool_]
    affine: NDArray[np.float64]
    truth: Mapping[str, object]


def write_phantom(root: str | os.PathLike[str], phantom: Phantom) -> str:
    """Write the phantoms with a table of their ages, unless they are on disk already, and return their folder.

    Args:
        root: holds one folder for every setting, so that phantoms of several settings live side by side.
        phantom: what to write.
    """
    folder = Path(root).expanduser() / phantom.name
    if not (folder / DESCRIPTION_FILE).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _write(scratch, phantom)
            _publish(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        logger.info("wrote %d phantoms to %s", phantom.n_cases, folder)
    return str(folder)


def _publish(scratch: Path, folder: Path) -> None:
    """Give a folder its name, unless another process was faster."""
    try:
        scratch.chmod(0o755)  # temporary folders are private
        scratch.rename(folder)
    except OSError:
        if not (folder / DESCRIPTION_FILE).is_file():
            raise


def make_case(phantom: Phantom, number: int) -> Case:
    """Make the case with this number, counted from 1."""

    def draw(*words: str) -> np.random.Generator:
        return np.random.default_rng([phantom.seed, number, *(zlib.crc32(word.encode()) for word in words)])

    grid = Grid(oblique_affine(draw("pose")))
    head = Head(grid, draw("head"))
    cues = {name: float(draw("cue", name).uniform(-1, 1)) for name in SEQUENCES}
    if phantom.plant == "redundant":
        cues["FLAIR"] = cues["T2"]
    if phantom.plant == "interaction":
        cues |= {name: _decided(cues[name]) for name in phantom.evidence}
    brightness = float(draw("marker").uniform(-1, 1))
    age = 50.0 + 30.0 * _what_age_follows(phantom.plant, cues, brightness)

    ventricles = {name: head.ventricles(28.0 + 23.0 * cue) for name, cue in cues.items()}
    signal = head.signal.copy()
    for channel, name in enumerate(SEQUENCES):
        signal[channel] += ventricles[name] * (FLUID[channel] - signal[channel])
    marker = np.zeros(SHAPE)
    if phantom.plant == "shortcut":
        marker = _marker(grid)
        signal += marker * (100.0 + 60.0 * brightness - signal)

    truth = {
        "plant": phantom.plant,
        "evidence": list(phantom.evidence),
        "age": round(age, 2),
        "cues": {name: round(cue, 4) for name, cue in cues.items()},
        "marker": round(brightness, 4) if phantom.plant == "shortcut" else None,
    }
    widest = np.max([ventricles[name] for name in phantom.evidence], axis=0)
    images = {
        name: _scan(grid, signal[channel], draw("scanner", name)) for channel, name in enumerate(SEQUENCES)
    }
    return Case(images, age, (marker if marker.any() else widest) > 0.5, grid.affine, truth)


def _decided(cue: float) -> float:
    """A cue that is clearly one or the other, so that the sign of a product of two can be seen."""
    return float(np.copysign(0.5 + 0.5 * abs(cue), cue))


def _what_age_follows(plant: str, cues: Mapping[str, float], brightness: float) -> float:
    if plant == "shortcut":
        return brightness
    if plant == "interaction":
        return cues["FLAIR"] * cues["T1"]
    return float(np.mean([cues[name] for name in PLANTS[plant]]))


def _marker(grid: Grid) -> Volume:
    """A ball of gel in the air beside the head, as is taped there to tell left from right, (X, Y, Z)."""
    return share(ellipsoid(grid.points, (60.0, 64.0, 62.0), (14.0, 14.0, 14.0)))


def _scan(grid: Grid, signal: Volume, rng: np.random.Generator) -> NDArray[np.int16]:
    """What a scanner makes of the signal: coil sensitivity, Rician noise, arbitrary units."""
    coil = np.exp(np.einsum("i,ixyz->xyz", rng.normal(scale=0.0005, size=3), grid.points))  # 5 % over 10 cm
    real, imaginary = rng.normal(scale=1.5, size=(2, *SHAPE))
    magnitude = np.hypot(signal * coil + real, imaginary)
    return np.round(rng.uniform(4.0, 9.0) * magnitude).astype(np.int16)


def _write(folder: Path, phantom: Phantom) -> None:
    def write(number: int) -> tuple[int, str]:
        case = make_case(phantom, number)
        _write_case(folder / f"phantom{number:03d}", case)
        return number, f"{case.age:.2f}"

    pool = ThreadPoolExecutor()  # arithmetic on volumes and compression leave the interpreter to others
    try:
        rows = list(pool.map(write, range(1, phantom.n_cases + 1)))
    finally:
        pool.shutdown(cancel_futures=True)
    with (folder / TABLE_FILE).open("w", newline="") as file:
        csv.writer(file).writerows([("patient_id", "age"), *rows])
    (folder / DESCRIPTION_FILE).write_text(json.dumps(asdict(phantom), indent=2) + "\n")


def _write_case(target: Path, case: Case) -> None:
    target.mkdir()
    for name, image in case.images.items():
        nibabel.save(_nifti(image, case.affine), target / f"{name}.nii.gz")
    nibabel.save(_nifti(case.evidence.astype(np.uint8), case.affine), target / "evidence.nii.gz")
    (target / TRUTH_FILE).write_text(json.dumps(case.truth, indent=2) + "\n")


def _nifti(volume: NDArray[np.uint8] | NDArray[np.int16], affine: NDArray[np.float64]) -> nibabel.Nifti1Image:
    image = nibabel.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    return image
