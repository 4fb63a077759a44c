"""One dict of metrics to every sink: TensorBoard, trainer_state.json, the bar or the log file."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from emoft.config import TrainConfig
from emoft.data.steps import Step
from emoft.device import memory_in_use
from emoft.distributed.world import World
from emoft.errors import warn
from emoft.evaluate.classification import Classification
from emoft.evaluate.confusion import confusion_map
from emoft.evaluate.scoring import Evaluation, perplexity
from emoft.files import EVENTS_FOLDER, TRAINER_STATE_FILE, write_json
from emoft.gradients.monitor import Figures
from emoft.terminal import TrainingBar, say
from emoft.tracking.charts import GUIDE_LEVEL, TAGS
from emoft.tracking.counts import Counts
from emoft.tracking.depth import draw_depth, note_depth
from emoft.tracking.events import EventFile
from emoft.tracking.results import logged_evaluations, results_of, trainer_state
from emoft.tracking.run_state import SUMS, RunState
from emoft.tracking.setting import setting_of_data, setting_of_model

# Figures that differ from run to run of the same computation stay out of the history, which a resumed run continues.
SPEED = ("samples_per_second", "tokens_per_second", "share_of_peak", "memory_gib")


class Tracker:
    """Keeps the run's state and shows it. A context manager, so that the event file and the bar are closed."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunState,
        total_steps: int,
        steps_per_epoch: int,
        shape: GPT2Config,
        unigram_entropy: float,
        peak_flops: float,
        device: torch.device,
        world: World,
    ) -> None:
        self.config = config
        self.run = run
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.shape = shape
        self.unigram_entropy = unigram_entropy  # of the train split's targets, in nats
        self.peak_flops = peak_flops * world.size  # operations per second of all devices at best
        self.device = device
        self.world = world
        self.counts = Counts(run, shape, config.max_grad_norm, device)
        self.events = EventFile(Path(config.output_dir) / EVENTS_FOLDER, config, world.is_main, self.warn)
        self._step: Step | None = None  # the latest
        self._clock_started = time.perf_counter()

    def __enter__(self) -> "Tracker":
        self.bar = TrainingBar(self.total_steps, self.run.step, self.run.train_seconds)
        self.events.open(self.run.step)
        self._clock_started = time.perf_counter()
        return self

    def warn(self, message: str) -> None:
        """Print a line of warning to standard error, above the bar."""
        warn(message)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_bar()
        self.events.close()

    def close_bar(self) -> None:
        """End the bar's line, so that what is printed stands below it, and bars inside it."""
        self.bar.close()

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave what happens in this context out of the training time."""
        self.run.train_seconds += time.perf_counter() - self._clock_started
        try:
            yield
        finally:
            self._clock_started = time.perf_counter()

    def count_step(self, step: Step, loss: Tensor, grad_norm: Tensor, skipped: bool = False) -> None:
        """Add an optimizer step.

        Args:
            step: what it computed on.
            loss: its mean over all targets, on the device.
            grad_norm: before clipping, likewise. If loss or norm is not finite, the step changed nothing, and does not
                count for the mean of losses.
            skipped: whether fp16's loss scaling dropped the update.
        """
        self._step = step
        self.counts.add(step, loss, grad_norm, skipped)
        self.bar.advance(self.run.train_seconds + time.perf_counter() - self._clock_started)

    def log_step(self, grad_norm: Tensor, **metrics: float) -> None:
        """Log the steps since the last entry. Reads from the device: a CPU-GPU sync point."""
        run = self.run
        with self.clock_stopped():
            self.events.open(run.step)  # if it could not be written before
            self.counts.read()
            loss = (
                run.since_log("loss_sum") / run.since_log("loss_tokens") if run.since_log("loss_tokens") else math.nan
            )
            seconds = max(1e-9, run.since_log("train_seconds"))
            speed = {
                "samples_per_second": run.since_log("samples") / seconds,
                "tokens_per_second": run.since_log("tokens") / seconds,
                "share_of_peak": run.since_log("operations") / seconds / self.peak_flops,
            }
            if memory := memory_in_use(self.device):
                speed["memory_gib"] = memory / 2**30
            figures = {
                "loss": loss,
                "perplexity": perplexity(loss),
                "grad_norm": grad_norm.item(),
                "clipped_share": run.since_log("clipped_steps") / max(1, run.since_log("step")),
                **metrics,
            }
            self._log({**figures, **speed})
            beside = {
                "train/unigram_entropy": self.unigram_entropy,
                "train/uniform_loss": math.log(self.shape.vocab_size),
                "train/nonfinite_steps": run.nonfinite_steps,
                "train/spikes": run.spikes,
                "train/max_grad_norm": self.config.max_grad_norm or math.nan,
                "train/label_alignment": self._step.aligned_share() if self._step else math.nan,
            }
            self.events.add_scalars({tag: value for tag, value in beside.items() if not math.isnan(value)}, run.step)
            self.bar.log(
                loss,
                speed["samples_per_second"],
                speed["tokens_per_second"],
                speed["share_of_peak"],
                metrics.get("learning_rate"),
            )
            run.logged = {name: getattr(run, name) for name in (*SUMS, "step")}

    def log_start(
        self,
        model: GPT2LMHeadModel,
        examples_per_step: int,
        norms: dict[str, dict[int, float]],
        checksums: dict[str, str],
    ) -> None:
        """Show what a run begins with: the shape of the model and of a step, and the norms of its weights.

        Args:
            model: as it is.
            examples_per_step: of all ranks and micro-batches.
            norms: of `GradientMonitor.weights_at_start`.
            checksums: of the tokens of each split, in hexadecimal digits.
        """
        self._log_setting(setting_of_model(model, examples_per_step, checksums))
        self.run.layers_at_start = {tag: curve for tag, curve in norms.items() if tag.startswith("weights_at_start/")}
        for tag, curve in norms.items():
            if tag not in self.run.layers_at_start:
                self.events.add_scalars({tag: curve[0]}, 0)
        self.log_layers_at_start()

    def log_layers_at_start(self) -> None:
        """Show the norms of the layers of each kind, by block in place of steps; a resumed run hides what it finds."""
        for tag, curve in self.run.layers_at_start.items():
            for block, norm in curve.items():
                self.events.add_scalars({tag: norm}, block)

    def log_data(self, train_rows: Dataset) -> None:
        """Show what can be told of the train split without a model: repetitions, and whether its labels fit."""
        self._log_setting(setting_of_data(train_rows, self.config.max_length))

    def _log_setting(self, setting: dict[str, float]) -> None:
        self.events.add_scalars({TAGS[name][0]: value for name, value in setting.items()}, self.run.step)

    def log_evaluation(self, evaluation: Evaluation) -> bool:
        """Log an evaluation.

        Returns:
            Whether it is the best so far; the one before the first step is none of those that compete.
        """
        run = self.run
        run.other_validation_until = min(run.other_validation_until, run.step - 1)  # this one is of those of now
        self._log({f"eval_{name}": value for name, value in evaluation.figures().items()})
        if evaluation.overlap is not None:
            share = evaluation.overlap / evaluation.examples
            self.events.add_scalars({TAGS["eval_overlap_share"][0]: share}, run.step)
        is_best = run.step > 0 and evaluation.loss < run.best_loss
        if is_best:
            run.best_loss, run.best_step, run.evaluations_since_best = evaluation.loss, run.step, 0
        elif run.step > 0:
            run.evaluations_since_best += 1
        say(
            f"step {run.step}: validation loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f},"
            f" {evaluation.bits_per_byte:.3f} bits per byte" + (" (best so far)" if is_best else "")
        )
        return is_best

    def log_classification(self, classification: Classification) -> None:
        """Log how well emotions are told apart, and the confusion matrix, by the model as it is now."""
        step = self.run.step
        self._log({f"eval_{name}": value for name, value in classification.figures().items()})
        sizes = classification.confusion.sum(1)  # of each true emotion
        self.events.add_scalars({TAGS["eval_largest_emotion"][0]: sizes.max() / max(1, sizes.sum())}, step)
        self.events.add_image("confusion", confusion_map(classification.labels, classification.confusion), step)
        self.events.add_text("table/confusion", classification.table(), step)

    def log_gradients(self, figures: Figures) -> None:
        """Show the measurements of a step, and the heat map of all measured steps."""
        run = self.run
        self.events.add_scalars({**figures.scalars, "update_ratio/guide": GUIDE_LEVEL}, run.step)
        for tag, shape in figures.histograms.items():
            self.events.add_histogram(tag, shape, run.step)
        note_depth(run, figures)
        # Redrawn whenever it has grown by a twentieth: at every step, the pictures would fill the disk.
        if len(run.depth_steps) % max(1, len(run.depth_steps) // 20) == 0:
            draw_depth(self.run, self.events)

    def log_samples(self, texts: dict[str, str]) -> None:
        """Show sample texts, by emotion, in the Text tab."""
        for name, text in texts.items():
            self.events.add_text(f"samples/{name}", text, self.run.step)

    def log_results(self, results: dict[str, Any]) -> None:
        """Show the final figures: in the HParams table beside the run's configuration."""
        if self.run.depth_steps:
            draw_depth(self.run, self.events)
        self.events.add_results(results, self.run.step)

    def _log(self, metrics: dict[str, Any]) -> None:
        step, epoch = self.run.step, self.run.step / self.steps_per_epoch
        shown = {**metrics, "epoch": epoch}
        self.events.add_scalars({TAGS[name][0]: value for name, value in shown.items() if name in TAGS}, step)
        history = {name: value for name, value in metrics.items() if name not in SPEED}
        self.run.log_history.append({**history, "epoch": round(epoch, 6), "step": step})

    def state_for_checkpoint(self) -> dict[str, Any]:
        """Return the run's state as plain numbers, lists and dicts. Reads from the device: a CPU-GPU sync point."""
        self.counts.read()
        return asdict(self.run)

    def write_state(self, folder: Path) -> None:
        """Write trainer_state.json, in the format of `transformers.TrainerState`."""
        state = trainer_state(self.run, self.config, self.total_steps, self.steps_per_epoch)
        write_json(folder / TRAINER_STATE_FILE, state)

    def has_evaluated(self, step: int) -> bool:
        """Whether the log holds an evaluation of the model of a step, on the validation data of now."""
        return step in logged_evaluations(self.run, "eval_loss")

    def results(self, exported_step: int) -> dict[str, Any]:
        """Return the figures of the whole run; see `results_of`. Reads from the device: a CPU-GPU sync point.

        Args:
            exported_step: of the model that the figures of evaluations are to be of.
        """
        self.counts.read()
        return results_of(self.run, self.steps_per_epoch, self.peak_flops, exported_step)
