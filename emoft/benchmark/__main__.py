"""The command `python -m emoft.benchmark`: run a comparison, print its table, and write benchmark.json."""

import importlib
import sys
from dataclasses import asdict
from pathlib import Path

from emoft import start
from emoft.benchmark.config import BenchmarkConfig
from emoft.errors import UserError, run
from emoft.files import make_folder, write_json

# By the name of a comparison, the module and its function. Each is imported when it is asked for, since the libraries
# that it needs take seconds, and some of them are needed by it alone.
COMPARISONS = {
    "trainer": ("trainer", "compare_trainer"),
    "gradients": ("gradients", "compare_gradients"),
    "processes": ("scaling", "compare_processes"),
    "ladder": ("ladder", "compare_ladder"),
    "shared": ("shared", "compare_shared"),
    "generation": ("generation", "compare_generation"),
    "classification": ("classification", "compare_classification"),
}
TRAINING = ("trainer", "gradients", "processes", "ladder", "shared")  # those that run train.py


def check(config: BenchmarkConfig) -> None:
    """See what can be told at once of the flags.

    Raises:
        UserError: they cannot be followed.
    """
    if min(config.batch_sizes, default=0) < 1:
        raise UserError("--batch_sizes must be whole numbers of at least 1, as in --batch_sizes 4 16")
    if config.compare in TRAINING and not Path("train.py").is_file():
        raise UserError("the benchmark runs train.py: start it in the folder that holds train.py")


def main(config: BenchmarkConfig) -> int:
    """Run the comparison and report."""
    module, function = COMPARISONS[config.compare]
    compare = getattr(importlib.import_module(f"emoft.benchmark.{module}"), function)
    from emoft.benchmark.device import describe_machine  # here, as the comparisons

    start.libraries_are_loaded()
    output_dir = make_folder(Path(config.output_dir))
    report, machine = compare(config), describe_machine(config)
    write_json(output_dir / "benchmark.json", {"machine": machine, "config": asdict(config), **report.content})
    print(f"{machine}\n\n{report.table}\n\nsaved in {output_dir}")
    return 0


if __name__ == "__main__":  # not in the processes that a comparison starts, which import this
    flags = start.read_flags(BenchmarkConfig, check)
    start.loading(sys.stderr)
    run(lambda: main(flags))
