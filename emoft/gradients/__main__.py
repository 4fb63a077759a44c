"""The command `python -m emoft.gradients RUN_DIR`: say in plain words what is wrong with a training run."""

import json
import sys
from pathlib import Path
from typing import Any

from emoft import start
from emoft.config import GradientsConfig
from emoft.errors import UserError, run
from emoft.gradients import comparison
from emoft.gradients.curves import find_events
from emoft.gradients.diagnosis import report


def check(config: GradientsConfig) -> None:
    """See what can be told at once of the flags.

    Raises:
        UserError: there is no run, or the flags contradict each other.
    """
    if config.leak:
        if config.run_dir or config.step:
            raise UserError("--leak looks at a model, not at a run: leave RUN_DIR and --step away")
        return
    if not config.run_dir:
        raise UserError(
            "name a RUN_DIR: an output folder of train.py, of a finished or a running run, as in"
            f" {next(iter(config.command.examples))}"
        )
    for run_dir in (config.run_dir, config.other_run):
        if run_dir:
            find_events(Path(run_dir))
    if config.other_run and config.step:
        raise UserError("--step shows the texts of one run: name one RUN_DIR")
    if config.gradient_norms and not config.step:
        raise UserError("--gradient_norms shows those of the texts of a step: add --step")


def show(config: GradientsConfig, found: Any, lines: list[str]) -> None:
    """Print what was found, as JSON or in words."""
    print(json.dumps(found, indent=2, ensure_ascii=False) if config.json else "\n".join(lines))


def main(config: GradientsConfig) -> int:
    """Do what the flags ask for: say what is wrong with a run, and so on."""
    if config.other_run:
        compared = comparison.compare_runs(config)
        show(config, comparison.as_json(compared), compared.describe())
        return 0
    if not (config.step or config.leak):
        report(config)
        return 0
    start.loading(sys.stderr)
    from emoft.gradients import leaks, texts  # here: they take seconds

    start.libraries_are_loaded()
    if config.leak:
        checked = leaks.check_model(config.leak)
        show(config, leaks.as_json(checked), [line for each in checked for line in each.describe()])
    else:
        found = texts.texts_of_step(config)
        show(config, texts.as_json(found), [texts.describe(found)])
    return 0


flags = start.read_flags(GradientsConfig, check)
run(lambda: main(flags))
