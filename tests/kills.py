"""Runs of train.py killed with SIGKILL and resumed until they are done: `python tests/kills.py [RUNS]`.

Each must end bit for bit like a run that nobody disturbed. Half of the kills come at random moments, from outside; the
others from inside, at a step of the second epoch or in the middle of writing a checkpoint, where chance seldom hits.
"""

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, SENTENCES, Result, WarmScripts

EPOCHS, STEPS_PER_EPOCH = 3, 12
# The script as it is, but slower to save, and killed where the environment says: after so many steps of this process,
# or at so many flushes of a file.
PLANT = f"""
import os, runpy, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from emoft.tracking.tracker import Tracker
flush, count_step = os.fsync, Tracker.count_step
left = {{name: int(os.environ.get(name, 0)) for name in ("KILL_AT_STEP", "KILL_AT_FLUSH")}}
def die(name):
    left[name] -= 1
    if left[name] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def slow_flush(descriptor):
    die("KILL_AT_FLUSH")
    time.sleep(0.02)
    flush(descriptor)
def counted(*arguments, **keywords):
    count_step(*arguments, **keywords)
    die("KILL_AT_STEP")
os.fsync, Tracker.count_step = slow_flush, counted
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


class Killer:
    """Runs and resumes one configuration."""

    def __init__(self, scripts: WarmScripts, folder: Path, **settings: object) -> None:
        self.scripts, self.folder = scripts, folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "planted.py").write_text(PLANT)
        lines = [f"{text} {'and so on ' * (n % 4)}{n};{label}" for n in range(6) for text, label in SENTENCES]
        (folder / "train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "validation.txt").write_text("".join(f"today {text};{label}\n" for text, label in SENTENCES))
        values = {
            "model_name_or_path": "",
            "config_overrides": "n_layer=2,n_embd=32,n_head=2,n_positions=64",
            "vocab_size": 300,
            "train_file": "train.txt",
            "validation_file": "validation.txt",
            "delimiter": ";",
            "template": "{label}: {text}",
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "eval_steps": 6,
            "save_steps": 4,
            "mixed_precision": "no",
            **settings,
        }
        self.words = [f"--{name}={value}" for name, value in values.items()] + ["--resume_from_checkpoint=latest"]

    def start(self, output_dir: str, **environment: str) -> int:
        script = str(self.folder / "planted.py")
        words = [*self.words, f"--output_dir={output_dir}"]
        return self.scripts.start(script, *words, cwd=self.folder, **environment)[0]

    def end(self, output_dir: str, result: Result) -> tuple[bytes, list[dict], str]:
        """What a finished run must agree in: weights, log and sample texts."""
        assert result.code == 0, result.err
        folder = self.folder / output_dir
        labels = {label for _, label in SENTENCES}
        texts = "\n".join(line for line in result.out.splitlines() if line.partition(":")[0] in labels)
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert not list(folder.glob(".*")), "nothing is left of the saves that were killed"
        return (folder / "model.safetensors").read_bytes(), history, texts

    def undisturbed(self) -> tuple[bytes, list[dict], str]:
        started = time.monotonic()
        self.start("undisturbed")
        result = self.scripts.finish()
        self.seconds = time.monotonic() - started
        return self.end("undisturbed", result)

    def disturbed(self, seed: int) -> tuple[tuple[bytes, list[dict], str], list[str]]:
        """A run with several kills, of the resumed run too; and what they were."""
        chance, name, kills = random.Random(seed), f"run-{seed}", []
        plans = [
            {"KILL_AT_STEP": str(chance.randint(STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH))},  # in the second epoch
            {
                "KILL_AT_FLUSH": str(chance.randint(1, 22))
            },  # a checkpoint has eleven, so in the first save or the second
            {},
            {"KILL_AT_STEP": str(chance.randint(1, STEPS_PER_EPOCH))},
            {},
        ]
        for plan in plans[: chance.randint(2, len(plans))]:
            process = self.start(name, **plan)
            if not plan:
                time.sleep(chance.uniform(0.1, 0.5 * self.seconds))
                with contextlib.suppress(ProcessLookupError):  # done already
                    os.kill(process, signal.SIGKILL)
            code = self.scripts.finish().code
            kills.append(f"{plan or 'outside'}: {code}")
        self.start(name)
        return self.end(name, self.scripts.finish()), kills


def main(runs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scripts = WarmScripts(Path(folder))
        hits = 0
        for number, settings in enumerate(({}, {"mixed_precision": "bf16"}, {"batching": "padded"})):
            killer = Killer(scripts, Path(folder) / str(number), **settings)
            expected = killer.undisturbed()
            for seed in range(number, runs, 3):
                found, kills = killer.disturbed(seed)
                assert found == expected, (settings, seed, kills)
                hits += sum("-9" in kill for kill in kills)
                print(f"run {seed}: {', '.join(kills)}: the same end", flush=True)
        scripts.close()
    print(f"{runs} runs, {hits} kills: all ended bit for bit like the undisturbed one")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
