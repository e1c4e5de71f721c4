"""TensorBoard: pictures and curves of what a network looks at while it learns."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Literal

import numpy as np
from ignite.engine import Engine
from matplotlib.figure import Figure
from monai.data import MetaTensor
from monai.handlers import TensorBoardHandler
from numpy.typing import NDArray
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.image.metadata import create_summary_metadata
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from monai_xai.cohorts import ModalityCohort
from monai_xai.errors import InputError
from monai_xai.explanation import ROUNDING_SHARE, Explanation
from monai_xai.figures import (
    Scene,
    Step,
    animate,
    draw_bars,
    draw_cohort,
    draw_interactions,
    draw_montage,
    draw_planes,
    draw_waterfall,
    encode_png,
    rasterize,
)
from monai_xai.grids import affine_of
from monai_xai.handlers import AttributionEvents, ExplainedCase, register_events
from monai_xai.modalities import ModalityExplanation
from monai_xai.ranks import rank

logger = logging.getLogger(__name__)
RGB = 3
_MOST_PARTS = 24  # more cannot be read in one waterfall


class TensorBoardAttributionHandler(TensorBoardHandler):
    """Draw what an :class:`~monai_xai.AttributionHandler` has explained, and compute nothing.

    Both are attached to the same engine, in any order. The image page gets, per explainer, case and input (images of
    two or three dimensions, and vectors),

    - ``<explainer>/<case>/<input>/planes``: orthogonal planes through the strongest attribution, outlines of
      prediction and label, one color scale centered on zero for all modalities of the input;
    - ``.../montage``: slices of the part of the volume that carries the attribution;
    - ``.../animation``: a walk through the volume from its strongest slice on, as a color GIF;
    - ``.../features``: a bar per feature, for a vector instead of the three above;
    - ``<explainer>/<case>/modalities``: a bar per modality, where values may be added up;
    - of a :class:`~monai_xai.ModalityShapley`, per baseline ``<explainer>/<case>/<baseline>/waterfall`` (from the score
      of the baseline to that of the case, clinical variables with raw value, unit and reference range) and
      ``.../interactions``; and over all cases of an epoch ``<explainer>/cohort/<baseline>/values``.

    The scalar page gets ``attribution/<explainer>/<case>/...``: ``score``, ``baseline_score``, ``delta``, ``seconds``,
    and per modality ``contribution/<modality>`` (signed, in units of the score) and ``share/<modality>`` (of the sum
    of absolute contributions). The page "custom scalars" has all modalities of a case in one chart. Steps are epochs.

    Args:
        log_dir: where the event file is written, if there is no ``summary_writer``.
        summary_writer: a writer to share with other handlers; who made it closes it.
        montage_slices: slices of the montage; 0 leaves it out.
        animation_frames: the most frames of the animation; 0 leaves it out. It is the largest of the pictures: about
            1 MB for a whole head at 1 mm in four modalities.
        multilabel: whether classes may overlap, as in BraTS. Then the prediction is outlined where any channel is
            above 0; else where another channel than 0, the background, is largest (of a single channel: above 0).
        cases: how many cases of an epoch are drawn, the first ones of each explainer; None draws all. Scalars are
            written for all.
        on_error: "log" keeps the loop alive and counts what failed in ``failures``; "raise" hands the error on
            to the :class:`~monai_xai.AttributionHandler`, which does with it what its own ``on_error`` says.
    """

    def __init__(
        self,
        log_dir: str = "./runs",
        summary_writer: SummaryWriter | None = None,
        *,
        montage_slices: int = 8,
        animation_frames: int = 32,
        multilabel: bool = False,
        cases: int | None = None,
        on_error: Literal["log", "raise"] = "log",
    ) -> None:
        if on_error not in ("log", "raise"):
            raise InputError(
                f"TensorBoardAttributionHandler(on_error={on_error!r}): choose 'log' or 'raise'."
            )
        if summary_writer is not None and not isinstance(summary_writer, SummaryWriter):
            raise TypeError(
                "TensorBoardAttributionHandler needs a torch.utils.tensorboard.SummaryWriter, which can hold a color "
                f"animation, got {type(summary_writer).__module__}.{type(summary_writer).__name__}."
            )
        if summary_writer is None and rank() > 0:
            summary_writer = _NoWriter()
        super().__init__(summary_writer=summary_writer, log_dir=log_dir)
        self.montage_slices = montage_slices
        self.animation_frames = animation_frames
        self.multilabel = multilabel
        self.cases = cases
        self._drawn: dict[tuple[str, int], int] = {}
        self.on_error = on_error
        self.failures = 0
        self._charts: dict[str, dict[str, list[Any]]] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to the engine that is explained; a second time does nothing."""
        register_events(engine)
        if not engine.has_event_handler(self, AttributionEvents.ATTRIBUTION_COMPLETED):
            engine.add_event_handler(AttributionEvents.ATTRIBUTION_COMPLETED, self)
            engine.add_event_handler(AttributionEvents.COHORT_COMPLETED, self.draw_cohorts)

    def __call__(self, engine: Engine) -> None:
        """Draw the case in ``engine.state.explained``."""
        explained: ExplainedCase = engine.state.explained
        for explainer, explanation in explained.explanations.items():
            with self._guard(f"{explainer} of case {explained.name}, epoch {explained.epoch}"):
                if isinstance(explanation, ModalityExplanation):
                    self._draw_modalities(explained, explainer, explanation)
                else:
                    self._draw(explained, explainer, explanation)
                self._writer.flush()

    def draw_cohorts(self, engine: Engine) -> None:
        """Draw the cohorts in ``engine.state.cohorts``."""
        epoch = engine.state.epoch
        for explainer, cohort in engine.state.cohorts.items():
            with self._guard(f"the cohort of {explainer}, epoch {epoch}"):
                for name, value in scalars_of_cohort(cohort):
                    self._writer.add_scalar(f"cohort/{clean_tag(explainer)}/{name}", value, epoch)
                for name, figure in figures_of_cohort(cohort, f"{explainer}{_epoch(epoch)}"):
                    self._add_picture(f"{clean_tag(explainer)}/cohort/{name}", figure, epoch)
                self._writer.flush()

    def _draw_modalities(
        self, explained: ExplainedCase, explainer: str, explanation: ModalityExplanation
    ) -> None:
        tag = f"{clean_tag(explainer)}/{clean_tag(explained.name)}"
        for name, value in scalars_of_modalities(explanation):
            self._writer.add_scalar(f"attribution/{tag}/{name}", value, explained.epoch)
        if not self._is_drawn(explainer, explained.epoch):
            return
        for name, figure in figures_of_modalities(explanation, _title(explained, explainer, "modalities")):
            self._add_picture(f"{tag}/{name}", figure, explained.epoch)

    def _is_drawn(self, explainer: str, epoch: int) -> bool:
        """Count a case of an epoch, and tell whether it is to be drawn."""
        count = self._drawn[explainer, epoch] = self._drawn.get((explainer, epoch), 0) + 1
        return self.cases is None or count <= self.cases

    def _add_picture(self, tag: str, figure: Figure, epoch: int) -> None:
        summary = image_summary(tag, encode_png(rasterize(figure)), "")
        self._writer._get_file_writer().add_summary(summary, epoch)

    def _draw(self, explained: ExplainedCase, explainer: str, explanation: Explanation) -> None:
        epoch = explained.epoch
        tag = f"{clean_tag(explainer)}/{clean_tag(explained.name)}"
        contributions = contributions_of(explanation)
        for name, value in scalars_of(explanation, contributions):
            self._writer.add_scalar(f"attribution/{tag}/{name}", value, epoch)
        self._add_charts(tag, list(contributions))
        if not self._is_drawn(explainer, epoch):
            return
        for name, encoded in self._pictures(explained, explainer, explanation, contributions):
            about = "\n\n".join(about_lines(explained, explainer))
            self._writer._get_file_writer().add_summary(image_summary(f"{tag}/{name}", encoded, about), epoch)

    def _pictures(
        self,
        explained: ExplainedCase,
        explainer: str,
        explanation: Explanation,
        contributions: dict[str, float],
    ) -> Iterator[tuple[str, bytes]]:
        """Yield the end of the tag and the encoded picture of everything there is to draw."""
        if contributions:
            figure = draw_bars(
                np.array(list(contributions.values())),
                list(contributions),
                title=_title(explained, explainer, "modalities"),
                about=about_lines(explained, explainer),
                notes=_balance(explanation, contributions),
                unit=_unit(explanation),
            )
            yield "modalities", encode_png(rasterize(figure))
        for name, values in explanation.attributions.items():
            if values.ndim == 2:
                yield f"{clean_tag(name)}/features", _draw_features(explained, explainer, explanation, name)
            elif values.ndim in (4, 5):
                scene = scene_of(explained, explainer, name, multilabel=self.multilabel)
                yield from ((f"{clean_tag(name)}/{kind}", picture) for kind, picture in self._views(scene))

    def _views(self, scene: Scene) -> Iterator[tuple[str, bytes]]:
        yield "planes", encode_png(rasterize(draw_planes(scene)))
        if scene.is_volume and self.montage_slices:
            yield "montage", encode_png(rasterize(draw_montage(scene, self.montage_slices)))
        if scene.is_volume and self.animation_frames:
            yield "animation", animate(scene, self.animation_frames).encode()

    def _add_charts(self, tag: str, modalities: Sequence[str]) -> None:
        """Put the curves of all modalities of a case into one chart; TensorBoard reads the last layout written."""
        explainer, case = tag.split("/")
        if not modalities or f"{case}: contribution" in self._charts.get(explainer, {}):
            return
        charts = self._charts.setdefault(explainer, {})
        for kind in ("contribution", "share"):
            tags = [re.escape(f"attribution/{tag}/{kind}/{clean_tag(name)}") for name in modalities]
            charts[f"{case}: {kind}"] = ["Multiline", [f"^{pattern}$" for pattern in tags]]
        self._writer.add_custom_scalars(self._charts)

    @contextmanager
    def _guard(self, where: str) -> Iterator[None]:
        """Log and count what cannot be drawn or written, unless it is to end the loop."""
        try:
            yield
        except Exception as error:
            if self.on_error == "raise":
                raise
            self.failures += 1
            logger.warning("Not drawn: %s (failure %d): %s", where, self.failures, error, exc_info=error)


class _NoWriter(SummaryWriter):
    """A writer without a file, for all processes but the first one."""

    def __init__(self) -> None:
        self.file_writer = self.all_writers = None


def contributions_of(explanation: Explanation) -> dict[str, float]:
    """Return the signed contribution of each modality, in units of the score.

    A modality is a channel of an image or a whole vector. Empty where values must not be added up.
    """
    if not explanation.summable:
        return {}
    found: dict[str, float] = {}
    for name, values in explanation.contributions().items():
        sums = _array(values).astype(float)
        if explanation.attributions[name].ndim == 2:
            found[name] = float(sums.sum())
        else:
            found |= dict(zip(_modality_names(explanation, name), sums.tolist(), strict=True))
    return found


def scalars_of(explanation: Explanation, contributions: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Yield name and value of every curve."""
    for name in ("score", "baseline_score", "delta"):
        values: Tensor | None = getattr(explanation, name)
        if values is not None:
            yield name, float(values[0])
    yield "seconds", explanation.seconds
    total = sum(map(abs, contributions.values()))
    for name, value in contributions.items():
        yield f"contribution/{clean_tag(name)}", value
        if total:
            yield f"share/{clean_tag(name)}", abs(value) / total


def scalars_of_modalities(explanation: ModalityExplanation) -> Iterator[tuple[str, float]]:
    """Yield name and value of every curve of modalities."""
    yield "score", float(explanation.score[0])
    yield "agreement", float(explanation.agreement[0])
    yield "seconds", explanation.seconds
    for baseline in explanation.baselines:
        shares = explanation.shares(baseline)[0].tolist()
        for m, modality in enumerate(explanation.modalities):
            end = f"{clean_tag(baseline)}/{clean_tag(modality)}"
            yield f"value/{end}", float(explanation.values[baseline][0, m])
            yield f"share/{end}", shares[m]


def figures_of_modalities(explanation: ModalityExplanation, title: str) -> Iterator[tuple[str, Figure]]:
    """Yield the waterfall and the interactions under every baseline."""
    for baseline in explanation.baselines:
        about = (
            f"target  {explanation.target}",
            f"baseline  {baseline}   agreement of baselines {float(explanation.agreement[0]):.2f}   "
            f"residual {float(explanation.residual(baseline)[0]):.1g}   {explanation.seconds:.3g} s",
        )
        start, end = float(explanation.baseline_scores[baseline][0]), float(explanation.score[0])
        yield (
            f"{clean_tag(baseline)}/waterfall",
            draw_waterfall(
                waterfall_steps(explanation, baseline),
                start,
                end,
                title=title,
                about=about,
                notes=_interaction_notes(explanation, baseline),
                unit=explanation.unit or "score",
            ),
        )
        if explanation.interactions is not None and len(explanation.modalities) > 1:
            values, pairs = (_array(v[baseline]) for v in (explanation.values, explanation.interactions))
            yield (
                f"{clean_tag(baseline)}/interactions",
                draw_interactions(values, pairs, explanation.modalities, title=title, about=about),
            )


def waterfall_steps(explanation: ModalityExplanation, baseline: str) -> list[Step]:
    """Return a step for each modality, followed by those of its parts if there are several."""
    steps: list[Step] = []
    errors = explanation.standard_errors[baseline][0].tolist()
    for m, modality in enumerate(explanation.modalities):
        steps.append(Step(modality, float(explanation.values[baseline][0, m]), errors[m]))
        parts = explanation.parts.get(baseline, {}).get(modality)
        if parts is None or not 1 < parts.shape[1] <= _MOST_PARTS:
            continue
        names = explanation.part_names[modality][0]
        steps += [Step(name, v, 0.0, True) for name, v in zip(names, parts[0].tolist(), strict=True)]
    return steps


def _interaction_notes(explanation: ModalityExplanation, baseline: str) -> list[str]:
    """Say which pair does most together: values and shares alone would hide it."""
    if explanation.interactions is None or len(explanation.modalities) < 2:
        return []
    pairs = explanation.interactions[baseline][0]
    if float(pairs.abs().max()) <= ROUNDING_SHARE * float(explanation.values[baseline].abs().max()):
        return ["no interaction: together, modalities do what they do alone"]
    i, j = divmod(int(pairs.abs().argmax()), len(explanation.modalities))
    kind = "synergy" if explanation.synergies(baseline)[0, i, j] > 0 else "redundancy"
    names = f"{explanation.modalities[i]} and {explanation.modalities[j]}"
    return [
        f"largest interaction: {names} {float(pairs[i, j]):+.3g} ({kind}); share of interactions (InterSHAP) "
        f"{float(explanation.intershap(baseline)[0]):.0%}"
    ]


def scalars_of_cohort(cohort: ModalityCohort) -> Iterator[tuple[str, float]]:
    """Yield mean and share of every modality, to be followed over epochs."""
    for row in cohort.rows():
        end = f"{clean_tag(row.baseline)}/{clean_tag(row.modality)}"
        yield f"mean/{end}", row.mean
        yield f"share/{end}", row.share


def figures_of_cohort(cohort: ModalityCohort, title: str) -> Iterator[tuple[str, Figure]]:
    """Yield the spread of values over cases, and mean interactions, under every baseline."""
    rows = cohort.rows()
    for baseline in cohort.baselines:
        own = [row for row in rows if row.baseline == baseline]
        notes = [
            f"{row.modality} has collapsed: share at most {row.share_high:.1%}"
            for row in own
            if row.collapsed
        ]
        about = [f"baseline  {baseline}   {len(cohort.cases)} cases, mean with 95 % interval"]
        intervals = np.array([(row.low, row.high) for row in own])
        figure = draw_cohort(
            cohort.values(baseline),
            cohort.modalities,
            intervals,
            title=title,
            about=about,
            notes=notes,
            **_cohort_unit(cohort),
        )
        yield f"{clean_tag(baseline)}/values", figure
        if cohort.interactions(baseline) is not None and len(cohort.modalities) > 1:
            yield f"{clean_tag(baseline)}/interactions", _draw_cohort_interactions(cohort, baseline, title)


def _cohort_unit(cohort: ModalityCohort) -> dict[str, str]:
    unit = next(iter(cohort.cases.values())).unit
    return {"unit": f"contribution in {unit}"} if unit else {}


def _draw_cohort_interactions(cohort: ModalityCohort, baseline: str, title: str) -> Figure:
    """Draw means over cases, each counted in its own direction: signed means cancel where scores go up and down."""
    pairs = cohort.synergies(baseline)
    assert pairs is not None
    return draw_interactions(
        cohort.along(baseline).mean(0),
        pairs.mean(0),
        cohort.modalities,
        title=title,
        about=[
            f"baseline  {baseline}   mean of {len(cohort.cases)} cases, each in the direction in which its score moves"
        ],
        note="diagonal: Shapley value; beside: interaction, red where two do more together than each alone (synergy), "
        "blue where less (redundancy)",
    )


def about_lines(explained: ExplainedCase, explainer: str) -> tuple[str, ...]:
    """Return what every picture says about its origin."""
    explanation = explained.explanations[explainer]
    assert isinstance(explanation, Explanation)
    numbers = [f"score {float(explanation.score[0]):.4g}"]
    if explanation.baseline_score is not None:
        numbers.append(f"baseline score {float(explanation.baseline_score[0]):.4g}")
    if explanation.delta is not None:
        gap = "" if explanation.gap is None else f" ({float(explanation.gap[0]):.1%})"
        numbers.append(f"delta {float(explanation.delta[0]):+.2g}{gap}")
    numbers.append(f"{explanation.seconds:.3g} s")
    numbers.extend([] if explanation.seed is None else [f"seed {explanation.seed}"])
    for name, value in explanation.facts.items():
        words = f"{value:.3g}" if isinstance(value, float) else value
        numbers.append(f"{name.replace('_', ' ')} {words}")
    prediction = explained.prediction_of(explainer)
    if prediction is not None and prediction.ndim == 2 and prediction.shape[1] > 1:
        numbers.append(f"largest output {int(prediction[0].argmax())} of {prediction.shape[1]}")
    return f"target  {explanation.target}", f"method  {explanation.method}", "   ".join(numbers)


def scene_of(explained: ExplainedCase, explainer: str, name: str, *, multilabel: bool) -> Scene:
    """Return what is to be seen of one image input."""
    explanation, image = explained.explanations[explainer], explained.inputs[name]
    assert isinstance(explanation, Explanation)
    maps = explanation.beyond_rounding()[name]
    outlines: dict[str, Any] = {
        kind: _outline(values, maps.shape[2:], multilabel)
        for kind, values in (
            ("prediction", explained.prediction_of(explainer)),
            ("label", explained.label_of(explainer)),
        )
    }
    return Scene(
        attribution=_array(maps),
        image=_array(image),
        title=_title(explained, explainer, name),
        about=about_lines(explained, explainer),
        channels=tuple(_channel_names(explanation, name, image.shape[1])),
        affine=affine_of(image),
        unit=_unit(explanation, "per voxel"),
        **outlines,
    )


def _draw_features(explained: ExplainedCase, explainer: str, explanation: Explanation, name: str) -> bytes:
    figure = draw_bars(
        _array(explanation.attributions[name]),
        _channel_names(explanation, name),
        title=_title(explained, explainer, name),
        about=about_lines(explained, explainer),
        unit=_unit(explanation),
        shares=explanation.summable,
    )
    return encode_png(rasterize(figure))


def _unit(explanation: Explanation, of: str = "") -> str:
    """Say what a value means."""
    if not explanation.summable:
        return "attribution"
    what = f"contribution in {explanation.unit}" if explanation.unit else "contribution to the score"
    return f"{what} {of}".strip()


def _title(explained: ExplainedCase, explainer: str, what: str) -> str:
    return f"{explained.name} · {what} · {explainer}{_epoch(explained.epoch)}"


def _epoch(number: int) -> str:
    """Name an epoch, but for the first: an evaluation without training has one as well."""
    return f" · epoch {number}" if number > 1 else ""


def _outline(values: Tensor | None, spatial: Sequence[int], multilabel: bool) -> NDArray[np.bool_] | None:
    """Return where prediction (logits) or label is foreground, shape (*spatial); None if it lies on another grid."""
    if values is None or tuple(values.shape[2:]) != tuple(spatial):
        return None
    channels = _array(values)
    if len(channels) == 1 or multilabel:
        return np.asarray((channels > 0).any(0))
    return np.asarray(channels.argmax(0) > 0)


def _channel_names(explanation: Explanation, name: str, count: int | None = None) -> list[str]:
    """Return the names of the channels or features of an input, made up where none were given."""
    count = explanation.attributions[name].shape[1] if count is None else count
    given = explanation.channels.get(name, ())
    if len(given) == count:
        return list(given)
    return [name] if count == 1 else [f"{name} {i}" for i in range(count)]


def _modality_names(explanation: Explanation, name: str) -> list[str]:
    """Return the names of the channels of an image, made unique among all inputs."""
    others = {n for other, names in explanation.channels.items() if other != name for n in names}
    others |= set(explanation.attributions) - {name}
    return [f"{name} {n}" if n in others else n for n in _channel_names(explanation, name)]


def _balance(explanation: Explanation, contributions: dict[str, float]) -> list[str]:
    """Return the sum that the bars belong to, for methods that promise one."""
    if explanation.delta is None or explanation.baseline_score is None:
        return []
    score, baseline, delta = (
        float(values[0]) for values in (explanation.score, explanation.baseline_score, explanation.delta)
    )
    total = sum(contributions.values())
    return [
        f"score {score:.4g} = baseline score {baseline:.4g} + contributions {total:.4g} - delta {delta:.2g}"
    ]


def _array(values: Tensor) -> NDArray[Any]:
    """Return the only row of a batch as numbers that NumPy knows (bfloat16 is none of them)."""
    plain = values.as_tensor() if isinstance(values, MetaTensor) else values
    return np.asarray(plain[0].detach().float().cpu().numpy())


def clean_tag(name: str) -> str:
    """Return a name that is one level of a tag."""
    return re.sub(r"[^-\w.]+", "_", name).strip("_") or "_"


def image_summary(tag: str, encoded: bytes, description: str) -> Summary:
    """Return an already encoded picture as a summary of TensorBoard's image page."""
    width, height = Image.open(BytesIO(encoded)).size
    image = Summary.Image(height=height, width=width, colorspace=RGB, encoded_image_string=encoded)
    metadata = create_summary_metadata("", description)
    return Summary(value=[Summary.Value(tag=tag, image=image, metadata=metadata)])
