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


def resume_command(config: TrainConfig, world: "World", *changes: str) -> str:
    """Return the command that continues a run that was stopped, with flags that may be changed then."""
    words = [word for word in sys.argv if word not in ("--overwrite_output_dir", "--overwrite-output-dir")]
    if config.overwrite_output_dir and _still_overwrites(words[1:]):  # it has a value, or is in the file of --config
        words = [*sys.argv, "--overwrite_output_dir", "false"]  # of a flag given twice the last one counts
    if config.resume_from_checkpoint != "latest":
        words += ["--resume_from_checkpoint", "latest"]
    words += changes  # of a flag given twice the last one counts
    if world.hosts > 1:
        return f"torchrun (with its options, on each host) {shlex.join(words)}"
    return shlex.join([*(["torchrun", f"--nproc_per_node={world.size}"] if world.launched else [python()]), *words])


def less_memory(config: TrainConfig, micro_batch_size: int) -> tuple[list[str], str]:
    """Return flags with which the same steps need less memory, and what these flags do.

    Args:
        config: all flags.
        micro_batch_size: that does not fit, at most the flag's.
    """
    if changes := smaller_micro_batches(config, micro_batch_size):
        return changes, "go on with less at once, which computes the same"
    return ["--gradient_checkpointing"], (
        "go on with fewer activations kept, or take a smaller model or shorter texts (--max_length)"
    )


def smaller_micro_batches(config: TrainConfig, below: int) -> list[str]:
    """Return the flags of the same steps in micro-batches smaller than those that do not fit; none if they are 1."""
    size = config.per_device_train_batch_size
    smaller = next((part for part in range(min(size // 2, below - 1), 0, -1) if size % part == 0), 0)
    if not smaller:
        return []
    accumulation = config.gradient_accumulation_steps * size // smaller
    return [f"--per_device_train_batch_size={smaller}", f"--gradient_accumulation_steps={accumulation}"]


def _still_overwrites(words: list[str]) -> bool:
    try:
        return parse_config(TrainConfig, words).overwrite_output_dir
    except UserError:  # its value now stands alone
        return True


def generate_command(model_dir: Path, emotion: str = "") -> str:
    """Return the command that lets a model write, for an emotion if its template can be steered by one."""
    steer = ["--emotion", emotion, "--do_sample"] if emotion else []
    return shlex.join([python(), "generate.py", "--model_name_or_path", str(model_dir), *steer])
