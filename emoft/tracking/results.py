"""What a run leaves in figures, read from its state: all_results.json and trainer_state.json."""

import math
from pathlib import Path
from typing import Any

from emoft.config import TrainConfig
from emoft.tracking.run_state import RunState

EVALUATED = ("eval_loss", "perplexity", "bits_per_byte")  # figures of an evaluation, by their names in the results
CLASSIFIED = ("emotion_accuracy", "macro_f1")  # likewise of a classification


def logged_evaluations(run: RunState, name: str) -> dict[int, dict[str, Any]]:
    """Return the latest log entry with a figure, of each step, on the validation data of now."""
    return {
        entry["step"]: entry
        for entry in run.log_history
        if name in entry and entry["step"] > run.other_validation_until
    }


def results_of(run: RunState, steps_per_epoch: int, peak_flops: float, exported_step: int) -> dict[str, Any]:
    """Return the figures of the whole run, by the Trainer's names. Seconds are those of training alone.

    Args:
        run: with its sums read from the device.
        steps_per_epoch: of the train split.
        peak_flops: operations per second of all devices at best.
        exported_step: of the model that the figures of evaluations are to be of.
    """
    seconds = max(1e-9, run.train_seconds)
    figures: dict[str, Any] = {
        "epoch": run.step / steps_per_epoch,
        "train_loss": run.loss_sum / max(1, run.loss_tokens),
        "train_runtime": run.train_seconds,
        "train_samples_per_second": run.samples / seconds,
        "train_steps_per_second": run.step / seconds,
        "train_tokens_per_second": run.tokens / seconds,
        "train_share_of_peak": run.operations / seconds / peak_flops,
    }
    evaluations = logged_evaluations(run, "eval_loss")
    classifications = logged_evaluations(run, "eval_emotion_accuracy")
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


def trainer_state(run: RunState, config: TrainConfig, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
    """Return what trainer_state.json holds, in the format of `transformers.TrainerState`.

    Args:
        run: its log and its best step.
        config: all flags.
        total_steps: of the whole run.
        steps_per_epoch: of the train split.
    """
    best = math.isfinite(run.best_loss)
    return {
        "best_metric": run.best_loss if best else None,
        "best_global_step": run.best_step if best else None,
        "best_model_checkpoint": str(Path(config.output_dir) / f"checkpoint-{run.best_step}") if best else None,
        "epoch": run.step / steps_per_epoch,
        "global_step": run.step,
        "max_steps": total_steps,
        "num_train_epochs": math.ceil(total_steps / steps_per_epoch),
        "train_batch_size": config.per_device_train_batch_size,
        "logging_steps": config.logging_steps,
        "eval_steps": config.eval_steps or steps_per_epoch,
        "save_steps": config.save_steps,
        "log_history": run.log_history,
    }
