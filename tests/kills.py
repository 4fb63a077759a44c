"""Runs of train.py disturbed in every way and resumed until they are done: `python tests/kills.py [RUNS]`.

Each must end bit for bit like a run that nobody disturbed, and every figure of its evaluation must be that of the model
that it exported, as `python -m emoft.evaluate` finds it. Half of the kills come at random moments, from outside; the
others from inside, at a step of the second epoch or in the middle of writing a checkpoint, where chance seldom hits.
In between the terminal is closed, the reader of the output goes away, the disk of the log is full, and somebody damages
the newest checkpoint, copies one, moves the whole run, or leaves a checkpoint of another program there.
"""

import contextlib
import json
import os
import pty
import random
import select
import shutil
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
        self.precision = values["mixed_precision"]
        self.words = [f"--{name}={value}" for name, value in values.items()] + ["--resume_from_checkpoint=latest"]

    def start(self, output_dir: str, streams: dict[str, str] | None = None, terminal: str = "", **env: str) -> int:
        script = str(self.folder / "planted.py")
        words = [*self.words, f"--output_dir={output_dir}"]
        return self.scripts.start(script, *words, cwd=self.folder, streams=streams, terminal=terminal, **env)[0]

    def end(self, output_dir: str, result: Result) -> tuple[bytes, list[dict], str]:
        """What a finished run must agree in: weights, log and sample texts."""
        assert result.code == 0, result.err
        folder = self.folder / output_dir
        labels = {label for _, label in SENTENCES}
        texts = "\n".join(line for line in result.out.splitlines() if line.partition(":")[0] in labels)
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert not list(folder.glob(".*")), "nothing is left of the saves that were killed"
        self.check_figures(folder)
        return (folder / "model.safetensors").read_bytes(), history, texts

    def check_figures(self, folder: Path) -> None:
        """See that what a run says of its model is true of the model that lies in its folder."""
        words = [f"--model_name_or_path={folder}", "--test_file=validation.txt", "--delimiter=;", "--json"]
        found = self.scripts("-m", "emoft.evaluate", *words, f"--mixed_precision={self.precision}", cwd=self.folder)
        assert found.code == 0, found.err
        measured, said = json.loads(found.out), json.loads((folder / "all_results.json").read_text())
        names = {"loss": "eval_loss", "perplexity": "perplexity", "bits_per_byte": "bits_per_byte"}
        names |= {name: name for name in ("emotion_accuracy", "macro_f1", "classified")}
        for name, own in names.items():
            assert abs(measured[name] - said[own]) <= 1e-6 * abs(said[own]), (name, measured[name], said[own])

    # ---- What happens to a run, besides SIGKILL; each returns the name of its folder from then on --------------------

    def close_terminal(self, name: str, chance: random.Random) -> str:
        ours, theirs = pty.openpty()
        tty = os.ttyname(theirs)
        process = self.start(name, dict.fromkeys(("stdin", "stdout", "stderr"), tty), terminal=tty)
        while os.readlink(f"/proc/{process}/fd/2") != tty:
            time.sleep(0.01)
        os.close(theirs)
        time.sleep(chance.uniform(0.0, 0.5 * self.seconds))
        os.close(ours)
        code = self.scripts.finish().code
        assert code in (-1, 0, 129), code  # before the loop there is nothing to save
        return name

    def lose_reader(self, name: str, chance: random.Random) -> str:
        pipe = self.folder / f"pipe-{name}"
        if not pipe.exists():
            os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        process = self.start(name, {"stdout": str(pipe), "stderr": str(pipe)})
        select.select([reader], [], [], 60)  # it has begun: until then Ctrl-C is Python's own matter
        time.sleep(chance.uniform(0.0, 0.5 * self.seconds))
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGINT)
        code = self.scripts.finish().code
        assert code in (-2, 0, 130), code
        return name

    def fill_log(self, name: str, chance: random.Random) -> str:
        self.start(name, {"stdout": "/dev/full", "stderr": "/dev/full"}, KILL_AT_STEP=str(chance.randint(1, 12)))
        assert self.scripts.finish().code in (-9, 0)
        return name

    def damage_newest(self, name: str, chance: random.Random) -> str:
        """What the best model is taken from is spared: without it another model would be exported, which is told."""
        found = [path for path in self.folder.glob(f"{name}/checkpoint-*") if path.name[11:].isdigit()]
        found.sort(key=lambda path: int(path.name[11:]))
        if len(found) < 2 or found[-1].name == self.best(name):
            return name
        path = chance.choice(sorted(each for each in found[-1].iterdir() if each.is_file()))
        path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size + 1)])
        return name

    def best(self, name: str) -> str:
        states = list(self.folder.glob(f"{name}/checkpoint-*/trainer_state.json"))
        states = [path for path in states if path.parent.name[11:].isdigit()]
        with contextlib.suppress(ValueError):
            newest = max(states, key=lambda path: int(path.parent.name[11:]))
            return str(json.loads(newest.read_text())["best_model_checkpoint"]).rpartition("/")[2]
        return ""

    def copy_one(self, name: str, chance: random.Random) -> str:
        for path in sorted(self.folder.glob(f"{name}/checkpoint-*"))[:1]:
            if not (copied := path.with_name(f"{path.name}-good")).exists() and not path.name.endswith("-good"):
                shutil.copytree(path, copied)
        return name

    def move_run(self, name: str, chance: random.Random) -> str:
        if (self.folder / name).exists():
            (self.folder / name).rename(self.folder / f"{name}-moved")
            return f"{name}-moved"
        return name

    def leave_another_program_s(self, name: str, chance: random.Random) -> str:
        foreign = self.folder / name / "checkpoint-3"
        if (self.folder / name).exists() and not foreign.exists():
            foreign.mkdir()
            (foreign / "pytorch_model.bin").write_bytes(b"somebody's")
        return name

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
            disturb = chance.choice(DISTURBANCES)
            if (self.folder / name).exists() or disturb in DISTURBANCES[:3]:
                name = disturb(self, name, chance)
                kills.append(disturb.__name__)
            process = self.start(name, **plan)
            if not plan:
                time.sleep(chance.uniform(0.1, 0.5 * self.seconds))
                with contextlib.suppress(ProcessLookupError):  # done already
                    os.kill(process, signal.SIGKILL)
            code = self.scripts.finish().code
            kills.append(f"{plan or 'outside'}: {code}")
        self.start(name)
        ended = self.end(name, self.scripts.finish())
        foreign = self.folder / name / "checkpoint-3"
        assert not foreign.exists() or (foreign / "pytorch_model.bin").read_bytes() == b"somebody's"
        return ended, kills


# The first three are ways for a running one to end; the others happen between two.
DISTURBANCES = (
    *(Killer.close_terminal, Killer.lose_reader, Killer.fill_log),
    *(Killer.damage_newest, Killer.copy_one, Killer.move_run, Killer.leave_another_program_s),
)


def main(runs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scripts = WarmScripts(Path(folder))
        hits, disturbances = 0, 0
        for number, settings in enumerate(({}, {"mixed_precision": "bf16"}, {"batching": "padded"})):
            killer = Killer(scripts, Path(folder) / str(number), **settings)
            expected = killer.undisturbed()
            for seed in range(number, runs, 3):
                found, kills = killer.disturbed(seed)
                assert found == expected, (settings, seed, kills)
                hits += sum("-9" in kill for kill in kills)
                disturbances += sum(":" not in kill for kill in kills)
                print(f"run {seed}: {', '.join(kills)}: the same end", flush=True)
        scripts.close()
    print(
        f"{runs} runs, {hits} kills, {disturbances} other disturbances: all ended bit for bit like the undisturbed one"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
