"""The folder of a run: kept for one run, its checkpoints written whole or not at all, the old ones removed."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from emoft.checkpoints.manifest import has_all_files, write_manifest
from emoft.checkpoints.search import RUN_FILES, checkpoints, step_of
from emoft.checkpoints.state import TrainingState
from emoft.config import TrainConfig, save_config
from emoft.distributed.parallel import whole_weights
from emoft.distributed.world import World
from emoft.errors import UserError, warn
from emoft.files import CONFIG_FILE, RESULTS_FILE, TRAINING_STATE_FILE, VOCABULARY_FILES, write_json
from emoft.model.loading import TextModel, save_model
from emoft.tracking.tracker import Tracker

try:
    import fcntl
except ImportError:  # Windows has no locks on folders: there a file is locked, which stays behind
    fcntl = None  # type: ignore[assignment]

STAGING, ASIDE = ".staging-", ".aside-"  # what is being written, and what it will replace


class SaveError(UserError):
    """Something could not be written; what was written before is whole."""


@contextlib.contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Create the output folder and keep every other run out of it until this context ends, or the process dies.

    The lock is on the folder itself and belongs to the process, so that nothing is left of it. `filelock` would do the
    same on a file, which it leaves behind; it serves where folders cannot be locked.

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
    lock = FileLock(output_dir / ".lock", timeout=0)
    try:
        if folder is not None:
            _lock(folder, output_dir)
        else:
            _lock_file(lock, output_dir)
        yield
    finally:
        if folder is not None:
            os.close(folder)
        lock.release()
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
    except OSError as error:
        warn(
            f"--output_dir {output_dir} is on a disk that cannot lock it ({error.strerror}): begin no second run there"
        )


def _lock_file(lock: BaseFileLock, output_dir: Path) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"--output_dir {output_dir} is in use by another run: wait for its end, or name another folder"
        ) from None


def prepare_output_dir(config: TrainConfig, resumes: bool = False) -> Path:
    """Make the folder, which should be `locked`, ready for a run; with --overwrite_output_dir delete the run it holds.

    What a run that was killed while saving left behind is swept.

    Args:
        config: names the folder.
        resumes: the run goes on from a checkpoint, and what the folder holds is its own.

    Raises:
        UserError: the folder cannot be written.
    """
    output_dir = Path(config.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if config.overwrite_output_dir and not resumes:
            # Not every tokenizer has a vocabulary to replace that of the run before.
            for path in [output_dir / name for name in (*RUN_FILES, *VOCABULARY_FILES)] + checkpoints(output_dir):
                _remove(path)
            for path in [*output_dir.glob("nonfinite-*.json"), *output_dir.glob("spike-*.json")]:
                path.unlink()
        sweep(output_dir)
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written ({error.strerror}): name another") from None
    return output_dir


def begin_output_dir(config: TrainConfig, world: World, resumes: bool) -> Path:
    """Make the folder ready for a run, and write its configuration there; see `prepare_output_dir`.

    A plan of a run writes nothing.
    """
    if config.plan:
        return Path(config.output_dir)
    output_dir = world.on_main(lambda: prepare_output_dir(config, resumes))
    world.on_main(world.begin_run)
    world.on_main(lambda: save_config(config, output_dir / CONFIG_FILE))
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


@dataclass
class Saver:
    """Writes the checkpoints of a run and its final model. Each method is a collective: rank 0 alone writes."""

    config: TrainConfig
    world: World
    output_dir: Path
    text_model: TextModel
    tracker: Tracker
    state: TrainingState

    def __post_init__(self) -> None:
        self.saved = self.state.restored_from  # the latest checkpoint; none if it could not be written
        self.has_failed = False  # to write it

    def save(self) -> Path | None:
        """Write a checkpoint, without those that are too many now.

        Returns:
            Its folder; None where it could not be written, for want of space for example: the run goes on with the
            checkpoints that it has.
        """
        run, config = self.tracker.run, self.config
        with self.tracker.clock_stopped():
            weights = whole_weights(self.text_model.model, self.world)
            state = self.state.capture(self.tracker.state_for_checkpoint())

            def write() -> Path | None:
                try:
                    folder = save_checkpoint(
                        self.output_dir, run.step, lambda place: self._write(place, weights), state
                    )
                    best_step = run.best_step if config.load_best_model_at_end else None
                    remove_old_checkpoints(self.output_dir, config.save_total_limit, best_step, folder)
                except SaveError as error:
                    self.tracker.warn(f"{error}; training goes on, and the next log entry tries again")
                    return None
                return folder

            self.saved = self.world.on_main(write)
        self.has_failed = self.saved is None
        return self.saved

    def export(self) -> None:
        """Write the final model into the run's folder.

        Raises:
            SaveError: it cannot be written.
        """
        weights = whole_weights(self.text_model.model, self.world)
        self.world.on_main(lambda: export(self.output_dir, lambda folder: self._write(folder, weights)))

    def write_results(self, results: dict[str, Any]) -> None:
        """Write the figures of the finished run, and its log once more, which holds the last of them.

        Raises:
            SaveError: they cannot be written.
        """

        def write(folder: Path) -> None:
            self.tracker.write_state(folder)
            write_json(folder / RESULTS_FILE, results)

        self.world.on_main(lambda: export(self.output_dir, write))

    def _write(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_model(folder, self.text_model, weights)
        self.tracker.write_state(folder)


def save_checkpoint(
    output_dir: Path, step: int, write_model: Callable[[Path], None], training_state: dict[str, Any]
) -> Path:
    """Write checkpoint-STEP beside its place, flush it to the disk, and rename it: it is there whole, or not at all.

    Args:
        output_dir: the run's folder.
        step: optimizer steps taken.
        write_model: writes the model's files into a folder.
        training_state: of `TrainingState.capture`.

    Raises:
        SaveError: it cannot be written, for want of space for example. What was there before still is.
    """
    final, aside = output_dir / f"checkpoint-{step}", output_dir / f"{ASIDE}{step}"
    with staged(output_dir, str(step)) as staging:
        write_model(staging)
        torch.save(training_state, staging / TRAINING_STATE_FILE)
        write_manifest(staging, step)
        flush(staging)
        if final.exists():  # of this same step, saved before its evaluation
            os.replace(final, aside)
        os.replace(staging, final)
        _flush_folder(output_dir)
        shutil.rmtree(aside, ignore_errors=True)
    return final


def export(output_dir: Path, write: Callable[[Path], None]) -> None:
    """Write files into the run's folder, each of them whole or not at all.

    Raises:
        SaveError: they cannot be written.
    """
    with staged(output_dir, "final") as staging:
        write(staging)
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


def remove_old_checkpoints(output_dir: Path, limit: int, best_step: int | None, saved: Path) -> None:
    """Keep so many whole checkpoints, and remove the others: what was just saved, the best, and the newest.

    Folders without a manifest of ours, as `transformers.Trainer` leaves them, are somebody else's and stay.

    Args:
        output_dir: the run's folder.
        limit: how many; 0 keeps all.
        best_step: of the best model so far, if it is to be kept.
        saved: the checkpoint that was just written.
    """
    if not limit:
        return
    is_whole = {path: whole for path in checkpoints(output_dir) if (whole := has_all_files(path)) is not None}
    kept = [path for path in is_whole if path == saved or (step_of(path) == best_step and is_whole[path])]
    for path in reversed(is_whole):
        if path not in kept and is_whole[path] and len(kept) < limit:
            kept.append(path)
    for path in is_whole:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


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
