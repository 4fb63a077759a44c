"""What the tests share: ways to run the real scripts, and a tiny model and data to run them on."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # see `environment`

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the scripts of this folder that are run by themselves
SENTENCES = [
    ("i feel happy because my friends came to visit", "joy"),
    ("i was so sad when the rain spoiled our walk", "sadness"),
    ("my heart is full of love for my little sister", "love"),
    ("i am angry that nobody told me", "anger"),
    ("the dark street makes me afraid", "fear"),
    ("i could not believe my eyes", "surprise"),
    ("we laughed all evening", "joy"),
    ("i miss my old dog more than i can say and the house is very quiet without him now", "sadness"),
]


HOW_FAR = re.compile(r"step \d+/\d+  |(still )?[A-Za-z]+ing\b[^:]* \.\.\.( |$)")  # lines of `emoft.terminal`, `start`


def count_hooks(model: torch.nn.Module) -> int:
    """How many hooks listen to a model, without the one that packed attention keeps on it."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(hook.__name__ != "_leave_mask" for hook in hooks)


@dataclass
class Result:
    code: int
    out: str
    err: str
    codes: tuple[int, ...] = ()  # of all ranks, if there were several

    @property
    def error_lines(self) -> list[str]:
        """The lines of standard error that do not tell how far something is; in a file there is no bar."""
        return [line for line in self.err.splitlines() if line.strip() and not HOW_FAR.match(line)]


def environment(tmp: Path, **extra: str) -> dict[str, str]:
    """An environment with caches of its own and no Hub."""
    names = {
        "HF_HOME": str(tmp / "hf-home"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",  # two workers of pytest share two cores: more threads would wait for each other, busily
        "COLUMNS": "120",
    }
    return {**names, **extra}


def run_fresh(script: str, *args: object, cwd: Path, stdin: str = "", timeout: float = 300, **env: str) -> Result:
    """Run a script in a process of its own, from the first import on."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)],
        cwd=cwd,
        env={**os.environ, **env},
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun puts into the environment of each process on one host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(ranks)
    ]


class WarmScripts:
    """Runs the real scripts in real processes that need not import the libraries again; see warm_start.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "warm_start.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment(folder)},
        )

    def start(
        self,
        script: str,
        *args: object,
        cwd: Path,
        stdin: str = "",
        ranks: int = 0,
        streams: dict[str, str] | None = None,
        terminal: str = "",
        **env: str,
    ) -> list[int]:
        """Start a script, or a command of the package by "-m" and its name; returns the process ids.

        On several ranks as torchrun does, if told; with other files or devices for its streams, of which "" is a closed
        one; and as what a terminal runs. Wait for it with `finish` before starting another.
        """
        self.files = {name: self.folder / name for name in ("stdin", "stdout", "stderr")}
        for path in self.files.values():
            path.write_text(stdin if path.name == "stdin" else "", encoding="utf-8")
        request = {
            "argv": [script if script == "-m" else str(ROOT / script), *map(str, args)],
            "cwd": str(cwd),
            "env": env,
            "ranks": rank_environments(ranks) if ranks else [{}],
            "terminal": terminal,
            **{name: str(path) for name, path in self.files.items()},
            **(streams or {}),
        }
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def finish(self) -> Result:
        assert self.server.stdout
        codes = json.loads(self.server.stdout.readline())
        out, err = (self.files[name].read_bytes().decode("utf-8", "replace") for name in ("stdout", "stderr"))
        return Result(codes[0], out, err, tuple(codes))

    def __call__(self, script: str, *args: object, cwd: Path, stdin: str = "", ranks: int = 0, **env: str) -> Result:
        self.start(script, *args, cwd=cwd, stdin=stdin, ranks=ranks, **env)
        return self.finish()

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(timeout=30)


def read_scalars(output_dir: Path) -> dict[str, dict[int, float]]:
    """All curves of a run as TensorBoard's own reader finds them: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir / "runs"), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="session")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmScripts]:
    warm = WarmScripts(tmp_path_factory.mktemp("scripts"))
    yield warm
    warm.close()


@pytest.fixture
def run(scripts: WarmScripts, tmp_path: Path) -> Callable[..., Result]:
    """Run train.py, generate.py, or "-m" and a command, in `tmp_path` (another folder by `cwd`)."""

    def run_in(script: str, *args: object, cwd: Path = tmp_path, stdin: str = "", ranks: int = 0, **env: str) -> Result:
        return scripts(script, *args, cwd=cwd, stdin=stdin, ranks=ranks, **env)

    return run_in


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 messages of very different lengths, as `text;label` lines."""
    path = tmp_path_factory.mktemp("data") / "train.txt"
    lines = [
        f"{text} {'and so on ' * (number % 4)}{number};{label}" for number in range(6) for text, label in SENTENCES
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def validation_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "validation.txt"
    path.write_text("".join(f"today {text};{label}\n" for text, label in SENTENCES), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-2 of 2 blocks, 32 wide, dropout on, and a tokenizer of 400 tokens."""
    from emoft.model.loading import fresh_model
    from emoft.model.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([f"Emotion: {text}" for text, _ in SENTENCES], 400)
    torch.manual_seed(0)
    model = fresh_model("n_layer=2,n_embd=32,n_head=2,n_positions=128", tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def still_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model without dropout."""
    from transformers import GPT2LMHeadModel, GPT2Tokenizer

    folder = tmp_path_factory.mktemp("still")
    model = GPT2LMHeadModel.from_pretrained(tiny_model, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model.save_pretrained(folder)
    GPT2Tokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder
