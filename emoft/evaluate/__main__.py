"""The command `python -m emoft.evaluate`: a saved model on a split, and the texts that it writes."""

import sys
from pathlib import Path

from emoft import start
from emoft.config import EvaluateConfig
from emoft.data.sources import check_file, is_folder
from emoft.errors import UserError, run
from emoft.files import make_folder


def check(config: EvaluateConfig) -> None:
    """See what can be told at once of the flags, and make the output folder before the long work.

    Raises:
        UserError: they cannot be followed.
    """
    for name in ("train_file", "test_file"):
        if value := getattr(config, name):
            check_file(f"--{name}", value)
    if config.judge_model:
        if not config.generate:
            raise UserError(
                f"--judge_model {config.judge_model} judges the texts that the model writes: give --generate N too"
            )
        is_folder(config.judge_model, "model", "judge_model")
    if config.output_dir:
        make_folder(Path(config.output_dir))


def main(config: EvaluateConfig) -> int:
    """Evaluate."""
    # Here, since it takes seconds to import.
    from emoft.evaluate.assessment import assess_model

    start.libraries_are_loaded()
    assess_model(config)
    return 0


flags = start.read_flags(EvaluateConfig, check)
start.loading(sys.stderr)
run(lambda: main(flags))
