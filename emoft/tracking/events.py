"""TensorBoard's event file: curves with what they mean, pictures, texts, histograms, the table of configurations."""

import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb
from torch.utils.tensorboard import FileWriter, summary

from emoft.config import TrainConfig
from emoft.flags import flags_on_resume
from emoft.gradients.monitor import Histogram
from emoft.private import restart_marks
from emoft.tracking.charts import GROUPS, GUIDE, LAYOUT, TAGS

# Flags that make a run what it is: those that a resumed one must keep, and those of its model.
SHOWN = ("model_name_or_path", "config_overrides", *flags_on_resume(TrainConfig, "fixed", "step_size"))
DESCRIPTIONS = dict(TAGS.values())
FINAL = (  # of the HParams table
    "train_loss",
    "eval_loss",
    "perplexity",
    "bits_per_byte",
    "emotion_accuracy",
    "macro_f1",
    "test_loss",
    "test_emotion_accuracy",
    "train_samples_per_second",
)


class EventFile:
    """An event file of a run. Where it cannot be written, the run goes on without, until it is opened anew."""

    def __init__(self, folder: Path, config: TrainConfig, is_wanted: bool, warn: Callable[[str], None]) -> None:
        """Remember where; `open` begins.

        Args:
            folder: of the event files.
            config: of the run, for the HParams table.
            is_wanted: False on all ranks but 0, where nothing is ever written.
            warn: tells the user.
        """
        self.folder, self.config, self.is_wanted, self.warn = folder, config, is_wanted, warn
        self._writer: FileWriter | None = None
        self._described: set[str] = set()

    def open(self, step: int) -> None:
        """Begin a file after a step, if none is open; curves of an interrupted run are hidden from there on."""
        if self._writer is not None or not self.is_wanted:
            return
        threading.excepthook = _quiet_about_writing
        self._described.clear()
        try:
            self._writer = FileWriter(str(self.folder))
            # TensorBoard hides what comes after such marks from the second ones on: the first must be there from the
            # beginning.
            for mark in restart_marks(step + 1):
                self._writer.add_event(mark)
        except OSError as error:
            self._give_up(error)
            return
        self._add(summary.custom_scalars(LAYOUT))
        if step == 0:
            self.add_text("guide", GUIDE, 0)
        for part in self._hparams()[:2]:
            self._add(part)

    def close(self) -> None:
        """End the file."""
        self._write(FileWriter.flush)  # tells what could not be written; `FileWriter.close` alone does not
        self._write(FileWriter.close)
        self._writer = None

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Add a point to each of some curves; to the first of each, what the curve means."""
        for tag, value in values.items():
            point = summary.scalar(tag, value)
            if tag not in self._described:
                self._described.add(tag)
                metadata = point.value[0].metadata
                metadata.plugin_data.plugin_name = "scalars"
                metadata.summary_description = DESCRIPTIONS.get(tag) or GROUPS.get(tag.partition("/")[0], "")
            self._add(point, step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Add a text, shown as it is."""
        markdown = "\n".join(f"    {line}" for line in text.splitlines())
        self._add(summary.text(tag, markdown), step)

    def add_image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Add a picture, (H, W, 3) uint8."""
        self._add(summary.image(tag, picture, dataformats="HWC"), step)

    def add_histogram(self, tag: str, shape: Histogram, step: int) -> None:
        """Add a histogram that was counted elsewhere."""
        histogram = summary.histogram_raw(
            tag,
            min=shape.low,
            max=shape.high,
            num=sum(shape.counts),
            sum=shape.total,
            sum_squares=shape.squares,
            bucket_limits=shape.limits,
            bucket_counts=shape.counts,
        )
        self._add(histogram, step)

    def add_results(self, results: dict[str, Any], step: int) -> None:
        """Complete the run's line in the HParams table."""
        self.add_scalars({f"final/{name}": results[name] for name in FINAL if name in results}, step)
        self._add(self._hparams()[2])

    def _hparams(self) -> list[Any]:
        """Return what the HParams table shows of the run: which columns there are, its line, and the line's end.

        They are the flags that are not as they are by default, the learning rate first: TensorBoard sorts columns by
        name, which is why that one's has a blank before it. `SummaryWriter.add_hparams` would open a second run.
        """
        default, given = asdict(TrainConfig()), asdict(self.config)
        values = {"learning_rate": self.config.learning_rate}
        values |= {name: given[name] for name in SHOWN if given[name] != default[name]}
        values = {name: str(value) if isinstance(value, list) else value for name, value in values.items()}
        shown = {f" {name}" if name == "learning_rate" else name: value for name, value in values.items()}
        columns = [HParam(name, display_name=name.strip()) for name in shown]
        metrics = [Metric(f"final/{name}", display_name=name) for name in FINAL]
        return [
            hparams_config_pb(columns, metrics),
            hparams_pb(shown, trial_id=self.folder.resolve().parent.name),
            summary.hparams({}, {})[2],
        ]

    def _add(self, entry: Any, step: int | None = None) -> None:
        self._write(lambda writer: writer.add_summary(entry, step))

    def _write(self, write: Callable[[FileWriter], object]) -> None:
        if self._writer is not None:
            try:
                write(self._writer)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        self.warn(
            f"the event file in {self.folder} cannot be written ({error.strerror or error}); training goes on,"
            " and the next log entry tries again"
        )


def _quiet_about_writing(arguments: threading.ExceptHookArgs) -> None:
    """Keep TensorBoard's thread from printing a traceback of what `EventFile` tells in a line.

    It stays in place when the file is closed: the thread may come to its end only then.
    """
    is_tensorboards = type(arguments.thread).__module__.startswith("tensorboard.")
    if not (is_tensorboards and isinstance(arguments.exc_value, OSError)):
        threading.__excepthook__(arguments)
