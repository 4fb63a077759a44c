"""What the reports of a step have in common: where it came from, and the file that holds all of it."""

from typing import Any

from emoft.data.steps import Step
from emoft.errors import warn
from emoft.files import write_json
from emoft.run.setup import Setup


def origin(setup: Setup, step: Step) -> dict[str, Any]:
    """Return where a step came from."""
    return {
        "examples": step.examples,
        "epoch": (step.number - 1) // setup.loader.steps_per_epoch,
        "seed": setup.config.seed,
        "learning_rate": step.learning_rate,
        "precision": setup.runtime.precision.name,
    }


def write_report(setup: Setup, file: str, content: dict[str, Any]) -> None:
    """Write a report into the folder of the run, on rank 0; without room for it the run goes on."""
    if setup.runtime.world.is_main:
        try:
            write_json(setup.output_dir / file, content)
        except OSError as error:
            warn(f"{file} cannot be written ({error.strerror})")
