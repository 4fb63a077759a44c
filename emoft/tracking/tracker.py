"""One dict of metrics to every sink: TensorBoard, trainer_state.json, the bar or the log file."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from emoft.config import TrainConfig
from emoft.data.batching import target_tokens
from emoft.data.duplicates import distinct_share
from emoft.data.label_information import told_by_words
from emoft.data.steps import Step
from emoft.data.tokens import cut_share
from emoft.device import memory_in_use, sums_type
from emoft.distributed.world import World
from emoft.errors import warn
from emoft.evaluate.classification import Classification
from emoft.evaluate.confusion import confusion_map
from emoft.evaluate.scoring import Evaluation, perplexity
from emoft.files import EVENTS_FOLDER, TRAINER_STATE_FILE, fault_file, spike_file, write_json
from emoft.gradients.monitor import Figures
from emoft.gradients.pictures import depth_chart, heat_map
from emoft.terminal import TrainingBar, say
from emoft.tracking.charts import DEPTH_CHARTS, GUIDE_LEVEL, TAGS
from emoft.tracking.events import EventFile
from emoft.tracking.run_state import SUMS, RunState
from emoft.tracking.throughput import training_operations
from emoft.training.nonfinite import Fault
from emoft.training.spikes import Spike

# Figures that differ from run to run of the same computation stay out of the history, which a resumed run continues.
SPEED = ("samples_per_second", "tokens_per_second", "share_of_peak", "memory_gib")
EVALUATED = ("eval_loss", "perplexity", "bits_per_byte")  # figures of an evaluation, by their names in the results
CLASSIFIED = ("emotion_accuracy", "macro_f1")  # likewise of a classification
COLUMNS = 512  # measured steps that the heat map keeps


@dataclass(frozen=True)
class Moment:
    """What a run had counted before a step."""

    run: RunState
    sums: Tensor  # on the device


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
        self.output_dir = Path(config.output_dir)
        # Loss, targets and clipped steps, summed on the device: reading a number from a GPU waits for all that it
        # still has to do.
        sums = [run.loss_sum, run.loss_tokens, run.clipped_steps]
        self._sums = torch.tensor(sums, dtype=sums_type(self.device), device=self.device)
        folder = self.output_dir / EVENTS_FOLDER
        self.events = EventFile(folder, config, world.is_main, self.warn)
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
        run = self.run
        self._step = step
        run.step += 1
        run.skipped_steps += skipped
        run.samples += len(step.examples)
        tokens = target_tokens(step.lengths)
        run.tokens += tokens
        run.operations += training_operations(self.shape, step.lengths)
        is_clipped = grad_norm > (self.config.max_grad_norm or math.inf)
        row = torch.stack([loss * tokens, torch.full_like(loss, tokens), is_clipped]).to(self._sums.dtype)
        self._sums += torch.where(loss.isfinite() & grad_norm.isfinite(), row, 0)
        self.bar.advance(run.train_seconds + time.perf_counter() - self._clock_started)

    def remember(self) -> "Moment":
        """Return what brings the counts back to where they stand now, by `return_to`. Reads nothing from the device."""
        run = self.run
        # These grow in place.
        depth = {
            "depth_steps": list(run.depth_steps),
            "depth_norms": list(run.depth_norms),
            "depth_others": {kind: list(values) for kind, values in run.depth_others.items()},
        }
        now = replace(run, recent_losses=list(run.recent_losses), **depth)  # type: ignore[arg-type]  # of two kinds
        return Moment(now, self._sums.clone())

    def return_to(self, moment: "Moment") -> None:
        """Forget the steps that were counted since a moment; the seconds that they took stay spent."""
        seconds = self.run.train_seconds
        for name, value in vars(moment.run).items():
            setattr(self.run, name, value)
        self.run.train_seconds = seconds
        self._sums.copy_(moment.sums)

    def _read_sums(self) -> None:
        """Read from the device: a CPU-GPU sync point."""
        run = self.run
        run.loss_sum, loss_tokens, clipped_steps = self._sums.tolist()
        run.loss_tokens, run.clipped_steps = int(loss_tokens), int(clipped_steps)

    def log_step(self, grad_norm: Tensor, **metrics: float) -> None:
        """Log the steps since the last entry. Reads from the device: a CPU-GPU sync point."""
        run = self.run
        with self.clock_stopped():
            self.events.open(run.step)  # if it could not be written before
            self._read_sums()
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
        setting = {
            "examples_per_step": examples_per_step,
            "width": self.shape.n_embd,
            "positions": self.shape.n_positions,
            "dropout": max((module.p for module in model.modules() if isinstance(module, nn.Dropout)), default=0.0),
        }
        for split in ("train", "validation"):
            if split in checksums:
                setting[f"{split}_checksum"] = int(checksums[split][:6], 16)  # of a curve's point 24 bits are exact
        self.events.add_scalars({TAGS[name][0]: value for name, value in setting.items()}, self.run.step)
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
        setting: dict[str, float] = {"distinct_texts": distinct_share(train_rows)}
        if "whole_tokens" in train_rows.column_names:
            setting["cut_texts"] = cut_share(train_rows, self.config.max_length)
        if "label" in train_rows.column_names:
            labels = train_rows["label"][:]
            setting["emotions"] = len(set(labels))
            told, largest, asked = told_by_words(train_rows["text"][:], labels)
            setting |= {"emotion_by_words": told, "largest_emotion": largest, "emotions_asked": asked}
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
        if len(run.depth_steps) == COLUMNS:  # a long run: keep every second column
            run.depth_steps, run.depth_norms = run.depth_steps[1::2], run.depth_norms[1::2]
            run.depth_others = {kind: values[1::2] for kind, values in run.depth_others.items()}
        run.depth_steps.append(run.step)
        run.depth_norms.append(figures.depth)
        for kind in DEPTH_CHARTS:
            if kind != "gradient_norm":
                values = [figures.scalars.get(f"{kind}/h{n:02}", math.nan) for n in range(len(figures.depth))]
                run.depth_others.setdefault(kind, []).append(values)
        # Redrawn whenever it has grown by a twentieth: at every step, the pictures would fill the disk.
        if len(run.depth_steps) % max(1, len(run.depth_steps) // 20) == 0:
            self._draw_depth()

    def _draw_depth(self) -> None:
        run = self.run
        for kind, (title, in_logs) in DEPTH_CHARTS.items():
            curves = run.depth_norms if kind == "gradient_norm" else run.depth_others.get(kind, [])
            steps = run.depth_steps[len(run.depth_steps) - len(curves) :]  # an older run kept the first kind only
            if steps:
                self.events.add_image(f"by_depth/{kind}", depth_chart(title, steps, curves, in_logs), run.step)
        self.events.add_image("gradient_norm_by_block", heat_map(run.depth_steps, run.depth_norms), run.step)

    def log_samples(self, texts: dict[str, str]) -> None:
        """Show sample texts, by emotion, in the Text tab."""
        for name, text in texts.items():
            self.events.add_text(f"samples/{name}", text, self.run.step)

    def log_fault(self, fault: Fault, lines: list[str], details: dict[str, Any]) -> None:
        """Tell of a step that was not finite: on the terminal, in the Text tab, and in nonfinite-STEP.json."""
        run = self.run
        run.nonfinite_steps += 1
        run.nonfinite_in_row = run.nonfinite_in_row + 1 if fault.step == run.last_nonfinite_step + 1 else 1
        run.last_nonfinite_step = fault.step
        if self.world.is_main:
            try:
                write_json(self.output_dir / fault_file(fault.step), {**asdict(fault), **details})
            except OSError as error:
                self.warn(f"{fault_file(fault.step)} cannot be written ({error.strerror})")
        say("\n".join(lines))
        self.events.add_text("faults/nonfinite", "\n".join(lines), fault.step)
        self.events.add_scalars({"train/nonfinite_steps": run.nonfinite_steps}, fault.step)

    def log_spike(self, spike: Spike, line: str, details: dict[str, Any]) -> None:
        """Tell of a step whose loss stood out: above the bar, in the Text tab, and in spike-STEP.json."""
        if self.world.is_main:
            try:
                write_json(self.output_dir / spike_file(spike.step), {**asdict(spike), **details})
            except OSError as error:
                self.warn(f"{spike_file(spike.step)} cannot be written ({error.strerror})")
        self.warn(line)
        self.events.add_text("faults/spikes", line, spike.step)

    def log_results(self, results: dict[str, Any]) -> None:
        """Show the final figures: in the HParams table beside the run's configuration."""
        if self.run.depth_steps:
            self._draw_depth()
        self.events.add_results(results, self.run.step)

    def _log(self, metrics: dict[str, Any]) -> None:
        step, epoch = self.run.step, self.run.step / self.steps_per_epoch
        shown = {**metrics, "epoch": epoch}
        self.events.add_scalars({TAGS[name][0]: value for name, value in shown.items() if name in TAGS}, step)
        history = {name: value for name, value in metrics.items() if name not in SPEED}
        self.run.log_history.append({**history, "epoch": round(epoch, 6), "step": step})

    def state_for_checkpoint(self) -> dict[str, Any]:
        """Return the run's state as plain numbers, lists and dicts. Reads from the device: a CPU-GPU sync point."""
        self._read_sums()
        return asdict(self.run)

    def write_state(self, folder: Path) -> None:
        """Write trainer_state.json, in the format of `transformers.TrainerState`."""
        config, run = self.config, self.run
        best = math.isfinite(run.best_loss)
        write_json(
            folder / TRAINER_STATE_FILE,
            {
                "best_metric": run.best_loss if best else None,
                "best_global_step": run.best_step if best else None,
                "best_model_checkpoint": str(self.output_dir / f"checkpoint-{run.best_step}") if best else None,
                "epoch": run.step / self.steps_per_epoch,
                "global_step": run.step,
                "max_steps": self.total_steps,
                "num_train_epochs": math.ceil(self.total_steps / self.steps_per_epoch),
                "train_batch_size": config.per_device_train_batch_size,
                "logging_steps": config.logging_steps,
                "eval_steps": config.eval_steps or self.steps_per_epoch,
                "save_steps": config.save_steps,
                "log_history": run.log_history,
            },
        )

    def has_evaluated(self, step: int) -> bool:
        """Whether the log holds an evaluation of the model of a step, on the validation data of now."""
        return step in self._evaluations("eval_loss")

    def _evaluations(self, name: str) -> dict[int, dict[str, Any]]:
        """Return the latest log entry with a figure, of each step, on the validation data of now."""
        since = self.run.other_validation_until
        return {entry["step"]: entry for entry in self.run.log_history if name in entry and entry["step"] > since}

    def results(self, exported_step: int) -> dict[str, Any]:
        """Return the figures of the whole run, by the Trainer's names. Seconds are those of training alone.

        Args:
            exported_step: of the model that the figures of evaluations are to be of.
        """
        run = self.run
        seconds = max(1e-9, run.train_seconds)
        self._read_sums()
        figures: dict[str, Any] = {
            "epoch": run.step / self.steps_per_epoch,
            "train_loss": run.loss_sum / max(1, run.loss_tokens),
            "train_runtime": run.train_seconds,
            "train_samples_per_second": run.samples / seconds,
            "train_steps_per_second": run.step / seconds,
            "train_tokens_per_second": run.tokens / seconds,
            "train_share_of_peak": run.operations / seconds / self.peak_flops,
        }
        evaluations, classifications = self._evaluations("eval_loss"), self._evaluations("eval_emotion_accuracy")
        if after := evaluations.get(exported_step) if exported_step else None:
            figures |= _before_and_after(EVALUATED, evaluations.get(0), after)
            if "eval_overlap" in after:
                figures["eval_overlap"] = after["eval_overlap"]
        if max(classifications, default=0) > 0:
            after = classifications[max(classifications)]
            figures |= _before_and_after(CLASSIFIED, classifications.get(0), after)
            figures["classified"] = after["eval_classified"]
            if unknown := after.get("eval_unknown_emotions"):
                figures["unknown_emotions"] = unknown  # of them, and counted as wrong
        return figures


def _before_and_after(names: tuple[str, ...], before: dict[str, Any] | None, after: dict[str, Any]) -> dict[str, Any]:
    """Return figures by their names in the results, of two entries of the log."""
    figures = {}
    for name in names:
        logged = f"eval_{name.removeprefix('eval_')}"
        if before:
            figures[f"{name}_before"] = before[logged]
            figures[f"{name}_before_interval"] = before[f"{logged}_interval"]
        figures |= {each.replace(logged, name): value for each, value in after.items() if each.startswith(logged)}
    return figures
