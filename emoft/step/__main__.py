"""The command `python -m emoft.step`: show one optimization step of train.py with its real numbers."""

import importlib.util
import json
import os
import sys
from pathlib import Path

from emoft import start
from emoft.config import TrainConfig
from emoft.errors import UserError, run
from emoft.files import finite, write_text
from emoft.step.config import StepConfig


def check(config: StepConfig) -> None:
    """See what can be told at once of the flags.

    Raises:
        UserError: they cannot be followed.
    """
    if "LOCAL_RANK" in os.environ:
        raise UserError("a step is shown by one process: start it without torchrun")
    if importlib.util.find_spec("train") is None:
        raise UserError("the step is one of train.py: start it in the folder that holds train.py")
    start.check_inputs(TrainConfig(**config.of_training()))
    if config.output:
        folder = Path(config.output).resolve().parent
        if Path(config.output).is_dir():
            raise UserError(f"--output {config.output} is a folder: name a file in it, such as page.html")
        if not folder.is_dir():
            raise UserError(f"--output {config.output}: there is no folder {folder}, make it first or name another")


def main(config: StepConfig) -> int:
    """Watch the step and show it; the exit code is 1 if two numbers disagree that must agree."""
    start.loading(sys.stderr)
    from emoft.step.page import write_page  # here, and below: they take seconds
    from emoft.step.story import tell
    from emoft.step.terminal import describe
    from emoft.step.watch import watch_step

    start.libraries_are_loaded()
    numbers = watch_step(config)
    story = tell(numbers, config.language)
    print(json.dumps(finite(numbers.as_json()), indent=2, ensure_ascii=False) if config.json else describe(story))
    if config.output:
        sys.stdout.flush()  # what is known is shown before the file may fail
        try:
            write_text(Path(config.output), write_page(story))
        except OSError as error:
            raise UserError(
                f"--output {config.output} cannot be written ({error.strerror}): make room, or name another file"
            ) from None
        print(f"saved {config.output}", file=sys.stderr)
    return 0 if numbers.agrees else 1


flags = start.read_flags(StepConfig, check)
run(lambda: main(flags))
