"""The command `python -m emoft.gradients RUN_DIR`: say in plain words what is wrong with a training run."""

from pathlib import Path

from emoft import start
from emoft.config import GradientsConfig
from emoft.errors import run
from emoft.gradients.curves import find_events
from emoft.gradients.diagnosis import report


def main(config: GradientsConfig) -> int:
    """Read the run and say what is wrong with it."""
    report(config)
    return 0


flags = start.read_flags(GradientsConfig, lambda config: find_events(Path(config.run_dir)))
run(lambda: main(flags))
