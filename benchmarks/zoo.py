"""Explain every bundle of MONAI's Model Zoo: ``python -m benchmarks.zoo CHECKOUT`` from the root of the repository.

CHECKOUT is a checkout of https://github.com/Project-MONAI/model-zoo. Of each bundle the run is the one that ``python -m
monai_xai explain --random_weights`` builds: its own config, with evaluator, inferer, network and ``prepare_batch`` as
they are. What is put in the place of its own: the data (one synthetic case of noise, with the channels that its
metadata tell, where the network takes it), post-processing, savers and metrics (none), and what :data:`CHANGES` says,
windows above all, so that two cores can do it.

The map, a gradient in float64, is held against the central difference of the score along a random direction: of the
engine's own call of its inferer, which knows nothing of attribution. Each bundle has a process of its own with a time
limit; its result is kept as JSON, so that the run goes on where it was. In the end ``docs/model_zoo.md`` is written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import subprocess
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from torch import Tensor

from monai_xai import AttributionEvents, Explainer, UnsupportedBundleError, XaiError
from monai_xai.bundle_runs import BundleRequest, BundleRun
from monai_xai.handlers import register_events
from monai_xai.undisturbed import undisturbed

TOLERANCE = 1e-3
"""Relative difference between the map and the finite difference up to which a map is right."""
LEAST = 0.1
"""Slope along a direction, in units of what it has on average, the norm of the map: below that another one is drawn."""
STEPS = (1e-7, 1e-8)
"""Of the finite difference, in units of the input, whose standard deviation is 1: the best counts, since a large step
crosses the kinks of a network and a small one drowns in rounding."""


@dataclass(frozen=True)
class Change:
    """What is done to a bundle so that it runs here.

    Args:
        size: of the synthetic case; empty takes the one of the metadata, or 40 x 32 x 32 in 3D.
        settings: values by their id in the config.
        without: options to take away, by the id of what has them.
        target: what is asked where nothing follows from the config.
        item: further entries of the case.
        is_tensor: whether a case is the image alone.
        note: what the table says about it.
    """

    size: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None
    item: Mapping[str, Any] = field(default_factory=dict)
    is_tensor: bool = False
    note: str = ""


_WINDOWS = {"inferer::roi_size": [32, 32, 32]}
_SMALL = Change(settings=_WINDOWS, note="windows of 32³")
_WINDOW_OF_64 = {"inferer::roi_size": [64, 64, 64]}
_ANY_CELLS = {
    "dints_space::arch_code": [
        "$__import__('numpy').ones((12, 10))",
        "$__import__('numpy').random.default_rng(0).integers(0, 5, (12, 10))",
    ],
    "dints_space::device": "$torch.device('cpu')",
    "network_def::node_a": "$torch.ones(13, 4)",
}
_SEARCHED = Change(
    size=(40, 32, 32),
    settings={**_ANY_CELLS, "inferer::roi_size": [32, 32, 32]},
    note="any cells in place of the searched ones, whose file is not in the repository; windows of 32³",
)
CHANGES: Mapping[str, Change] = {
    "brats_mri_segmentation": Change(settings=_WINDOWS, note="windows of 32³ in place of 240 x 240 x 160"),
    "breast_density_classification": Change(
        settings={"network_def::pretrained": False}, note="ImageNet weights not fetched"
    ),
    "classification_template": Change(item={"label": 0}),
    "multi_organ_segmentation": _SEARCHED,
    "pancreas_ct_dints_segmentation": _SEARCHED,
    "pathology_nuclei_segmentation_classification": Change(
        size=(164, 164), note="164², which makes one window"
    ),
    "pathology_tumor_detection": Change(
        settings={"network_def::pretrained": False}, note="ImageNet weights not fetched"
    ),
    "pediatric_abdominal_ct_segmentation": Change(
        size=(64, 64, 64), settings=_WINDOW_OF_64, note="one window of 64³"
    ),
    "prostate_mri_anatomy": _SMALL,
    "renalStructures_CECT_segmentation": _SMALL,
    "renalStructures_UNEST_segmentation": Change(size=(96, 96, 96), note="one window"),
    "segmentation_template": Change(size=(32, 32, 32), note="32³ in place of 128³"),
    "spleen_ct_segmentation": _SMALL,
    "spleen_deepedit_annotation": Change(size=(64, 64, 64), note="64³ in place of 128³"),
    "swin_unetr_btcv_segmentation": Change(
        size=(64, 64, 64),
        settings=_WINDOW_OF_64,
        without={"network_def": "img_size"},
        note="without img_size, which MONAI 1.6 has no more; one window of 64³",
    ),
    "valve_landmarks": Change(size=(256, 256, 2), is_tensor=True, note="two slices; numpy.product put back"),
    "ventricular_short_axis_3label": Change(size=(256, 256, 2), note="two slices"),
    "vista2d": Change(
        size=(256, 256),
        settings={"sam_ckpt_path": None},
        target="RegionScore(channel=0, region=Predicted(threshold=0.0))",
        note="asked about channel 0, the logit of a cell",
    ),
    "vista3d": Change(
        size=(64, 64, 64),
        settings={"patch_size": [64, 64, 64]},
        item={"label_prompt": [3]},
        note="windows of 64³",
    ),
    "wholeBody_ct_segmentation": _SMALL,
    "wholeBrainSeg_Large_UNEST_segmentation": Change(
        size=(96, 96, 96),
        settings={
            "network_def::depths": [2, 2, 2],
            "network_def::embed_dim": [64, 128, 256],
            "network_def::feature_size": 8,
            "network_def::out_channels": 8,
        },
        note="one window; 2 of 8 deep blocks, half of the features, 8 of 133 classes",
    ),
}


class MakeCase:
    """A transform that makes a synthetic case: noise, smooth in part, the same each time.

    Args:
        shape: of the image, channels first.
        further: entries beside it.
        is_tensor: whether to return the image alone.
    """

    def __init__(self, shape: list[int], further: Mapping[str, Any], is_tensor: bool = False) -> None:
        self.shape = tuple(shape)
        self.further = dict(further)
        self.is_tensor = is_tensor

    def __call__(self, item: Mapping[str, Any]) -> Any:
        """Return the case of an item of the data list."""
        generator = torch.Generator().manual_seed(0)
        image = MetaTensor(torch.randn(self.shape, generator=generator, dtype=torch.float64))
        return image if self.is_tensor else {**item, **self.further, "image": image}


def attach_check(engine: Engine, explainer: Explainer, file: str) -> None:
    """Let an engine hold each map against a finite difference, and write what comes of it to a file.

    Args:
        engine: the bundle's evaluator.
        explainer: which explains it.
        file: gets a JSON object.
    """
    register_events(engine)
    engine.add_event_handler(AttributionEvents.ATTRIBUTION_COMPLETED, _check, explainer, Path(file))


def _check(engine: Engine, explainer: Explainer, file: Path) -> None:
    explained = engine.state.explained
    (explanation,) = explained.explanations.values()
    inferer = getattr(engine.inferer, "replay", None) or engine.inferer
    target = explainer.target
    image = explained.inputs["image"].as_tensor().double()
    attribution = explanation.attributions["image"].as_tensor().double()

    def output(x: Tensor) -> Tensor:
        with undisturbed(engine.network), torch.no_grad():
            return target.pick(inferer(x, engine.network))

    selection = target.select(output(image), None)
    direction, expected = _along(attribution)

    def score(step: float) -> float:
        return float(target.score(output(image + step * direction), *selection))

    traced = image.clone().requires_grad_()
    with undisturbed(engine.network):
        target.score(target.pick(inferer(traced, engine.network)), *selection).sum().backward()
    assert traced.grad is not None
    largest = max(float(traced.grad.abs().max()), 1e-300)
    slopes = {step: (score(step) - score(-step)) / (2 * step) for step in STEPS}
    step, slope = min(slopes.items(), key=lambda found: abs(found[1] - expected))
    found = {
        "dtype": str(next(engine.network.parameters()).dtype),
        "shape": list(attribution.shape),
        "score": float(explanation.score[0]),
        "autograd": float((attribution - traced.grad).abs().max()) / largest,
        "slope": slope,
        "slopes": slopes,
        "step": step,
        "map": expected,
        "difference": abs(slope - expected) / max(abs(slope), abs(expected), 1e-300),
        "nonzero": float((attribution != 0).double().mean()),
        "seconds": explanation.seconds,
        "target": explanation.target,
    }
    file.write_text(json.dumps(found))


def _along(attribution: Tensor) -> tuple[Tensor, float]:
    """Return the first of random directions along which a map predicts no slope that is tiny by chance, and the slope.

    Of a direction at right angles to the gradient, kinks and rounding make up the slope.
    """
    generator = torch.Generator().manual_seed(1)
    while True:
        direction = torch.randn(attribution.shape, generator=generator, dtype=torch.float64)
        slope = float((attribution * direction).sum())
        if not abs(slope) < LEAST * float(attribution.norm()):  # nor where the map is NaN
            return direction, slope


def run_bundle(bundle: Path, file: Path) -> dict[str, Any]:
    """Explain one bundle, and return what came of it: status, reason, target, and the check of the map."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    vars(np).setdefault("product", np.prod)  # valve_landmarks is written for NumPy 1
    change = CHANGES.get(bundle.name, Change())
    start = time.perf_counter()
    try:
        BundleRequest(bundle, random_weights=True).build()
        refused = ""
    except UnsupportedBundleError as error:
        refused = str(error)
        if change.target is None:
            return {"status": "refused", "reason": refused}
    result: dict[str, Any] = {"note": change.note, "refused_without_target": refused}
    try:
        return {**result, **_explain(bundle, change, change.target, file)}
    except Exception as error:
        reason = _reason(error)
        if "region is empty" not in reason:
            return {**result, "status": "failed", "reason": reason, "trace": traceback.format_exc()[-4000:]}
    finally:
        result["seconds"] = time.perf_counter() - start
    box = {"_target_": "monai_xai.Box", "start": [16] * _dims(bundle), "end": [24] * _dims(bundle)}
    if bundle.name == "ventricular_short_axis_3label":
        box = {**box, "start": [16, 16, 0], "end": [24, 24, 2]}
    asked = BundleRequest(bundle, random_weights=True).build().config["explain_target"]
    asked = {**asked, "region": box}
    try:
        return {**result, **_explain(bundle, change, asked, file), "box": True}
    except Exception as error:
        return {
            **result,
            "status": "failed",
            "reason": _reason(error),
            "trace": traceback.format_exc()[-4000:],
        }


def _explain(bundle: Path, change: Change, target: Any, file: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as output:
        check = {"_target_": "benchmarks.zoo.attach_check", "engine": "@evaluator", "explainer": "@explainer"}
        request = BundleRequest(
            bundle,
            cases=[0],
            target=target,
            method="Saliency",
            output=output,
            random_weights=True,
            settings={
                **change.settings,
                "explainer::progress": False,
                "explain_saver::transform": None,
                "+initialize": [{**check, "file": str(file)}],
            },
        )
        run = request.build()
        _stand_in(run, bundle, change)
        start = time.perf_counter()
        run.run()
        found = json.loads(file.read_text())
        saved = [str(path.name) for path in Path(output, "explanations").glob("sub-*/*.nii.gz")]
    is_right = found["difference"] <= TOLERANCE and found["nonzero"] > 0
    return {
        "status": "checked" if is_right else "wrong",
        **found,
        "saved": len(saved),
        "run": time.perf_counter() - start,
    }


def _stand_in(run: BundleRun, bundle: Path, change: Change) -> None:
    """Put one synthetic case in the place of data, and nothing in that of post-processing, savers and metrics."""
    config = run.config
    for name, option in change.without.items():
        config[name].pop(option)
    case = {
        "_target_": "benchmarks.zoo.MakeCase",
        "shape": _shape(bundle, change),
        "further": dict(change.item),
        "is_tensor": change.is_tensor,
    }
    data = {"_target_": "Dataset", "data": [{"case_id": "synthetic"}], "transform": case}
    evaluator = config["evaluator"]
    evaluator["val_data_loader"] = {"_target_": "monai.data.DataLoader", "dataset": data, "batch_size": 1}
    for name in ("postprocessing", "key_val_metric", "additional_metrics", "val_handlers"):
        evaluator.pop(name, None)
    config.pop("finalize", None)  # closes the data list
    network = config.get("network", "$@network_def.to(@device)")
    config["network"] = f"{network}.double()"


def _shape(bundle: Path, change: Change) -> list[int]:
    image = _image_format(bundle)
    given = [n if isinstance(n, int) else int(n) if n.isdigit() else 0 for n in image["spatial_shape"]]
    size = change.size or ((40, 32, 32) if len(given) == 3 else tuple(given))
    return [int(image["num_channels"]), *size]


def _dims(bundle: Path) -> int:
    return len(_image_format(bundle)["spatial_shape"])


def _image_format(bundle: Path) -> Mapping[str, Any]:
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    inputs = metadata["network_data_format"]["inputs"]
    return next(iter(inputs.values()))


def _reason(error: BaseException) -> str:
    """Return the first cause of an error, with its type."""
    if isinstance(error, XaiError):
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def run_apart(bundle: Path, file: Path, seconds: float) -> dict[str, Any]:
    """Explain one bundle in a process of its own, which starts with everything imported, and return what came of it."""
    scratch = file.with_suffix(".partial")
    scratch.touch()
    process = multiprocessing.get_context("fork").Process(target=run_and_write, args=(bundle, scratch))
    process.start()
    process.join(seconds)
    late = process.is_alive()
    if late:
        process.kill()
        process.join()
    text = scratch.read_text()
    scratch.unlink()
    if text:
        return dict(json.loads(text))
    reason = f"the process ended with {process.exitcode}"
    if process.exitcode == -signal.SIGKILL:
        reason = (
            f"not finished within {seconds:.0f} s" if late else "killed by the system, as when memory is full"
        )
    return {"status": "failed", "reason": reason}


def _is_at_work(scratch: Path, seconds: float) -> bool:
    """Tell whether a run beside this one is at a bundle, or was killed in it."""
    return scratch.exists() and time.time() - scratch.stat().st_mtime < seconds


def run_and_write(bundle: Path, file: Path) -> None:
    """Explain one bundle, and write what came of it to a file."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        result = run_bundle(bundle, Path(folder, "check.json"))
    file.write_text(json.dumps(result))


def network_of(bundle: Path) -> str:
    """Return the class of a bundle's network."""
    files = [f for f in (bundle / "configs").glob("inference.*") if f.suffix in (".json", ".yaml", ".yml")]
    if not files:
        return ""
    definition = ConfigParser.load_config_file(files[0]).get("network_def", "")
    name = definition.get("_target_", "") if isinstance(definition, dict) else str(definition).split("(")[0]
    return str(name).split(".")[-1]


def table(results: Mapping[str, Mapping[str, Any]], zoo: Path) -> list[str]:
    """Return the page's table, one row for each bundle."""
    lines = [
        "| bundle | network | runs | map against finite difference | against autograd | what was changed, or why not |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in sorted(results.items()):
        status = result["status"]
        runs = {"checked": "yes", "wrong": "yes", "refused": "refused"}.get(status, "no")
        checked = f"{result['difference']:.0e}" if "difference" in result else "-"
        checked = f"**wrong**: {checked}" if status == "wrong" else checked
        traced = f"{result['autograd']:.0e}" if "autograd" in result else "-"
        words = [result.get("note", ""), result.get("reason", "")]
        words += ["no voxel of class 1 predicted: asked about a box"] if result.get("box") else []
        words += ["refused without --target"] if result.get("refused_without_target") else []
        said = "; ".join(filter(None, words)).replace("|", "/")
        lines.append(
            f"| {name} | {network_of(zoo / 'models' / name)} | {runs} | {checked} | {traced} | {said} |"
        )
    return lines


def write_page(results: Mapping[str, Mapping[str, Any]], zoo: Path, page: Path) -> None:
    """Write the page with the table."""
    commit = subprocess.run(
        ["git", "-C", str(zoo), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    counts = {
        status: sum(r["status"] == status for r in results.values()) for status in ("checked", "refused")
    }
    others = len(results) - sum(counts.values())
    page.write_text(
        _PAGE.format(
            commit=commit.stdout.strip(),
            total=len(results),
            checked=counts["checked"],
            refused=counts["refused"],
            others=others,
            tolerance=TOLERANCE,
            steps=", ".join(f"{step:g}" for step in STEPS),
            table="\n".join(table(results, zoo)),
        ),
        encoding="utf-8",
    )


_PAGE = """# Every bundle of the Model Zoo

Written by `python -m benchmarks.zoo CHECKOUT` from a checkout of
[Project-MONAI/model-zoo](https://github.com/Project-MONAI/model-zoo) at {commit}. Of {total} bundles, {checked} are
explained and their maps checked, {refused} are refused with the reason, {others} are neither.

Each run is the one that `python -m monai_xai explain --bundle DIR --random_weights --method Saliency` builds from the
bundle's own inference config: its evaluator, inferer, network and `prepare_batch` as they are. In the place of its own
are one synthetic case of noise, no post-processing, no savers and no metrics, random weights in float64, and what the
last column says. The map is held against the central difference of the score along a random direction (the first
along which the slope is not tiny by chance), through the engine's own call of its inferer, with the best of the steps
{steps}; it is right up to a relative difference of {tolerance:g}: random networks have so many kinks that smaller steps
than these drown in rounding before they clear them. Beside it is the largest difference to autograd through the same
call, relative to the largest value of the map. What is explained here knows nothing: the table is about configs and
gradients, not about findings.

{table}
"""


def main() -> None:
    """Run one bundle (in a process of its own) or all of them, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoo", type=Path, help="checkout of the Model Zoo")
    parser.add_argument("--bundle", help="run this bundle alone")
    parser.add_argument("--result", type=Path, help="write its result here")
    parser.add_argument(
        "--results", type=Path, default=Path("zoo_results"), help="folder of results that are kept"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/model_zoo.md"))
    parser.add_argument(
        "--reversed", action="store_true", help="begin with the last: a second run beside the first"
    )
    parser.add_argument("--table", action="store_true", help="run nothing: write the page from what was kept")
    parser.add_argument("--seconds", type=float, default=600.0, help="time limit of a bundle")
    options = parser.parse_args()
    zoo = options.zoo.resolve()
    if options.bundle and options.result:
        run_and_write(zoo / "models" / options.bundle, options.result)
        return
    options.results.mkdir(exist_ok=True)
    names = [folder.name for folder in sorted((zoo / "models").iterdir()) if folder.is_dir()]
    results = {}
    chosen = [options.bundle] if options.bundle else names[::-1] if options.reversed else names
    for name in chosen:
        file = options.results.resolve() / f"{name}.json"
        if not options.table and _is_at_work(file.with_suffix(".partial"), options.seconds):
            continue
        if options.table and not file.is_file():
            results[name] = {"status": "missing", "reason": "not run yet"}
            continue
        if not file.is_file():
            file.write_text(json.dumps(run_apart(zoo / "models" / name, file, options.seconds), indent=1))
        results[name] = json.loads(file.read_text())
        print(name, {k: v for k, v in results[name].items() if k != "trace"}, flush=True)
    if set(results) == set(names):
        write_page(results, zoo, options.page)


if __name__ == "__main__":
    main()
