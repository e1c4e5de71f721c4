"""What handlers have in common that judge the cases of an epoch when it is over, and draw what they found."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from ignite.engine import Engine
from matplotlib.figure import Figure
from monai.handlers import TensorBoardHandler
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from monai_xai.errors import InputError
from monai_xai.figures import encode_png, rasterize
from monai_xai.gathering import Gathered, Gathering, Masks
from monai_xai.handlers import register_events
from monai_xai.ranks import in_step, rank
from monai_xai.report.names import new_salt
from monai_xai.tensorboard import image_summary

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class JudgmentBoard(TensorBoardHandler, ABC, Generic[Result]):
    """Writes a result to TensorBoard when its event is fired, and computes nothing.

    A subclass says where the result is in ``engine.state`` (``kept_as``) and which event tells of it (``completed``).

    Args:
        log_dir: where the event file is written, if there is no ``summary_writer``.
        summary_writer: a writer to share with other handlers; who made it closes it.
        anonymize: replace names of cases by salted hashes.
        salt: key of the hashes; None draws one.
    """

    kept_as: ClassVar[str]
    completed: ClassVar[Any]

    def __init__(
        self,
        log_dir: str = "./runs",
        summary_writer: SummaryWriter | None = None,
        *,
        anonymize: bool = False,
        salt: str | None = None,
    ) -> None:
        super().__init__(summary_writer=summary_writer, log_dir=log_dir)
        self.anonymize = anonymize
        self.salt = new_salt() if salt is None else salt

    def attach(self, engine: Engine) -> None:
        """Attach to the engine whose explanations are judged; a second time does nothing."""
        register_events(engine)
        if not engine.has_event_handler(self, self.completed):
            engine.add_event_handler(self.completed, self)

    def __call__(self, engine: Engine) -> None:
        """Write what is in the engine's state."""
        result: Result = getattr(engine.state, self.kept_as)
        self.write(self.hide_names(result, self.salt) if self.anonymize else result, engine.state.epoch)

    @staticmethod
    @abstractmethod
    def hide_names(result: Result, salt: str) -> Result:
        """Return the same result with the names of cases replaced by hashes under a salt."""

    @abstractmethod
    def write(self, result: Result, step: int) -> None:
        """Write a result.

        Args:
            result: what is written, as it is.
            step: the place on the axis of steps.
        """

    def _add_picture(self, tag: str, figure: Figure, step: int) -> None:
        summary = image_summary(tag, encode_png(rasterize(figure)), "")
        self._writer._get_file_writer().add_summary(summary, step)


class EpochJudge(ABC, Generic[Result]):
    """Judges the first cases of an epoch when it is over, puts the result into ``engine.state``, and saves it.

    A subclass says what it gathers and how it judges. Nothing else in the loop changes; what fails is logged, with its
    place, and counted in ``failures``.

    Args:
        cases: how many cases of the epoch at most; None: all.
        every_n_epochs: how often; 1 is every epoch.
        masks: where masks come from, by what they mark, see :class:`~monai_xai.gathering.Gathering`.
        labels: where label maps come from, likewise.
        output_dir: where files are written; None writes none.
        log_dir: where TensorBoard events are written; a board is attached for that.
        network: the network, if the engine has none of its own or another is meant.
        case_key: where the batch holds case names; else file names are taken.
        anonymize: replace names of cases by salted hashes in files and TensorBoard.
        salt: key of the hashes; None draws one that holds as long as the handler.
        on_error: "log" keeps the loop alive; "raise" ends it.
        spread: where there are several processes, whether they unite what each has seen and share the work. The
            handler is then attached in all of them; else in one.

    Raises:
        InputError: if a setting makes no sense.
    """

    board: ClassVar[type[JudgmentBoard]]  # type: ignore[type-arg]
    not_done: ClassVar[str]
    """What a failure comes to, for the log."""

    def __init__(
        self,
        *,
        cases: int | None,
        every_n_epochs: int,
        masks: Mapping[str, Masks | None],
        labels: Mapping[str, Masks | None] | None = None,
        output_dir: str | Path | None,
        log_dir: str | Path | None,
        network: nn.Module | None,
        case_key: str,
        anonymize: bool,
        salt: str | None,
        on_error: Literal["log", "raise"],
        spread: bool,
    ) -> None:
        owner = type(self).__name__
        if on_error not in ("log", "raise"):
            raise InputError(f"{owner}(on_error={on_error!r}): choose 'log' or 'raise'.")
        self.output_dir = output_dir
        self.network = network
        self.anonymize = anonymize
        self.salt = new_salt() if salt is None else salt
        self.on_error = on_error
        self.spread = spread
        self.failures = 0
        self._log_dir = log_dir
        self._drawer: JudgmentBoard[Result] | None = None
        self._gathering = Gathering(owner, cases, every_n_epochs, case_key, masks, labels)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator, or to a plain ignite engine; a second time does nothing."""
        register_events(engine)
        self._gathering.attach(engine, self, self._fail)

    @property
    def _is_writing(self) -> bool:
        """Whether this process writes what was found."""
        return rank() == 0 or not self.spread

    def __call__(self, engine: Engine) -> None:
        """Judge what the epoch has gathered."""
        if not self._gathering.is_due(engine):
            return
        where = f"epoch {engine.state.epoch}"
        try:
            with in_step(f"the judging of {where}") if self.spread else nullcontext():
                gathered = self._gathering.take(spread=self.spread)
                if not gathered.cases:
                    return
                where += f", {len(gathered.cases)} cases"
                result = self._judge(engine, gathered)
            self._tell(engine, result)
        except Exception as error:
            self._fail(error, where)

    def _tell(self, engine: Engine, result: Result) -> None:
        """Put a result where others find it, write it, and tell of it."""
        epoch, kept_as = engine.state.epoch, self.board.kept_as
        setattr(engine.state, kept_as, result)
        logger.info("%s, epoch %d: %s", kept_as.capitalize(), epoch, self._summary(result))
        if self.output_dir is not None and self._is_writing:
            self._save_as_shown(result, Path(self.output_dir), epoch)
        if self._log_dir is not None and self._is_writing:
            if self._drawer is None:
                self._drawer = self.board(str(self._log_dir), anonymize=self.anonymize, salt=self.salt)
            self._drawer.attach(engine)
        engine.fire_event(self.board.completed)

    @abstractmethod
    def _judge(self, engine: Engine, gathered: Gathered) -> Result:
        """Return the result."""

    @abstractmethod
    def _summary(self, result: Result) -> str:
        """Return the result in a sentence."""

    @abstractmethod
    def _save(self, result: Result, folder: Path, epoch: int) -> None:
        """Write files.

        Raises:
            OSError: if one cannot be written.
        """

    def _save_as_shown(self, result: Result, folder: Path, epoch: int) -> None:
        """Save a result; what cannot be written is logged and does not end the loop."""
        shown = self.board.hide_names(result, self.salt) if self.anonymize else result
        try:
            self._save(shown, folder, epoch)
        except OSError as error:
            self._fail(error, f"epoch {epoch}", "Not saved")

    def _fail(self, error: Exception, where: str, what: str = "") -> None:
        if self.on_error == "raise":
            raise error
        self.failures += 1
        logger.warning(
            "%s: %s, %s (failure %d): %s",
            what or self.not_done, self.board.kept_as, where, self.failures, error, exc_info=error,
        )  # fmt: skip
