"""Chest radiographs with a clinical record, in which it is known what decides the label.

Every film has three facts that are drawn independently of each other and in equal numbers: an opacity in a lung, a high
CRP, and a side marker in the corner. What is planted says which of them make the label. Pictures and records come from
random streams that do not know it: two phantoms that differ in ``plant`` only have the same pictures, bit for bit, and
the same records but for the label (and, with "redundant", the CRP).
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .anatomy import SIZE, Chest, Opacity, field, letter

logger = logging.getLogger(__name__)

TABLE_FILE = "metadata.csv"
IMAGE_FOLDER = "images"
MASK_FOLDER = "masks"
TRUTH_FILE = "truth.json"
CONTRAST = 0.32
MASK_VALUES = {"opacity": 1, "marker": 2}


@dataclass(frozen=True)
class Facts:
    """What a label can depend on.

    Args:
        opacity: whether a lung holds one.
        high_crp: whether the CRP was measured and is high.
        marker: whether a letter stands in the corner.
    """

    opacity: bool
    high_crp: bool
    marker: bool


@dataclass(frozen=True)
class Plant:
    """What decides the label.

    Args:
        rule: of the label.
        decides: the inputs that it depends on, and by what of them.
        words: the rule, as it is written to truth.json.
    """

    rule: Callable[[Facts], bool]
    decides: Mapping[str, str]
    words: str


PLANTS: Mapping[str, Plant] = {
    "image": Plant(lambda facts: facts.opacity, {"image": "opacity"}, "opacity"),
    "table": Plant(lambda facts: facts.high_crp, {"clinical": "CRP"}, "CRP is high"),
    "redundant": Plant(
        lambda facts: facts.opacity,
        {"image": "opacity", "clinical": "CRP"},
        "opacity, and CRP is high just as often",
    ),
    "xor": Plant(
        lambda facts: facts.opacity != facts.high_crp,
        {"image": "opacity", "clinical": "CRP"},
        "either opacity or CRP is high, not both",
    ),
    "shortcut": Plant(lambda facts: facts.marker, {"image": "marker"}, "marker"),
}


@dataclass(frozen=True)
class Phantom:
    """Everything that a set of phantoms depends on.

    Args:
        plant: what decides the label: "image" (an opacity), "table" (the CRP), "redundant" (either of them alone),
            "xor" (exactly one of them), "shortcut" (a letter in the corner). Everything else is noise.
        n_patients: how many patients; every third has two films. Labels are balanced exactly, in training and in
            what is held out, if this is a multiple of 120.
        seed: of all random streams.

    Raises:
        ValueError: if the plant is unknown or there are too few patients.

    Example:
        >>> Phantom(plant="xor").n_patients
        480
    """

    plant: str = "image"
    n_patients: int = 480
    seed: int = 0

    def __post_init__(self) -> None:
        if self.plant not in PLANTS:
            raise ValueError(f"plant={self.plant!r} must be one of {', '.join(PLANTS)}.")
        if self.n_patients < 8:
            raise ValueError(
                f"n_patients={self.n_patients} must be at least 8, one for every combination of facts."
            )

    @property
    def name(self) -> str:
        """Name of the folder that holds these phantoms; it differs whenever they do."""
        facts = json.dumps([__version__, SIZE, self.plant, self.n_patients, self.seed])
        return f"{self.plant}_{hashlib.sha256(facts.encode()).hexdigest()[:6]}"


__version__ = 1  # of the phantoms: raise it whenever a change to this file or to anatomy.py changes them


@dataclass(frozen=True)
class Film:
    """One phantom and the truth about it.

    Args:
        name: of the case.
        image: (rows, columns), uint8.
        mask: of the same shape, 1 where the opacity is, 2 where the marker is.
        record: its row of the table, by column.
        truth: what was planted where, as written to truth.json.
    """

    name: str
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    record: Mapping[str, str]
    truth: Mapping[str, object]


def write_phantom(root: str | os.PathLike[str], phantom: Phantom) -> str:
    """Write the phantoms if they are not on disk yet, and return their folder.

    Args:
        root: holds one folder for every setting, so that phantoms of several settings live side by side.
        phantom: what to write.
    """
    folder = Path(root).expanduser() / phantom.name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{phantom.name}.", dir=folder.parent))
        try:
            _write(scratch, phantom)
            scratch.chmod(0o755)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        logger.info("wrote phantoms of %d patients to %s", phantom.n_patients, folder)
    return str(folder)


def make_films(phantom: Phantom) -> Iterator[Film]:
    """Make all films of all patients."""
    for number in range(phantom.n_patients):
        for visit in range(2 if number % 3 == 0 else 1):
            yield _make_film(phantom, number, visit)


def _make_film(phantom: Phantom, number: int, visit: int) -> Film:
    def draw(word: str, *of: int) -> np.random.Generator:
        return np.random.default_rng([phantom.seed, number, *of, zlib.crc32(word.encode())])

    opacity, high_crp, marker = (bool(number >> bit & 1) for bit in range(3))
    facts = Facts(opacity, opacity if phantom.plant == "redundant" else high_crp, marker)
    name = f"p{number:03d}_{'ab'[visit]}"
    chest = Chest(draw("chest"))
    blob, corner = Opacity.draw(draw("opacity", visit), chest), letter(draw("marker", visit))
    inside = blob.paint(chest) * facts.opacity
    corner &= facts.marker

    person, day = draw("person"), draw("day", visit)
    record = {
        "image": f"{name}.png",
        "patient_id": f"p{number:03d}",
        "age": f"{person.integers(20, 91)}",
        "sex": str(person.choice(["F", "M"])),
        "smoking": str(person.choice(["never", "former", "current"])),
        "temperature": f"{np.clip(day.normal(37.6, 0.8), 35, 41):.1f}",
        "heart_rate": f"{np.clip(day.normal(88, 15), 45, 150):.0f}",
        "oxygen_saturation": f"{np.clip(day.normal(95, 2.5), 82, 100):.0f}",
        "view_position": str(day.choice(["PA", "AP"])),
        "crp": _crp(draw("crp", visit), high=facts.high_crp),
        "pneumonia": str(int(PLANTS[phantom.plant].rule(facts))),
    }
    truth = {
        "opacity": {"row": blob.row, "column": blob.column, "radius": round(blob.radius, 1)}
        if facts.opacity
        else None,
        "high_crp": facts.high_crp,
        "marker": facts.marker,
    }
    mask = np.where(corner, MASK_VALUES["marker"], (inside > 0.5) * MASK_VALUES["opacity"]).astype(np.uint8)
    signal = chest.picture + CONTRAST * inside
    return Film(name, _expose(np.where(corner, 0.95, signal), draw("film", visit)), mask, record, truth)


def _crp(rng: np.random.Generator, *, high: bool) -> str:
    """In mg/L: 60 to 250 if high, else 0.5 to 20 or, for three in ten, not measured."""
    low, top = (60.0, 250.0) if high else (0.5, 20.0)
    value = float(np.exp(rng.uniform(np.log(low), np.log(top))))
    return "" if not high and rng.uniform() < 0.3 else f"{value:.1f}"


def _expose(signal: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """What a detector makes of it: scatter, grain, and an exposure of its own."""
    scatter = 0.02 * field(rng, 8.0) + 0.02 * field(rng, 1.0)
    grain = 0.02 * rng.normal(size=signal.shape)
    exposed = (signal + scatter + grain) * rng.uniform(0.85, 1.0) + rng.uniform(0.0, 0.05)
    film: NDArray[np.uint8] = np.round(255 * np.clip(exposed, 0, 1)).astype(np.uint8)
    return film


def _write(folder: Path, phantom: Phantom) -> None:
    for name in (IMAGE_FOLDER, MASK_FOLDER):
        (folder / name).mkdir()
    films = list(make_films(phantom))
    for film in films:
        for name, pixels in ((IMAGE_FOLDER, film.image), (MASK_FOLDER, film.mask)):
            Image.fromarray(pixels).save(folder / name / film.record["image"])
    with (folder / TABLE_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(films[0].record))
        writer.writeheader()
        writer.writerows(film.record for film in films)
    plant = PLANTS[phantom.plant]
    truth = {
        **asdict(phantom),
        "label": plant.words,
        "decides": dict(plant.decides),
        "mask_values": MASK_VALUES,
        "cases": {film.name: film.truth for film in films},
    }
    (folder / TRUTH_FILE).write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
