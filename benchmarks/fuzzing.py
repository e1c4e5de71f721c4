"""Feed an explaining run with broken and hostile inputs: ``python -m benchmarks.fuzzing`` from the root.

Each input must end in a result that is right or in an error that says what is wrong; nothing may be written outside of
the output folder, and no result of the cases beside it may be lost or changed. Scans go through a bundle's config as a
cohort, beside two that are sound; settings and manifests are broken one at a time.

*Right* means: on the scan's own grid, finite, and with the score that the explainer finds on the scan when it is called
as a function. *Named* means: an error of this package, or one of nibabel, MONAI or Python that has words of its own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import random
import re
import resource
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import torch
from monai.bundle import ConfigParser

from benchmarks.runs import chdir, files_of, run_here, write_bundle, write_scan
from monai_xai.errors import CasesFailedError, XaiError
from monai_xai.manifest import Manifest

MEMORY = 12 * 2**30
SOUND = ("sound1", "sound2")
FROM_FILE = "$__import__('json').load(open('data.json'))"
ONE_EXPLAINER = {"explain_handler::explainer": "@explainer"}


class Subject(NamedTuple):
    """One broken input.

    Args:
        kind: what is broken.
        case: name of its case.
        file: the scan, relative to the bundle.
    """

    kind: str
    case: str
    file: str


class Outcome(NamedTuple):
    """What became of one input.

    Args:
        kind: what was broken.
        what: the input.
        verdict: "right" or "named"; else what is wrong.
        words: of the error.
    """

    kind: str
    what: str
    verdict: str
    words: str = ""


def _plain(chance: random.Random, file: Path) -> nibabel.Nifti1Image:
    write_scan(file.with_suffix(".tmp.nii.gz"), chance.randrange(1000))
    image = nibabel.load(file.with_suffix(".tmp.nii.gz"))
    found = nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
    file.with_suffix(".tmp.nii.gz").unlink()
    return found


def truncated(chance: random.Random, file: Path) -> None:
    """Cut a compressed scan anywhere."""
    write_scan(file, chance.randrange(1000))
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data))])


def corrupted(chance: random.Random, file: Path) -> None:
    """Change a few bytes of a compressed scan, or of what is compressed."""
    write_scan(file, chance.randrange(1000))
    data = bytearray(file.read_bytes())
    if chance.random() < 0.5:
        inner = bytearray(gzip.decompress(data))
        _flip(chance, inner, 352)
        file.write_bytes(gzip.compress(bytes(inner)))
        return
    _flip(chance, data, len(data))
    file.write_bytes(bytes(data))


def header(chance: random.Random, file: Path) -> None:
    """Change a few bytes of the header."""
    write_scan(file, chance.randrange(1000))
    data = bytearray(gzip.decompress(file.read_bytes()))
    _flip(chance, data, 348)
    file.write_bytes(gzip.compress(bytes(data)))


def huge(chance: random.Random, file: Path) -> None:
    """Promise more voxels than there are."""
    write_scan(file, chance.randrange(1000))
    data = bytearray(gzip.decompress(file.read_bytes()))
    sizes = [chance.choice([20, 4000, 32767, -3, 0]) for _ in range(7)]
    data[40:56] = np.array([chance.choice([3, 4, 7]), *sizes], np.int16).tobytes()
    file.write_bytes(gzip.compress(bytes(data)))


def dtype(chance: random.Random, file: Path) -> None:
    """Store voxels as another type."""
    image = _plain(chance, file)
    kinds = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", "c8", "c16"]
    voxels = (np.asarray(image.dataobj) * 100).astype(np.dtype(chance.choice(kinds)))
    if chance.random() < 0.15:
        rgb = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
        voxels = np.zeros(voxels.shape, rgb)
    nibabel.Nifti1Image(voxels, image.affine, dtype=voxels.dtype).to_filename(file)


def values(chance: random.Random, file: Path) -> None:
    """Store voxels that are not numbers, all alike, or out of every range."""
    image = _plain(chance, file)
    voxels = np.array(image.dataobj)
    odd = chance.choice([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-42, 0.0])
    if chance.random() < 0.4:
        voxels[:] = odd
    else:
        voxels[chance.randrange(20), chance.randrange(18), chance.randrange(14)] = odd
    nibabel.Nifti1Image(voxels, image.affine).to_filename(file)


def affine(chance: random.Random, file: Path) -> None:
    """Store an affine that no scanner makes."""
    image = _plain(chance, file)
    matrix = np.array(image.affine)
    axis, other = chance.randrange(3), chance.randrange(3)
    change = chance.choice(["zero", "nan", "inf", "huge", "tiny", "shear", "flip", "copy", "offset"])
    factor = {"zero": 0.0, "nan": np.nan, "inf": np.inf, "huge": 1e6, "tiny": 1e-6, "flip": -1.0}.get(
        change, 1.0
    )
    matrix[:3, axis] *= factor
    if change == "shear":
        matrix[:3, axis] += 0.9 * matrix[:3, other]
    if change == "copy":
        matrix[:3, axis] = matrix[:3, other]
    if change == "offset":
        matrix[axis, 3] = chance.choice([np.nan, np.inf, 1e30])
    found = image.header.copy()
    found["sform_code"], found["qform_code"] = chance.choice([(2, 0), (1, 1), (-1, 0), (0, 3), (77, 88)])
    for row, name in zip(matrix, ("srow_x", "srow_y", "srow_z"), strict=False):
        found[name] = row
    data = (
        bytearray(found.binaryblock) + b"\0" * 4 + np.asarray(image.dataobj).astype("<f4").tobytes(order="F")
    )
    data[108:112] = np.float32(352).tobytes()
    file.write_bytes(gzip.compress(bytes(data)))


def shape(chance: random.Random, file: Path) -> None:
    """Store an array of another number of axes, or of axes that are hardly there."""
    sizes = [chance.choice([0, 1, 2, 3, 7, 20]) for _ in range(chance.choice([1, 2, 3, 3, 3, 4, 5]))]
    voxels = np.random.default_rng(chance.randrange(1000)).random(sizes).astype(np.float32)
    nibabel.Nifti1Image(voxels, np.diag([1.5, 1.5, 1.5, 1.0])).to_filename(file)


def no_nifti(chance: random.Random, file: Path) -> None:
    """Store something else under the name of a scan."""
    contents = [b"", b"\0" * 1000, b"<html>404</html>", b"PK\3\4", chance.randbytes(5000), gzip.compress(b"")]
    file.write_bytes(chance.choice(contents))


SCANS: dict[str, Callable[[random.Random, Path], None]] = {
    f.__name__: f for f in (truncated, corrupted, header, huge, dtype, values, affine, shape, no_nifti)
}

NAMES = (
    "../../etc/passwd", "/etc/passwd", "/tmp/fuzzed", "a/../../b", "..", ".", "", " ", ".hidden", "nul\0name", "CON",
    "LPT1", "x" * 5000, "a b", "-rf", "*?<>|:\"", "\u202egnp", "é" * 300, "\udcff\udcfe", "trailing.", "a\nb", "a\rb",
    "$(reboot)", "=1+1", "%s%n%d", "{0}", "~root", "C:\\windows", "\\\\host\\share", "sub-01_ses-1", "<script>",
    "'; drop", "\x1b[31m", "manifest", "index.json", "settings", "\0", "\ufeff", "1", "0x1p-3", "None", "nan",
    "[1, 2]", "%40evaluator", "&lt;", "a\tb", "'a'", '"a"', "a;b", "a,b", "#", "!", "a\\b", "+", "a+b", "a_b", "a-b",
)  # fmt: skip


def _flip(chance: random.Random, data: bytearray, end: int) -> None:
    for _ in range(chance.choice([1, 1, 2, 8])):
        data[chance.randrange(min(end, len(data)))] = chance.randrange(256)


def settings(chance: random.Random) -> dict[str, Any]:
    """Return one or two settings of a run that make no sense, or hardly any."""
    odd = [
        None,
        "",
        "x",
        -1,
        0,
        1,
        3.5,
        1e30,
        float("nan"),
        [],
        [1, 2],
        {},
        True,
        "@nothing",
        "$1/0",
        "../..",
        [[]],
    ]
    keys = (
        "explainer::target", "explainer::target::channel", "explainer::target::region", "explainer::tolerated_gap",
        "explainer::target::region::start", "explainer::target::region::end", "explainer::attributor",
        "explainer::attributor::n_steps", "explainer::attributor::tolerance", "explainer::attributor::baseline",
        "explainer::channel_names", "explainer::call", "explainer::on_gap", "explainer::embeddings",
        "explain_handler::cases", "explain_handler::interval", "explain_handler::key", "explain_handler::case_key",
        "explain_handler::on_error", "explain_handler::network", "saver::handlers", "saver::transform",
        "saver::anonymize", "saver::salt", "saver::overwrite", "inferer::roi_size", "inferer::overlap", "dataset::data",
    )  # fmt: skip
    return {chance.choice(keys): chance.choice(odd) for _ in range(chance.choice([1, 1, 2]))}


def break_manifest(chance: random.Random, output: Path) -> str:
    """Damage one file of a finished run, and return which."""
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.stat().st_size)
    file = chance.choice(files)
    data = file.read_bytes()
    damage = chance.choice(["cut", "flip", "gone", "empty", "other"])
    if damage == "gone":
        file.unlink()
    elif damage == "flip":
        changed = bytearray(data)
        _flip(chance, changed, len(changed))
        file.write_bytes(bytes(changed))
    else:
        others = {
            "cut": data[: chance.randrange(len(data))],
            "empty": b"",
            "other": b'{"case": [1], "files": 3}',
        }
        file.write_bytes(others[damage])
    return f"{damage} {file.relative_to(output)}"


# --- runs ------------------------------------------------------------------------------------------------------------


class Bundle:
    """A bundle whose runs are watched: what they say, and what they write where.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.folder = write_bundle(folder / "bundle", SOUND)
        with chdir(self.folder):
            parser = ConfigParser()
            parser.read_config(["inference.yaml", "explain.yaml"])
            parser.get_parsed_content("initialize::0")
            names = ("network", "explainer", "inferer", "preprocessing")
            self.parts = {name: parser.get_parsed_content(name) for name in names}
        self.data = [{"image": f"scans/{name}.nii.gz", "case_id": name} for name in SOUND]
        assert self.run(self.data, {"output_dir": "calm"}) is None
        self.calm = files_of(self.folder / "calm" / "xai")

    def run(self, data: Any, given: dict[str, Any]) -> tuple[str, str, bool] | None:
        """Run in a process of its own with limited memory; return type, words and sense of its error, or None."""
        (self.folder / "data.json").write_text(json.dumps(data))
        ours, theirs = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=self._child, args=(theirs, given))
        child.start()
        child.join(300)
        if child.is_alive():
            child.kill()
            return "hangs", "", False
        found: tuple[str, str, bool] | None = (
            ours.recv() if ours.poll() else ("died", str(child.exitcode), False)
        )
        return found

    def _child(self, pipe: Any, given: dict[str, Any]) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        warnings.simplefilter("ignore")
        try:
            run_here(self.folder, **{"dataset::data": FROM_FILE, **ONE_EXPLAINER, **given})
            pipe.send(None)
        except BaseException as error:
            pipe.send((type(error).__name__, str(error), _is_named(error)))

    def written_outside(self, before: dict[str, str]) -> list[str]:
        """Return files outside of output folders that have come, gone or changed."""
        now = self.outside()
        return [name for name in {**before, **now} if before.get(name) != now.get(name)]

    def outside(self) -> dict[str, str]:
        """Return all files that no run may touch."""
        found = files_of(self.root, without=[])
        return {
            name: digest
            for name, digest in found.items()
            if not re.match(r"bundle/(out/|calm/|data\.json)", name)
        }

    def is_right(self, item: dict[str, str], record: Any) -> str:
        """Return what is wrong with a result; empty if it is right."""
        output = self.folder / "out" / "xai"
        with chdir(self.folder):
            image = self.parts["preprocessing"](dict(item))["image"]
        scan = nibabel.load(self.folder / item["image"])
        sidecar = json.loads((output / next(n for n in record.files if n.endswith(".json"))).read_text())
        map_ = nibabel.load(output / next(n for n in record.files if n.endswith(".nii.gz")))
        explainer = replace(self.parts["explainer"], inferer=self.parts["inferer"])
        found = explainer(self.parts["network"], image[None])
        if not np.isfinite(map_.get_fdata()).all():
            return "map is not finite"
        if tuple(map_.shape[:3]) != (*scan.shape, 1, 1)[:3]:
            return f"map has shape {map_.shape}, scan {scan.shape}"
        if not np.allclose(map_.affine, image.meta["original_affine"], rtol=1e-4, atol=1e-3):
            return "map lies elsewhere"
        if not np.isclose(sidecar["Score"], float(found.score[0]), rtol=1e-4, atol=1e-6):
            return f"score is {sidecar['Score']}, should be {float(found.score[0])}"
        return ""


def _is_named(error: BaseException) -> bool:
    """Whether an error says what is wrong: one of ours, or one whose chain ends in words."""
    if isinstance(error, XaiError):
        return True
    words = " ".join(str(part) for part in _chain(error))
    return isinstance(error, Exception) and len(words.split()) > 3 and not isinstance(error, AttributeError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def fuzz_scans(bundle: Bundle, subjects: list[Subject]) -> list[Outcome]:
    """Run a cohort of broken scans beside the sound ones."""
    data = [*bundle.data, *({"image": s.file, "case_id": s.case} for s in subjects)]
    shutil.rmtree(bundle.folder / "out", ignore_errors=True)
    before = bundle.outside()
    error = bundle.run(data, {})
    outside = bundle.written_outside(before)
    records = {record.case: record for record in Manifest(bundle.folder / "out" / "xai").records()}
    now = files_of(bundle.folder / "out" / "xai")
    lost = [
        n for n, digest in bundle.calm.items() if "sub-" in n and "manifest" not in n and now.get(n) != digest
    ]
    found = [
        _outcome_of(bundle, s, records.get(s.case.encode("utf-8", "backslashreplace").decode()))
        for s in subjects
    ]
    if error is not None and error[0] != CasesFailedError.__name__:
        found.append(Outcome(subjects[0].kind, "the run", f"ended early: {error[0]}", error[1]))
    found += [Outcome(subjects[0].kind, name, "written outside") for name in outside]
    found += [Outcome(subjects[0].kind, name, "lost") for name in lost]
    return found


def _outcome_of(bundle: Bundle, subject: Subject, record: Any) -> Outcome:
    own = partial(Outcome, subject.kind, f"{subject.case!r} {subject.file}")
    if record is None:
        return own("no record")
    if record.failures:
        words = "; ".join(record.failures)
        is_bare = re.search(r": \w+(Error|Exception)?$", words) is not None
        return own("bare" if is_bare else "named", words)
    wrong = bundle.is_right({"image": subject.file, "case_id": subject.case}, record)
    return own(f"wrong: {wrong}" if wrong else "right")


def fuzz_settings(bundle: Bundle, chance: random.Random) -> Outcome:
    """Run the sound scans under settings that make no sense."""
    given = settings(chance)
    shutil.rmtree(bundle.folder / "out", ignore_errors=True)
    before = bundle.outside()
    error = bundle.run(bundle.data, given)
    outside = bundle.written_outside(before)
    own = partial(Outcome, "settings", str(given))
    if outside:
        return own("written outside", str(outside))
    if error is None:
        return own("right")
    return own("named" if error[2] else "bare", f"{error[0]}: {error[1]}")


def fuzz_manifest(bundle: Bundle, chance: random.Random) -> Outcome:
    """Go on with a finished run of which one file is damaged; it must end as it was, or refuse by name."""
    output = bundle.folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(bundle.folder / "calm", output)
    what = break_manifest(chance, output / "xai")
    before = bundle.outside()
    error = bundle.run(bundle.data, {})
    own = partial(Outcome, "manifest", what)
    if outside := bundle.written_outside(before):
        return own("written outside", str(outside))
    if error is not None:
        return own("named" if error[2] else "bare", f"{error[0]}: {error[1]}")
    left = [n for n, digest in bundle.calm.items() if files_of(output / "xai").get(n) != digest]
    return own(f"differs: {left}" if left else "right")


def fuzz(folder: Path, rounds: int, seed: int) -> list[Outcome]:
    """Break everything.

    Args:
        folder: empty.
        rounds: how many of each kind of scan; names, settings and manifests in proportion.
        seed: of everything.
    """
    chance = random.Random(seed)
    bundle = Bundle(folder)
    found: list[Outcome] = []
    for kind, make in SCANS.items():
        subjects = [Subject(kind, f"{kind}{n:03}", f"scans/{kind}{n:03}.nii.gz") for n in range(rounds)]
        for subject in subjects:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make(chance, bundle.folder / subject.file)
        found += fuzz_scans(bundle, subjects)
    names = NAMES[: max(2, rounds * 2)]
    found += fuzz_scans(bundle, [Subject("names", name, f"scans/{SOUND[0]}.nii.gz") for name in names])
    found += [fuzz_settings(bundle, chance) for _ in range(rounds * 2)]
    found += [fuzz_manifest(bundle, chance) for _ in range(rounds)]
    return found


def main() -> None:
    """Print what became of all inputs, by kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--words", action="store_true", help="print the words of every error")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(Path(folder), options.rounds, options.seed)
    print("| kind | inputs | right | named error | else |\n|---|---|---|---|---|")
    for kind in dict.fromkeys(outcome.kind for outcome in found):
        own = Counter(outcome.verdict for outcome in found if outcome.kind == kind)
        rest = sum(own.values()) - own["right"] - own["named"]
        print(f"| {kind} | {sum(own.values())} | {own['right']} | {own['named']} | {rest} |")
    print(f"\n{len(found)} inputs")
    for outcome in found:
        if options.words or outcome.verdict not in ("right", "named"):
            print(f"{outcome.kind}: {outcome.what[:200]}: {outcome.verdict}: {outcome.words[:400]}")


if __name__ == "__main__":
    main()
