"""Which checkpoints a folder holds, and which of them a run goes on from."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from emoft.checkpoints.manifest import damage
from emoft.config import INPUT_FILES, TrainConfig
from emoft.errors import UserError, warn
from emoft.files import (
    CONFIG_FILE,
    EVENTS_FOLDER,
    FORMAT_FILE,
    RESULTS_FILE,
    TRAINER_STATE_FILE,
    TRAINING_STATE_FILE,
    VOCABULARY_FILES,
    WEIGHTS_FILE,
)

if TYPE_CHECKING:  # it imports torch, and what is told here is told before that
    from emoft.distributed.world import World

NAME = re.compile(r"checkpoint-(\d+)")
# What a finished or interrupted run leaves besides its checkpoints; deleted by --overwrite_output_dir.
RUN_FILES = (TRAINER_STATE_FILE, RESULTS_FILE, CONFIG_FILE, FORMAT_FILE, WEIGHTS_FILE, EVENTS_FOLDER)


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, in the order of their steps; whether they are whole says `damage`."""
    found = [path for path in output_dir.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of a folder checkpoint-STEP."""
    match = NAME.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def find_checkpoint(config: TrainConfig, world: "World") -> Path | None:
    """Return the checkpoint to resume from, or None for a fresh start.

    A run that torchrun has restarted goes on from its newest, whatever the flags say.

    Raises:
        UserError: the output folder holds a run that the flags do not speak of, or the checkpoint that they name does
            not exist or is damaged.
    """
    output_dir = Path(config.output_dir)
    wanted, is_restart = config.resume_from_checkpoint, world.has_begun_run()
    if wanted and config.overwrite_output_dir:
        raise UserError("--resume_from_checkpoint and --overwrite_output_dir contradict each other: drop one")
    if wanted == "latest" or is_restart:
        for checkpoint in reversed(checkpoints(output_dir)):
            if reason := damage(checkpoint):
                warn(f"{checkpoint} is damaged ({reason}) and is not loaded: trying the one before")
                continue
            print(f"resuming from {checkpoint}")
            return checkpoint
    if wanted == "latest" or (is_restart and not wanted):
        print(f"no checkpoint in {output_dir} yet: starting from the beginning")
        return None
    if wanted:
        if not (Path(wanted) / TRAINING_STATE_FILE).is_file():
            raise UserError(
                f"--resume_from_checkpoint {wanted} is no checkpoint (no {TRAINING_STATE_FILE} in it): check the path"
            )
        if reason := damage(Path(wanted)):
            raise UserError(
                f"--resume_from_checkpoint {wanted} is damaged ({reason}): name another one, or `latest`, which takes"
                " the newest that is whole"
            )
        return Path(wanted)
    refuse_another_run(config)
    return None


def refuse_another_run(config: TrainConfig) -> None:
    """See that a run which starts from the beginning finds no other one in its folder, unless it may delete it.

    Raises:
        UserError: it does.
    """
    output_dir = Path(config.output_dir)
    held = [name for name in RUN_FILES if (output_dir / name).exists()]
    held += [path.name for path in checkpoints(output_dir)]
    if held and not config.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output_dir} already holds a run ({held[-1]}): go on with it by --resume_from_checkpoint"
            " latest, replace it by --overwrite_output_dir, or name another folder"
        )
    if config.overwrite_output_dir:
        _refuse_to_delete_inputs(config, output_dir)


def _refuse_to_delete_inputs(config: TrainConfig, output_dir: Path) -> None:
    """See that --overwrite_output_dir deletes nothing that the run starts from; if it is killed, that would be lost.

    Raises:
        UserError: it would.
    """
    root = output_dir.resolve()
    deleted = {(output_dir / name).resolve() for name in (*RUN_FILES, *VOCABULARY_FILES)} | {
        path.resolve() for path in checkpoints(output_dir)
    }
    for name in ("model_name_or_path", "tokenizer_name", "dataset_name", *INPUT_FILES):
        value = getattr(config, name)
        if not value or not (path := Path(value)).exists():
            continue
        path = path.resolve()
        if path == root or any(path == each or each in path.parents for each in deleted):
            raise UserError(
                f"--overwrite_output_dir would delete --{name} {value}, which the run starts from: name another"
                " --output_dir"
            )
