"""The command `python -m emoft.gradients RUN_DIR`: say in plain words what is wrong with a training run."""

import json
import sys
from pathlib import Path

from emoft import start
from emoft.config import GradientsConfig
from emoft.errors import UserError, run
from emoft.gradients.curves import find_events
from emoft.gradients.diagnosis import report


def check(config: GradientsConfig) -> None:
    """See what can be told at once of the flags.

    Raises:
        UserError: there is no run, or the flags contradict each other.
    """
    find_events(Path(config.run_dir))
    if config.gradient_norms and not config.step:
        raise UserError("--gradient_norms shows those of the texts of a step: add --step")


def main(config: GradientsConfig) -> int:
    """Read the run and say what is wrong with it, or what a step was computed on."""
    if not config.step:
        report(config)
        return 0
    start.loading(sys.stderr)
    from emoft.gradients.texts import as_json, describe, texts_of_step  # here: it takes seconds

    start.libraries_are_loaded()
    found = texts_of_step(config)
    print(json.dumps(as_json(found), indent=2, ensure_ascii=False) if config.json else describe(found))
    return 0


flags = start.read_flags(GradientsConfig, check)
run(lambda: main(flags))
