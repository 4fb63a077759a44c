"""Checkpoints: an output folder that no accident overwrites, an atomic save, a resume that continues exactly."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from emoft.config import TrainConfig
from emoft.errors import UserError
from emoft.precision import Precision
from emoft.randomness import random_state, set_random_state

STATE_FILE = "training_state.pt"
NAME = re.compile(r"checkpoint-(\d+)")
# What a finished or interrupted run leaves besides its checkpoints; deleted by --overwrite_output_dir.
RUN_FILES = ("trainer_state.json", "all_results.json", "train_config.yaml", "emoft.json", "model.safetensors", "runs")
# Flags that a resumed run may change; all others alter the computation.
FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "use_cpu",
    "per_device_eval_batch_size", "gradient_checkpointing", "torch_compile", "early_stopping_patience",
    "load_best_model_at_end", "model_name_or_path", "config_overrides", "vocab_size", "tokenizer_name", "test_file",
    "log_gradients_every", "sample_every", "on_nonfinite",
}  # fmt: skip


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, in the order of their steps."""
    found = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of a folder checkpoint-STEP."""
    match = NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def find_checkpoint(config: TrainConfig) -> Path | None:
    """Return the checkpoint to resume from, or None for a fresh start.

    Raises:
        UserError: the output folder cannot be used, holds a run that the flags do not speak of, or the checkpoint
            that they name does not exist.
    """
    output_dir = Path(config.output_dir)
    wanted = config.resume_from_checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: name a folder")
    if wanted and config.overwrite_output_dir:
        raise UserError("--resume_from_checkpoint and --overwrite_output_dir contradict each other: drop one")
    if wanted == "latest":
        found = checkpoints(output_dir)
        print(
            f"resuming from {found[-1]}" if found else f"no checkpoint in {output_dir} yet: starting from the beginning"
        )
        return found[-1] if found else None
    if wanted:
        if not (Path(wanted) / STATE_FILE).is_file():
            raise UserError(
                f"--resume_from_checkpoint {wanted} is no checkpoint (no {STATE_FILE} in it): check the path"
            )
        return Path(wanted)
    held = [name for name in RUN_FILES if (output_dir / name).exists()] + [
        path.name for path in checkpoints(output_dir)
    ]
    if held and not config.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} already holds a run ({held[-1]}): go on with it by --resume_from_checkpoint"
            " latest, replace it by --overwrite_output_dir, or name another folder"
        )
    return None


def prepare_output_dir(config: TrainConfig) -> Path:
    """Create the output folder; with --overwrite_output_dir delete the run it holds, and nothing else.

    Raises:
        UserError: the folder cannot be written.
    """
    output_dir = Path(config.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if config.overwrite_output_dir:
            for path in [output_dir / name for name in RUN_FILES] + checkpoints(output_dir):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written ({error.strerror}): name another") from None
    return output_dir


def save_checkpoint(
    output_dir: Path, step: int, write_model: Callable[[Path], None], training_state: dict[str, Any]
) -> Path:
    """Write checkpoint-STEP beside its place and rename it, so that a folder of that name is always whole.

    Args:
        output_dir: the run's folder.
        step: optimizer steps taken.
        write_model: writes the model's files into a folder.
        training_state: of `capture_state`.
    """
    staging, final = output_dir / f".staging-{step}", output_dir / f"checkpoint-{step}"
    for leftover in (staging, final):
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir()
    write_model(staging)
    torch.save(training_state, staging / STATE_FILE)
    os.replace(staging, final)
    return final


def remove_old_checkpoints(output_dir: Path, limit: int, best_step: int | None) -> None:
    """Keep the newest `limit` checkpoints (0: all), counting the best among them, which is never removed."""
    found = checkpoints(output_dir)
    kept = [path for path in found if step_of(path) == best_step]
    for path in reversed(found):
        # The newest one stays in any case: it is the only one to resume from without loss.
        if path not in kept and (len(kept) < limit or path == found[-1]):
            kept.append(path)
    for path in found:
        if limit and path not in kept:
            shutil.rmtree(path)


def capture_state(
    config: TrainConfig, optimizer: AdamW, schedule: LambdaLR, precision: Precision, run: dict[str, Any]
) -> dict[str, Any]:
    """Return all that a run needs, besides the model, to continue as if it had not stopped.

    The position in the data is the step itself, since the order is a function of seed and epoch.
    """
    return {
        "config": asdict(config),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "scaler": precision.scaler.state_dict(),
        "random_state": random_state(precision.device),
        "run": run,
    }


def load_state(checkpoint: Path, config: TrainConfig) -> dict[str, Any]:
    """Read the state of `capture_state`; only tensors and plain values are loaded, no code.

    Raises:
        UserError: it cannot be read, or belongs to a run that computes something else.
    """
    path = checkpoint / STATE_FILE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["config"]
    except Exception as error:  # torch.load raises dozens of types for what is one case to the user
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): resume from another checkpoint"
        ) from None
    now = asdict(config)
    for name, value in saved.items():
        if name not in FREE_TO_CHANGE and value != now.get(name):
            raise UserError(
                f"{checkpoint} was trained with --{name} {value}, not {now.get(name)}: resume with the same value, or"
                " start anew in another --output_dir"
            )
    return state


def restore_state(state: dict[str, Any], optimizer: AdamW, schedule: LambdaLR, precision: Precision) -> None:
    """Put a loaded state into the objects of a run. The model is loaded by itself, from the same folder."""
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    precision.scaler.load_state_dict(state["scaler"])
    set_random_state(state["random_state"], precision.device)
