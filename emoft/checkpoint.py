"""Checkpoints: written whole or not at all, verified before they are loaded, and exact to resume from."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from emoft.config import CONFIG_FILE, TrainConfig, config_text
from emoft.distributed import World
from emoft.errors import UserError, warn
from emoft.parallel import load_optimizer_state, whole_optimizer_state
from emoft.precision import Precision
from emoft.randomness import random_state, seed_rank, set_random_state
from emoft.tracking import RunState

try:
    import fcntl
except ImportError:  # Windows: no locks on folders
    fcntl = None  # type: ignore[assignment]

STATE_FILE = "training_state.pt"
STATE = {"examples_per_step", "data_checksum", "optimizer", "schedule", "scaler", "random_states", "run"}
MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")
STAGING, ASIDE = ".staging-", ".aside-"  # what is being written, and what it will replace
# What a finished or interrupted run leaves besides its checkpoints; deleted by --overwrite_output_dir.
RUN_FILES = ("trainer_state.json", "all_results.json", CONFIG_FILE, "emoft.json", "model.safetensors", "runs")
# Flags that a resumed run may change; all others alter the computation. What the data flags stand for, the tokens
# themselves, is compared by checksum.
FREE_TO_CHANGE = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "use_cpu",
    "per_device_eval_batch_size", "gradient_checkpointing", "torch_compile", "early_stopping_patience",
    "load_best_model_at_end", "model_name_or_path", "config_overrides", "vocab_size", "tokenizer_name", "test_file",
    "log_gradients_every", "sample_every", "on_nonfinite", "train_file", "validation_file", "dataset_name",
    "dataset_config_name", "delimiter", "column_names", "text_column", "label_column", "max_train_samples", "parallel",
    "drop_duplicates",
}  # fmt: skip
# Together with the number of ranks they say how many examples a step has: see `examples_per_step`.
STEP_SIZE = ("per_device_train_batch_size", "gradient_accumulation_steps")


class SaveError(UserError):
    """Something could not be written; what was written before is whole."""


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, in the order of their steps; whether they are whole says `damage`."""
    found = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of a folder checkpoint-STEP."""
    match = NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def find_checkpoint(config: TrainConfig, world: World) -> Path | None:
    """Return the checkpoint to resume from, or None for a fresh start.

    A run that torchrun has restarted goes on from its latest, whatever the flags say.

    Raises:
        UserError: the output folder cannot be used, holds a run that the flags do not speak of, or the checkpoint
            that they name does not exist or is damaged.
    """
    output_dir = Path(config.output_dir)
    wanted = config.resume_from_checkpoint
    if world.restarts and wanted != "latest" and _is_of_same_run(config):
        wanted = "latest"
    elif wanted and config.overwrite_output_dir:
        raise UserError("--resume_from_checkpoint and --overwrite_output_dir contradict each other: drop one")
    if wanted == "latest":
        for checkpoint in reversed(checkpoints(output_dir)):
            if reason := damage(checkpoint):
                warn(f"{checkpoint} is damaged ({reason}) and is not loaded: trying the one before")
                continue
            print(f"resuming from {checkpoint}")
            return checkpoint
        print(f"no checkpoint in {output_dir} yet: starting from the beginning")
        return None
    if wanted:
        if not (Path(wanted) / STATE_FILE).is_file():
            raise UserError(
                f"--resume_from_checkpoint {wanted} is no checkpoint (no {STATE_FILE} in it): check the path"
            )
        if reason := damage(Path(wanted)):
            raise UserError(
                f"--resume_from_checkpoint {wanted} is damaged ({reason}): name another one, or `latest`, which takes"
                " the newest that is whole"
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


def _is_of_same_run(config: TrainConfig) -> bool:
    try:
        kept = (Path(config.output_dir) / CONFIG_FILE).read_text(encoding="utf-8")
    except OSError:
        return False
    return kept == config_text(config)


@contextlib.contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Create the output folder and keep every other run out of it until this context ends, or the process dies.

    The lock is on the folder itself and belongs to the process, so that nothing is left of it.

    Raises:
        UserError: another run has it, or the folder cannot be made.
    """
    is_new = not output_dir.exists()
    if not is_new and not output_dir.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file: name a folder")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        folder = os.open(output_dir, os.O_RDONLY) if fcntl else None
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written ({error.strerror}): name another") from None
    try:
        if folder is not None:
            _lock(folder, output_dir)
        yield
    finally:
        if folder is not None:
            os.close(folder)
        if is_new:
            with contextlib.suppress(OSError):
                output_dir.rmdir()  # if it is still empty, the run never began


def _lock(folder: int, output_dir: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"--output_dir {output_dir} is in use by another run: wait for its end, or name another folder"
        ) from None
    except OSError:
        pass  # a file system without locks


def prepare_output_dir(config: TrainConfig) -> Path:
    """Make the folder, which should be `locked`, ready for a run; with --overwrite_output_dir delete the run it holds.

    What a run that was killed while saving left behind is swept.

    Raises:
        UserError: the folder cannot be written.
    """
    output_dir = Path(config.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if config.overwrite_output_dir:
            for path in [output_dir / name for name in RUN_FILES] + checkpoints(output_dir):
                _remove(path)
            for path in output_dir.glob("nonfinite-*.json"):
                path.unlink()
        sweep(output_dir)
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written ({error.strerror}): name another") from None
    return output_dir


def sweep(output_dir: Path) -> None:
    """Remove what killed runs left while saving; what they had only put aside is put back."""
    for aside in output_dir.glob(f"{ASIDE}*"):
        final = output_dir / f"checkpoint-{aside.name.removeprefix(ASIDE)}"
        if final.exists():
            shutil.rmtree(aside)
        else:
            os.replace(aside, final)
    for leftover in [*output_dir.glob(f"{STAGING}*"), *output_dir.glob(".*.tmp")]:
        _remove(leftover)


def save_checkpoint(
    output_dir: Path, step: int, write_model: Callable[[Path], None], training_state: dict[str, Any]
) -> Path:
    """Write checkpoint-STEP beside its place, flush it to the disk, and rename it: it is there whole, or not at all.

    Args:
        output_dir: the run's folder.
        step: optimizer steps taken.
        write_model: writes the model's files into a folder.
        training_state: of `capture_state`.

    Raises:
        SaveError: it cannot be written, for want of space for example. What was there before still is.
    """
    final, aside = output_dir / f"checkpoint-{step}", output_dir / f"{ASIDE}{step}"
    with staged(output_dir, str(step)) as staging:
        write_model(staging)
        torch.save(training_state, staging / STATE_FILE)
        write_manifest(staging, step)
        flush(staging)
        if final.exists():  # of this same step, saved before its evaluation
            os.replace(final, aside)
        os.replace(staging, final)
        _flush_folder(output_dir)
        shutil.rmtree(aside, ignore_errors=True)
    return final


def export(output_dir: Path, write_model: Callable[[Path], None]) -> None:
    """Write the final model's files into the run's folder, each of them whole or not at all.

    Raises:
        SaveError: they cannot be written.
    """
    with staged(output_dir, "final") as staging:
        write_model(staging)
        flush(staging)
        for path in sorted(staging.iterdir()):
            os.replace(path, output_dir / path.name)
        _flush_folder(output_dir)


@contextlib.contextmanager
def staged(output_dir: Path, name: str) -> Iterator[Path]:
    """Give a folder to write into, which is gone when the context ends.

    Raises:
        SaveError: the writing failed.
    """
    staging = output_dir / f"{STAGING}{name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
    except (OSError, SafetensorError, RuntimeError) as error:  # the last one is torch.save's
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        free = shutil.disk_usage(output_dir).free
        raise SaveError(f"cannot save in {output_dir}, where {free:,} bytes are free: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
            shutil.rmtree(path, ignore_errors=True)


# ---- What is whole: a manifest of sizes and checksums ----------------------------------------------------------------


def write_manifest(folder: Path, step: int) -> None:
    """Write the size and the SHA-256 of each file of a folder, and of that list itself."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": checksum(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(_manifest_text({"step": step, "files": files}), encoding="utf-8")


def _manifest_text(content: dict[str, Any]) -> str:
    body = json.dumps(content, indent=2, sort_keys=True)
    return f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n"


def damage(checkpoint: Path) -> str:
    """Return what is wrong with a checkpoint, or nothing if all of its files are as they were written."""
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        content = json.loads(text.rpartition("}")[0] + "}")
        if text != _manifest_text(content):
            return f"{MANIFEST} was altered"
        if NAME.fullmatch(checkpoint.name) and content["step"] != step_of(checkpoint):
            return f"it is that of step {content['step']}"
        for name, expected in content["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {expected['size']:,}"
            if checksum(path) != expected["sha256"]:
                return f"{name} was altered"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if STATE_FILE not in content["files"]:
        return f"{STATE_FILE} is missing"
    return ""


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(folder: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- The state of a run, besides its model ---------------------------------------------------------------------------


def capture_state(
    config: TrainConfig,
    world: World,
    examples_per_step: int,
    data_checksum: str,
    optimizer: AdamW,
    schedule: LambdaLR,
    precision: Precision,
    run: dict[str, Any],
) -> dict[str, Any]:
    """Return all that a run needs, besides the model, to continue as if it had not stopped; a collective.

    The position in the data is the step itself, since the order is a function of seed and epoch. What other ranks than
    0 return lacks the optimizer's state.
    """
    return {
        "config": asdict(config),
        "examples_per_step": examples_per_step,
        "data_checksum": data_checksum,
        "optimizer": whole_optimizer_state(optimizer, world),
        "schedule": schedule.state_dict(),
        "scaler": precision.scaler.state_dict(),
        "random_states": world.gather(random_state(precision.device)),
        "run": run,
    }


def load_state(checkpoint: Path, config: TrainConfig) -> dict[str, Any]:
    """Read the state of `capture_state`; only tensors and plain values are loaded, no code.

    Raises:
        UserError: it cannot be read, or belongs to a run that computes something else.
    """
    path = checkpoint / STATE_FILE
    try:
        with warnings.catch_warnings(action="ignore"):  # of a strange file: the refusal below says enough
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["config"]
        missing = STATE - set(state)
        if missing:
            raise KeyError(", ".join(sorted(missing)))
    except Exception as error:  # torch.load raises dozens of types for what is one case to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({reason}): resume from another checkpoint") from None
    now = asdict(config)
    changed = [
        f"--{name} {value}, not {now.get(name)}"
        for name, value in saved.items()
        if name not in FREE_TO_CHANGE and name not in STEP_SIZE and value != now.get(name)
    ]
    if changed:
        raise UserError(
            f"{checkpoint} was trained with {'; '.join(changed)}: resume with the same values, or start anew in another"
            " --output_dir"
        )
    return state


def examples_per_step(config: TrainConfig, world: World, saved: dict[str, Any] | None) -> int:
    """Return how many examples an optimizer step has, over all ranks and micro-batches.

    A resumed run keeps the number it began with, on as many ranks as there are now, so that it computes the same.

    Args:
        config: all flags.
        world: all ranks.
        saved: the state that the run resumes from, of `load_state`.

    Raises:
        UserError: the flags ask a resumed run for another number.
    """
    asked = world.size * config.per_device_train_batch_size * config.gradient_accumulation_steps
    if not saved or saved["examples_per_step"] == asked:
        return asked
    kept = int(saved["examples_per_step"])
    changed = [name for name in STEP_SIZE if saved["config"].get(name) != getattr(config, name)]
    if changed:
        raise UserError(
            f"the run that you resume has {kept} examples a step, which --{changed[0]} {getattr(config, changed[0])}"
            f" makes {asked}: leave it as it was ({saved['config'].get(changed[0])}), on any number of processes, or"
            " start anew in another --output_dir"
        )
    return kept


def check_data(state: dict[str, Any], data_checksum: str, checkpoint: Path, config: TrainConfig) -> None:
    """See that a run goes on with the texts that it began with.

    Raises:
        UserError: it does not.
    """
    if state["data_checksum"] == data_checksum:
        return
    now = asdict(config)
    names = ("train_file", "dataset_name", "dataset_config_name", "delimiter", "text_column", "label_column",
             "column_names", "drop_duplicates", "max_train_samples")  # fmt: skip
    changed = [f"--{name} {state['config'][name]}, not {now[name]}" for name in names
               if state["config"].get(name) != now[name]]  # fmt: skip
    raise UserError(
        f"{checkpoint} was trained on other texts ({'; '.join(changed) or 'the data themselves have changed'}): resume"
        " with the same data, or start anew in another --output_dir"
    )


def restore_state(
    state: dict[str, Any], config: TrainConfig, world: World, optimizer: AdamW, schedule: LambdaLR, precision: Precision
) -> RunState:
    """Put a loaded state into the objects of a run. The model is loaded by itself, from the same folder.

    On another number of ranks, dropout draws new random numbers.

    Returns:
        What the run knows about itself.

    Raises:
        UserError: the state is not of this model.
    """
    try:
        load_optimizer_state(optimizer, state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        precision.scaler.load_state_dict(state["scaler"])
        run = RunState(**state["run"])
        if len(state["random_states"]) == world.size:
            set_random_state(state["random_states"][world.rank], precision.device)
        else:
            seed_rank(config.seed, world.rank, run.step)
        return run
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(f"{STATE_FILE} does not fit the model ({error}): resume from another checkpoint") from None
