"""The command line: ``python -m monai_xai`` (or ``monai_xai``)."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fire
import torch
from monai.bundle import ConfigParser

from monai_xai import attributors, overlays
from monai_xai.bundle_runs import BundleRequest
from monai_xai.errors import InputError, XaiError
from monai_xai.networks import choose_layer, list_layers

_FACTS = ("complete", "summable", "needs_layer", "stochastic", "by_hooks", "by_window")


def methods() -> str:
    """List the methods, with the facts that decide which to take.

    complete: the maps add up to score minus baseline score, and the gap is always reported.
    summable: values are contributions in units of the score and may be added up over voxels.
    needs_layer: looks at one layer, chosen automatically if not named.
    stochastic: draws random numbers from a seed.
    by_hooks: through sliding windows it needs a target linear in the output, such as RegionScore.
    by_window: each window gives its part by itself, so that processes may share them (Explainer(spread=True)).
    """
    found = [getattr(attributors, name) for name in attributors.__all__]
    rows = [("method", *_FACTS, "what it gives")]
    for method in (m for m in found if issubclass(m, attributors.Attributor) and not inspect.isabstract(m)):
        summary = " ".join((inspect.getdoc(method) or "").split("\n\n")[0].split())
        rows.append((method.__name__, *("yes" if getattr(method, fact) else "-" for fact in _FACTS), summary))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def overlay(name: str = "explain", path: bool = False) -> str:
    """Print a shipped config overlay, to be edited, or where it is.

        python -m monai_xai overlay explain > xai.yaml
        python -m monai_xai explain --bundle DIR --overlay xai.yaml

    An overlay adds explanations to a bundle without an edit to it, also under MONAI's own command line:

        python -m monai.bundle run --config_file "['configs/inference.json','$(monai_xai overlay inference --path)']"

    Args:
        name: "explain", a run that can be interrupted; "inference", which saves maps through the bundle's own
            post-processing; "modalities", what each sequence or image gives; "grounding", a verdict; "comparison", of
            methods; "processes", behind one of these, for several processes; "train" for training and evaluation
            where the validation is validate::evaluator; "flat" where it is plain evaluator.
        path: print where it is instead.
    """
    file = overlays.path(name)
    return str(file) if path else file.read_text(encoding="utf-8").rstrip()


def explain(
    bundle: str,
    case: Any = 0,
    target: Any = None,
    method: Any = None,
    output: str | None = None,
    *,
    head: str | int | None = None,
    image: Any = (),
    config: Any = "",
    overlay: str = "explain",
    random_weights: bool = False,
    max_seconds: float | None = None,
    autocast: str | None = None,
    anonymize: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    **settings: Any,
) -> str:
    """Explain what a bundle's network finds. The bundle is not edited; an interrupted run goes on when started again.

    The first case, by Integrated Gradients of the mean score where the first class is predicted:

        python -m monai_xai explain --bundle spleen_ct_segmentation

    What would be run, without running it:

        python -m monai_xai explain --bundle spleen_ct_segmentation --dry_run

    Your own scan, another class by number or name, another method, with its options as in Python or as in a config:

        python -m monai_xai explain --bundle DIR --image scan.nii.gz --target 2 --output out
        python -m monai_xai explain --bundle DIR --target "peripheral zone" --method "IntegratedGradients(n_steps=16)"
        python -m monai_xai explain --bundle DIR --method "{_target_: Occlusion, window: [1, 16, 16, 16]}"
        python -m monai_xai explain --bundle DIR --target "RegionScore(channel=1, region=Box(start=[20, 30, 40],
            end=[40, 50, 60]))"

    All cases, or some by number or name; and whatever else the bundle's config or the overlay has, by its id:

        python -m monai_xai explain --bundle DIR --case all --dataset_dir /data/Task09_Spleen
        python -m monai_xai explain --bundle DIR --case spleen_10,spleen_13 --explain_board::cases 2

    In the output folder are explanations/ (maps in the space of the scan, what each of them is, index.csv),
    attribution/ (for `tensorboard --logdir`), explain.yaml (the config that was run) and what the bundle itself
    saves. A bundle's config is code: run those that you trust.

    Args:
        bundle: its folder, with configs/inference or configs/evaluate, JSON or YAML.
        case: number or name of a case, several with commas between, or "all".
        target: number or name of a channel or class; or a target such as "ClassScore(class_index=1)". Default: what
            fits the network's output, as the bundle's metadata and post-processing tell it.
        method: a name that `python -m monai_xai methods` lists, with or without options.
        output: output folder; default is the bundle's own.
        head: key or index of the part of the network's output that is meant, where it gives several.
        image: a file that takes the place of the bundle's data; with commas between, the channels of one case.
        config: another config of the bundle, by name or file.
        overlay: name or file of the overlay that is merged over it.
        random_weights: load no weights, to try things out. What is explained then knows nothing.
        max_seconds: for one case; a method that can end early gives the best it has by then, with its error.
        autocast: "bfloat16" or "float16" for the network; where attributions do not add up, float32 after all.
        anonymize: no name of a case or file in results; needs a secret in the environment variable XAI_SALT.
        overwrite: remove results of other settings from the output folder.
        dry_run: print the merged config as YAML, and run nothing.
        settings: values by their id in the merged config, as under `python -m monai.bundle run`; one that nothing
            reads is refused.
    """
    if anonymize:
        if not os.environ.get("XAI_SALT"):
            raise InputError(
                "--anonymize needs a secret that names are hidden under: set XAI_SALT, keep it apart."
            )
        settings = {"explain_saver::anonymize": True, "explain_saver::salt": _SALT, **settings}
    if max_seconds is not None:
        settings = {"explainer::max_seconds": max_seconds, **settings}
    if autocast is not None:
        settings = {"explainer::autocast": autocast, **settings}
    if overwrite:
        settings = {"explain_saver::overwrite": True, **settings}
    request = BundleRequest(
        bundle, overlay, _joined(config), _cases(case), _files(image), target, head, method, output,
        random_weights, settings,
    )  # fmt: skip
    return _run_or_show(request, dry_run)


def _over_cases(overlay: str, about: str, cases: str) -> Callable[..., str]:
    """Return a command that runs a bundle with an overlay over its cases.

    Args:
        overlay: its name.
        about: what it is for, with an example.
        cases: which cases are the default.
    """

    def command(
        bundle: str,
        case: Any = None,
        target: Any = None,
        output: str | None = None,
        *,
        config: Any = "",
        random_weights: bool = False,
        dry_run: bool = False,
        **settings: Any,
    ) -> str:
        request = BundleRequest(
            bundle,
            overlay,
            _joined(config),
            _cases(case),
            target=target,
            output=output,
            random_weights=random_weights,
            settings=settings,
        )
        return _run_or_show(request, dry_run)

    command.__doc__ = f"""{about}

    Args:
        bundle: its folder.
        case: number or name of a case, several with commas between; default is {cases}.
        target: as for explain.
        output: output folder; default is the bundle's own.
        config: another config of the bundle, by name or file.
        random_weights: load no weights, to try things out.
        dry_run: print the merged config as YAML, and run nothing.
        settings: values by their id in the merged config.
    """
    return command


modalities = _over_cases(
    "modalities",
    """Say what each sequence or image gives to a bundle's predictions, alone and together with the others.

        python -m monai_xai modalities --bundle brats_mri_segmentation --case 0,1,2

    Every coalition of channels is kept while the rest goes to a baseline. Tables are in modalities/ of the output
    folder.""",
    "all",
)
compare_methods = _over_cases(
    "comparison",
    """Compare methods on a bundle: which explains its network best, by what measure, and at what cost.

        python -m monai_xai compare --bundle spleen_ct_segmentation --config evaluate

    Tables are in comparison/ of the output folder. Location is judged where cases have a mask as their label. For large
    volumes --comparison_criteria "{_target_: monai_xai.comparison.quick_criteria}" is about half of the work.""",
    "as many as the overlay says",
)
judge = _over_cases(
    "grounding",
    """Judge whether what a bundle's network looks at is grounded, or a picture.

        python -m monai_xai ground --bundle spleen_ct_segmentation --config evaluate

    The report is in grounding/ of the output folder. A verdict needs 20 cases.""",
    "as many as the overlay says",
)


def _run_or_show(request: BundleRequest, dry_run: bool) -> str:
    run = request.build()
    return run.as_yaml().rstrip() if dry_run else f"Done: {run.run()}"


_SALT = "$__import__('os').environ['XAI_SALT']"


def _cases(value: Any) -> list[int | str] | None:
    """Return cases as they were typed; all of them is an empty list."""
    if value is None:
        return None
    values = (
        value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    )
    return [] if value == "all" else [v if isinstance(v, int) else _number(str(v).strip()) for v in values]


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _files(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if Path(value).exists() else value.split(",")
    return [str(file) for file in value]


def _joined(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(map(str, value))


def layers(config: str, *shapes: Sequence[int], network: str = "network_def") -> str:
    """List the layers of a bundle's network with the shapes of what they give, and the one that CAMs take by default.

        monai_xai layers configs/inference.yaml 4,64,64,64

    Args:
        config: a config file of the bundle, JSON or YAML, or the network part of one. Run in the bundle's folder.
        shapes: channels and size of an input, without the batch; of several inputs, one each.
        network: id of the network in the config.
    """
    if not shapes:
        raise InputError("Give the shape of each input without the batch, such as 4,64,64,64.")
    parser = ConfigParser()
    parser.read_config(config)
    sys.path.insert(0, str(Path.cwd()))  # where a bundle's own code lies
    built = parser.get_parsed_content(network).eval()

    def call() -> object:
        return built(*(torch.zeros(1, *shape) for shape in shapes))

    chosen = choose_layer(built, call)
    rows = [(name, kind, " x ".join(map(str, shape))) for name, kind, shape in list_layers(built, call)]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(
        f"{'*' if row[0] == chosen else ' '} {row[0].ljust(widths[0])}  {row[1].ljust(widths[1])}  {row[2]}"
        for row in rows
    )


_COMMANDS = {
    "explain": explain,
    "modalities": modalities,
    "compare": compare_methods,
    "ground": judge,
    "methods": methods,
    "layers": layers,
    "overlay": overlay,
}


def main() -> None:
    """Run the command line; an error that says what to do comes without a traceback, also through those of hosts."""
    words = sys.argv[1:]
    if "--help" in words:  # fire would take it for one of the settings
        words = [*(word for word in words if word not in ("--help", "--")), "--", "--help"]
    try:
        fire.Fire(_COMMANDS, command=words, name="monai_xai")
    except KeyboardInterrupt:
        goes_on = words[:1] == ["explain"] and not any(word.startswith("--overlay") for word in words)
        kept = " Cases that are explained are kept: the same command goes on." if goes_on else ""
        sys.stderr.write(f"Interrupted.{kept}\n")
        sys.exit(130)
    except Exception as error:
        told: BaseException | None = error
        while told is not None and not isinstance(told, XaiError):
            told = told.__cause__
        if told is None:
            raise
        sys.exit(f"{type(told).__name__}: {told}")


if __name__ == "__main__":
    main()
