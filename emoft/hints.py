"""The commands that the program tells people to type, as they would have to be typed here."""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from emoft.command_line import parse_config
from emoft.config import TrainConfig
from emoft.errors import UserError

if TYPE_CHECKING:
    from emoft.distributed.world import World


def python() -> str:
    """Return the interpreter that runs this, as one would call it: by its name, or by its path."""
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found and Path(found) == Path(sys.executable):
            return name
    path = os.path.relpath(sys.executable)
    return sys.executable if path.startswith("..") else path


def resume_command(config: TrainConfig, world: "World") -> str:
    """Return the command that continues a run that was stopped."""
    words = [word for word in sys.argv if word not in ("--overwrite_output_dir", "--overwrite-output-dir")]
    if config.overwrite_output_dir and _still_overwrites(words[1:]):  # it has a value, or is in the file of --config
        words = [*sys.argv, "--overwrite_output_dir", "false"]  # of a flag given twice the last one counts
    if config.resume_from_checkpoint != "latest":
        words += ["--resume_from_checkpoint", "latest"]
    if world.hosts > 1:
        return f"torchrun (with its options, on each host) {shlex.join(words)}"
    return shlex.join([*(["torchrun", f"--nproc_per_node={world.size}"] if world.launched else [python()]), *words])


def _still_overwrites(words: list[str]) -> bool:
    try:
        return parse_config(TrainConfig, words).overwrite_output_dir
    except UserError:  # its value now stands alone
        return True


def generate_command(model_dir: Path, emotion: str = "") -> str:
    """Return the command that lets a model write, for an emotion if its template can be steered by one."""
    steer = ["--emotion", emotion, "--do_sample"] if emotion else []
    return shlex.join([python(), "generate.py", "--model_name_or_path", str(model_dir), *steer])
