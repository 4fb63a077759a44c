"""The command `python -m emoft.benchmark`: run a comparison, print its table, and write benchmark.json."""

from dataclasses import asdict
from pathlib import Path

from emoft import errors
from emoft.benchmark.classification import compare_classification
from emoft.benchmark.config import BenchmarkConfig, describe_machine
from emoft.benchmark.generation import compare_generation
from emoft.benchmark.gradients import compare_gradients
from emoft.benchmark.scaling import compare_processes
from emoft.benchmark.trainer import compare_trainer
from emoft.config import parse_config
from emoft.files import write_json

COMPARISONS = {
    "trainer": compare_trainer,
    "gradients": compare_gradients,
    "processes": compare_processes,
    "generation": compare_generation,
    "classification": compare_classification,
}
TRAINING = ("trainer", "gradients", "processes")  # those that run train.py


def main() -> int:
    """Read the flags, run the comparison, report."""
    config = parse_config(BenchmarkConfig)
    if min(config.batch_sizes, default=0) < 1:
        raise errors.UserError("--batch_sizes must be whole numbers of at least 1, as in --batch_sizes 4 16")
    if config.compare in TRAINING and not Path("train.py").is_file():
        raise errors.UserError("the benchmark runs train.py: start it in the folder that holds train.py")
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    report, machine = COMPARISONS[config.compare](config), describe_machine(config)
    write_json(output_dir / "benchmark.json", {"machine": machine, "config": asdict(config), **report.content})
    print(f"{machine}\n\n{report.table}\n\nsaved in {output_dir}")
    return 0


if __name__ == "__main__":
    errors.run(main)
