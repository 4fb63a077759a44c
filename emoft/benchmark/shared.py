"""Training beside other work: train.py on a quiet machine and beside a busy process, by several settings."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from emoft.benchmark.config import BenchmarkConfig, Report
from emoft.errors import UserError
from emoft.terminal import Bar
from emoft.training.threads import available_cores

EMOFT = "emoft"
BUSY = "while True: pass"  # a process that has a core for itself, if it is given one
SAMPLE = Path("emoft", "sample")
TEXTS = [f"--train_file={SAMPLE / 'train.csv'}", "--validation_file=", "--template={label}: {text}", "--save_steps=0"]
# What is trained, and how many steps of it take so long that the first ten seconds, in which emoft does not look at
# others, are a small part.
TRAININGS = {
    "demo": (["--config=demo", "--validation_file="], 1000),
    "conditional_small": (["--config=conditional_small", *TEXTS], 300),
    "GPT-2 small": (["--model_name_or_path=", "--per_device_train_batch_size=4", *TEXTS], 100),
}


def settings() -> dict[str, dict[str, str]]:
    """Return what stands in the environment of each contender. A number of threads there is not changed by emoft."""
    all_cores = {"OMP_NUM_THREADS": str(available_cores())}
    return {
        EMOFT: {},
        "as many threads as cores": all_cores,
        "the same, OMP_WAIT_POLICY=passive": all_cores | {"OMP_WAIT_POLICY": "passive"},
        "the same, GOMP_SPINCOUNT=1000": all_cores | {"GOMP_SPINCOUNT": "1000"},
        "one thread": {"OMP_NUM_THREADS": "1"},
    }


@dataclass
class Row:
    """What one training did by one setting; steps a second are medians of the turns."""

    training: str
    setting: str
    quiet: float
    shared: float
    share_of_best_quiet: float  # of the other settings', by each turn
    share_of_best_shared: float


def compare_shared(config: BenchmarkConfig) -> Report:
    """Let trainings by each setting take turns, on the machine as it is and beside one busy process.

    Raises:
        UserError: a training fails.
    """
    found: dict[tuple[str, str, bool], list[float]] = {}
    turns = [(t, s, busy) for t in TRAININGS for busy in (False, True) for s in settings()]
    with Bar("Comparing", "trainings", len(turns) * config.turns) as bar:
        for _ in range(config.turns):
            for training, setting, busy in turns:
                bar.note = f"{training}, {setting}{', beside a busy process' * busy}"
                found.setdefault((training, setting, busy), []).append(_steps_per_second(training, setting, busy))
                bar.advance()
    rows = [_row(found, training, setting) for training in TRAININGS for setting in settings()]
    return Report(_table(rows), {"rows": [asdict(row) for row in rows]})


def _steps_per_second(training: str, setting: str, busy: bool) -> float:
    flags, steps = TRAININGS[training]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if busy:
            other = stack.enter_context(subprocess.Popen([sys.executable, "-c", BUSY]))
            stack.callback(other.kill)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        command = [sys.executable, "train.py", *flags, f"--max_steps={steps}", "--output_dir", f"{folder}/run"]
        done = subprocess.run(
            command, env=environment | settings()[setting], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(
                f"{' '.join(command)} ended: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}"
            )
        return float(json.loads(Path(folder, "run", "all_results.json").read_text())["train_steps_per_second"])


def _row(found: dict[tuple[str, str, bool], list[float]], training: str, setting: str) -> Row:
    def share(busy: bool) -> float:
        others = [found[training, other, busy] for other in settings() if other != EMOFT]
        best = [max(turn) for turn in zip(*others, strict=True)]
        return median(own / most for own, most in zip(found[training, setting, busy], best, strict=True))

    quiet, shared = (median(found[training, setting, busy]) for busy in (False, True))
    return Row(training, setting, quiet, shared, share(False), share(True))


def _table(rows: list[Row]) -> str:
    lines = [
        "| training | threads by | steps/s, quiet | of the best | steps/s, beside a busy process | of the best |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.training} | {row.setting} | {row.quiet:.2f} | {row.share_of_best_quiet:.0%} | {row.shared:.2f} |"
            f" {row.share_of_best_shared:.0%} |"
        )
    return "\n".join(lines)
