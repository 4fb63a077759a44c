"""One dict of metrics to every sink: TensorBoard, trainer_state.json, the progress bar."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import GPT2Config

from emoft.batching import Batch
from emoft.config import TrainConfig
from emoft.evaluate import Evaluation, perplexity
from emoft.machine import training_operations

STATE_FILE = "trainer_state.json"
RESULTS_FILE = "all_results.json"
EVENTS_FOLDER = "runs"

# Where each figure of a log entry stands in TensorBoard. Units: nats, tokens and samples per second, 1 for the rest.
TAGS = {
    "loss": "train/loss",
    "perplexity": "train/perplexity",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "loss_scale": "train/loss_scale",
    "skipped_steps": "train/skipped_steps",
    "epoch": "train/epoch",
    "samples_per_second": "speed/samples_per_second",
    "tokens_per_second": "speed/tokens_per_second",
    "share_of_peak": "speed/share_of_peak",
    "eval_loss": "eval/loss",
    "eval_perplexity": "eval/perplexity",
}
# Figures that differ from run to run of the same computation stay out of the history, which a resumed run continues.
SPEED = ("samples_per_second", "tokens_per_second", "share_of_peak")


@dataclass
class RunState:
    """What a run knows about itself besides weights, optimizer and random states; stored in each checkpoint."""

    step: int = 0  # optimizer steps taken
    skipped_steps: int = 0  # of them, those whose update fp16's loss scaling dropped
    train_seconds: float = 0.0  # without evaluating, saving and sampling
    samples: int = 0
    tokens: int = 0  # that were targets
    loss_sum: float = 0.0  # over these tokens, in nats
    operations: float = 0.0  # floating-point operations that the model's mathematics needed
    logged_seconds: float = 0.0  # the same five at the last log entry
    logged_samples: int = 0
    logged_tokens: int = 0
    logged_loss_sum: float = 0.0
    logged_operations: float = 0.0
    best_loss: float = math.inf  # lowest evaluation loss
    best_step: int = 0
    evaluations_since_best: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)


class Tracker:
    """Keeps the run's state and shows it. A context manager, so that the event file and the bar are closed."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunState,
        total_steps: int,
        steps_per_epoch: int,
        shape: GPT2Config,
        peak_flops: float,
        device: torch.device,
    ) -> None:
        self.config = config
        self.run = run
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.shape = shape
        self.peak_flops = peak_flops  # operations per second of the device at best
        self.output_dir = Path(config.output_dir)
        # Summed on the device: reading a number from a GPU waits for all that it still has to do.
        self.loss_sum = torch.tensor(run.loss_sum, dtype=torch.float64, device=device)
        self._clock_started = time.perf_counter()

    def __enter__(self) -> "Tracker":
        self.bar = tqdm(total=self.total_steps, initial=self.run.step, desc="Training", unit="step", dynamic_ncols=True)
        # A resumed run hides what the interrupted one wrote after its last checkpoint.
        purge_step = self.run.step + 1 if self.run.step else None
        self.writer = SummaryWriter(str(self.output_dir / EVENTS_FOLDER), purge_step=purge_step)
        self._clock_started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.writer.close()

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave what happens in this context out of the training time."""
        self.run.train_seconds += time.perf_counter() - self._clock_started
        try:
            yield
        finally:
            self._clock_started = time.perf_counter()

    def count_step(self, loss: Tensor, batches: list[Batch], skipped: bool = False) -> None:
        """Add an optimizer step: its mean loss (on the device), and the micro-batches it was of.

        A step that fp16's loss scaling skipped counts as a step only: its loss may be infinite.
        """
        run = self.run
        run.step += 1
        self.bar.update()
        if skipped:
            run.skipped_steps += 1
            return
        tokens = sum(batch.target_tokens for batch in batches)
        self.loss_sum += loss.double() * tokens
        run.tokens += tokens
        run.samples += sum(batch.examples for batch in batches)
        run.operations += sum(
            training_operations(self.shape, batch.tokens, batch.target_tokens, batch.pairs) for batch in batches
        )

    def log_step(self, grad_norm: Tensor, **metrics: float) -> None:
        """Log the steps since the last entry. Reads from the device: a CPU-GPU sync point."""
        run = self.run
        with self.clock_stopped():
            run.loss_sum = self.loss_sum.item()
            loss = (run.loss_sum - run.logged_loss_sum) / max(1, run.tokens - run.logged_tokens)
            seconds = max(1e-9, run.train_seconds - run.logged_seconds)
            speed = {
                "samples_per_second": (run.samples - run.logged_samples) / seconds,
                "tokens_per_second": (run.tokens - run.logged_tokens) / seconds,
                "share_of_peak": (run.operations - run.logged_operations) / seconds / self.peak_flops,
            }
            self._log({"loss": loss, "perplexity": perplexity(loss), "grad_norm": grad_norm.item(), **metrics, **speed})
            self.bar.set_postfix_str(
                f"loss {loss:.3f}, {speed['samples_per_second']:.1f} samples/s,"
                f" {speed['tokens_per_second']:,.0f} tokens/s, {speed['share_of_peak']:.0%} of peak",
                refresh=False,
            )
            run.logged_seconds, run.logged_samples = run.train_seconds, run.samples
            run.logged_tokens, run.logged_loss_sum = run.tokens, run.loss_sum
            run.logged_operations = run.operations

    def log_evaluation(self, evaluation: Evaluation) -> bool:
        """Log an evaluation.

        Returns:
            Whether it is the best so far.
        """
        run = self.run
        self._log({"eval_loss": evaluation.loss, "eval_perplexity": evaluation.perplexity})
        is_best = evaluation.loss < run.best_loss
        if is_best:
            run.best_loss, run.best_step, run.evaluations_since_best = evaluation.loss, run.step, 0
        else:
            run.evaluations_since_best += 1
        tqdm.write(
            f"step {run.step}: validation loss {evaluation.loss:.4f}, perplexity {evaluation.perplexity:.2f}"
            + (" (best so far)" if is_best else "")
        )
        return is_best

    def _log(self, metrics: dict[str, float]) -> None:
        step, epoch = self.run.step, self.run.step / self.steps_per_epoch
        for name, value in {**metrics, "epoch": epoch}.items():
            self.writer.add_scalar(TAGS[name], value, step)
        history = {name: value for name, value in metrics.items() if name not in SPEED}
        self.run.log_history.append({**history, "epoch": round(epoch, 6), "step": step})

    def state_for_checkpoint(self) -> dict[str, Any]:
        """Return the run's state as plain numbers, lists and dicts. Reads from the device: a CPU-GPU sync point."""
        self.run.loss_sum = self.loss_sum.item()
        return asdict(self.run)

    def write_state(self, folder: Path) -> None:
        """Write trainer_state.json, in the format of `transformers.TrainerState`."""
        config, run = self.config, self.run
        best = math.isfinite(run.best_loss)
        write_json(
            folder / STATE_FILE,
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

    def results(self) -> dict[str, float]:
        """Return the figures of the whole run, by the Trainer's names. Seconds are those of training alone."""
        run = self.run
        seconds = max(1e-9, run.train_seconds)
        run.loss_sum = self.loss_sum.item()
        figures: dict[str, float] = {
            "epoch": run.step / self.steps_per_epoch,
            "train_loss": run.loss_sum / max(1, run.tokens),
            "train_runtime": run.train_seconds,
            "train_samples_per_second": run.samples / seconds,
            "train_steps_per_second": run.step / seconds,
            "train_tokens_per_second": run.tokens / seconds,
            "train_share_of_peak": run.operations / seconds / self.peak_flops,
        }
        if math.isfinite(run.best_loss):
            shown = run.best_loss if self.config.load_best_model_at_end else self._last("eval_loss")
            figures |= {"eval_loss": shown, "perplexity": perplexity(shown)}
        return figures

    def _last(self, name: str) -> float:
        return next(float(entry[name]) for entry in reversed(self.run.log_history) if name in entry)


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside the target and rename it, so that a reader never sees half a file.

    Numbers that JSON has no word for (NaN, infinite) become null.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
