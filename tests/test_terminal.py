"""What is shown while something runs: on terminals of 80 and 200 columns, and in a log file."""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Result, WarmScripts

from emoft import errors, terminal
from emoft.terminal import Bar, TrainingBar, progress, say

ENTRY = re.compile(r"step (\d+)/(\d+)  loss [\d.]+  learning rate \d\.\de-\d\d  [\d.,]+ samples/s  \d+:\d\d left")


class Screen:
    """What a terminal of so many columns shows, and which lines were longer than it is wide."""

    def __init__(self, columns: int) -> None:
        self.columns, self.row, self.column = columns, 0, 0
        self.rows = [""]
        self.wrapped: list[str] = []
        self.written = ""

    def feed(self, text: str) -> None:
        self.written += text
        for token in re.findall(r"\x1b\[\w|.", text, re.DOTALL):
            row = self.rows[self.row].ljust(self.column)
            if token == "\n":
                self._down()
            elif token == "\r":
                self.column = 0
            elif token == "\x1b[A":
                self.row -= 1
            elif token == "\x1b[K":
                self.rows[self.row] = row[: self.column]
            elif token.isprintable():
                if self.column == self.columns:
                    self.wrapped.append(row)
                    self._down()
                    self.column, row = 0, self.rows[self.row]
                self.rows[self.row] = row[: self.column] + token + row[self.column + 1 :]
                self.column += 1
            else:
                raise ValueError(f"this screen does not know {token!r}")

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")

    @property
    def lines(self) -> list[str]:
        return [row.rstrip() for row in self.rows if row.strip()]

    @property
    def drawn(self) -> list[str]:
        """All that was ever written between two moves of the cursor."""
        return [part for part in re.split(r"\r|\n|\x1b\[\w", self.written) if part.strip()]


class Terminal:
    """A pseudo-terminal of so many columns."""

    def __init__(self, columns: int) -> None:
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.name = os.ttyname(self.theirs)
        self.screen = Screen(columns)
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def read(self, seconds: float = 0.05) -> Screen:
        """Show what has been written, and wait so long for more of it."""
        while select.select([self.ours], [], [], seconds)[0]:
            self.screen.feed(self.decoder.decode(os.read(self.ours, 65536)))
        return self.screen

    def close(self) -> None:
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Terminal]]:
    """Makes standard output and error of this process a terminal of so many columns."""
    opened: list[Any] = []

    def open_terminal(columns: int) -> Terminal:
        each = Terminal(columns)
        stream = open(each.theirs, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        opened.extend([stream, each])
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setattr("sys.stderr", stream)
        return each

    monkeypatch.setenv("TERM", "xterm")
    yield open_terminal
    errors.close_bars()
    for each in opened:
        each.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars that show at once."""
    monkeypatch.setattr(terminal, "DELAY_SECONDS", 0.0)
    monkeypatch.setattr(terminal, "REDRAW_SECONDS", 0.02)


def train(bar: TrainingBar, steps: int, loss: float = 4.8244, learning_rate: float | None = 3.9e-3) -> None:
    """So many steps of 11 milliseconds each, and a log entry."""
    first = bar.step
    for step in range(first + 1, first + steps + 1):
        bar.advance(step * 0.011)
    bar.log(loss, 360.4, 12_345.6, 0.3141, learning_rate)


class TestTrainingBar:
    def test_80_columns_show_loss_rate_and_what_is_left(self, terminal_of: Callable[[int], Terminal]) -> None:
        shown = terminal_of(80)
        bar = TrainingBar(1488, 0, 0.0)
        train(bar, 150)
        assert shown.read().lines == ["Training  10% |█▍            | 150/1488  loss 4.824  360 samples/s  0:15 left"]
        train(bar, 50, loss=3.1)
        bar.close()
        assert "loss 3.100" in shown.read().lines[0] and "200/1488" in shown.screen.lines[0]
        assert len(shown.screen.lines) == 1 and not shown.screen.wrapped
        assert max(map(len, shown.screen.drawn)) <= 80 - len("^C") - 1

    def test_200_columns_show_more(self, terminal_of: Callable[[int], Terminal]) -> None:
        shown = terminal_of(200)
        train(TrainingBar(1488, 0, 0.0), 150)
        (line,) = shown.read().lines
        text = "| 150/1488  loss 4.824  360 samples/s  0:15 left  12,346 tokens/s  31% of peak  learning rate 3.9e-03"
        assert line.endswith(text) and len(line) > 190

    @pytest.mark.parametrize("columns", [0, 4, 20, 39, 44, 64, 79, 100, 131])
    def test_no_width_makes_it_wrap(self, terminal_of: Callable[[int], Terminal], columns: int) -> None:
        shown = terminal_of(columns)
        shown.screen.columns = columns or 80  # a terminal that does not tell
        bar = TrainingBar(1_000_000, 999_000, 1e6)
        train(bar, 50)
        bar.close()
        (line,) = shown.read().lines
        assert not shown.screen.wrapped
        if columns > 4:
            assert line.rstrip().endswith(" left") or columns == 0 or columns > 80
            assert all(part in line for part in ("loss 4.824  360 samples/s", " left")) or columns < 39

    def test_a_window_that_becomes_narrower(self, terminal_of: Callable[[int], Terminal]) -> None:
        shown = terminal_of(200)
        bar = TrainingBar(1488, 0, 0.0)
        train(bar, 150)
        shown.read()
        fcntl.ioctl(shown.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        shown.screen = Screen(80)
        train(bar, 50)
        assert shown.read().lines[0].endswith("left") and not shown.screen.wrapped

    def test_before_the_first_entry_there_is_a_rate_already(self, terminal_of: Callable[[int], Terminal]) -> None:
        shown = terminal_of(80)
        bar = TrainingBar(400, 0, 0.0)
        bar.advance(0.25)
        bar.close()
        assert shown.read().lines[0].endswith("| 1/400  4 steps/s  1:40 left")

    def test_what_is_left_is_of_the_last_entries(self, terminal_of: Callable[[int], Terminal]) -> None:
        """A first step that takes long, as one that compiles does, is not taken for all of them for ever."""
        shown = terminal_of(80)
        bar = TrainingBar(1000, 100, 60.0)  # resumed: what earlier processes took says nothing
        seconds = 120.0
        for _ in range(7):
            for _ in range(50):
                seconds += 0.1
                bar.advance(seconds)
            bar.log(1.0, 1.0, 1.0, 1.0)
        bar.close()
        assert shown.read().lines[0].endswith("| 450/1000  loss 1.000  1 samples/s  0:55 left")

    def test_a_fact_stands_above_the_bar(self, terminal_of: Callable[[int], Terminal]) -> None:
        shown = terminal_of(80)
        bar = TrainingBar(300, 0, 0.0)
        train(bar, 150)
        say("step 150: validation loss 4.8")
        errors.warn("the disk is nearly full")
        train(bar, 50)
        assert [line[:24] for line in shown.read().lines] == [
            "step 150: validation los",
            "warning: the disk is nea",
            "Training  67% |█████████",
        ]

    def test_ctrl_c_of_the_terminal_neither_wraps_nor_stays(self, terminal_of: Callable[[int], Terminal]) -> None:
        shown = terminal_of(80)
        bar = TrainingBar(300, 0, 0.0)
        train(bar, 150)
        shown.read().feed("^C")
        assert not shown.screen.wrapped
        bar.close()
        (line,) = shown.read().lines
        assert line.endswith("left")

    def test_a_terminal_that_cannot_go_back_gets_lines(
        self, terminal_of: Callable[[int], Terminal], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shown = terminal_of(80)
        monkeypatch.setenv("TERM", "dumb")
        train(TrainingBar(300, 0, 0.0), 150)
        assert ENTRY.fullmatch(shown.read().lines[0])

    def test_a_log_file_gets_a_line_for_each_entry(self, capsys: pytest.CaptureFixture[str]) -> None:
        bar = TrainingBar(1488, 0, 0.0)
        train(bar, 150)
        train(bar, 50, loss=float("nan"), learning_rate=None)
        bar.close()
        assert capsys.readouterr().err == (
            "step 150/1488  loss 4.824  learning rate 3.9e-03  360 samples/s  0:15 left\n"
            "step 200/1488  loss nan  360 samples/s  0:14 left\n"
        )


@pytest.mark.usefixtures("hasty")
class TestBar:
    def test_leaves_nothing_behind(self, terminal_of: Callable[[int], Terminal]) -> None:
        shown = terminal_of(80)
        training = TrainingBar(300, 0, 0.0)
        train(training, 150)
        for number in progress(range(40), "Evaluating", "batches"):
            time.sleep(0.01)
            if number == 20:
                two = shown.read().lines
                say("a fact")
        train(training, 50)
        training.close()
        with Bar("Reading train.csv", "B", 12_000_000) as bar:
            bar.advance(3_000_000)
            time.sleep(0.3)
        with Bar("Reading the Hub"):
            time.sleep(0.3)
        say("done")
        assert re.fullmatch(r"Evaluating +\d+% \|[█▏▎▍▌▋▊▉ ]+\| \d+/40 batches  0:0\d left", two[1])
        assert [line.split("|")[0] for line in shown.read().lines] == ["a fact", "Training  67% ", "done"]
        assert any("| 3.00MB/12.0MB  0:0" in part for part in shown.screen.drawn)
        assert any(part.startswith("Reading the Hub 0:0") for part in shown.screen.drawn)
        assert not shown.screen.wrapped

    def test_what_is_over_in_a_moment_does_not_flash(
        self, terminal_of: Callable[[int], Terminal], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(terminal, "DELAY_SECONDS", 0.5)
        shown = terminal_of(80)
        assert list(progress(range(3), "Evaluating", "batches")) == [0, 1, 2]
        assert shown.read().written == ""

    def test_a_single_long_call_shows_that_it_lives(
        self, terminal_of: Callable[[int], Terminal], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shown = terminal_of(80)
        with Bar("Comparing", "turns", 6) as bar:
            bar.note = "batch 4, {emoft}"
            time.sleep(1.2)
            bar.advance()
            time.sleep(0.3)
        drawn = shown.read().drawn
        assert sum(part.endswith("| 0/6 turns  batch 4, {emoft}") for part in drawn) >= 5, "while it was still at it"
        assert drawn[-1].endswith(" left") and "| 1/6 turns  batch 4, {emoft}  0:0" in drawn[-1]

    @pytest.mark.parametrize("columns", [20, 40, 80])
    def test_a_long_name_does_not_wrap(self, terminal_of: Callable[[int], Terminal], columns: int) -> None:
        shown = terminal_of(columns)
        for _ in progress(range(5), f"Reading {'very-' * 30}long{{.csv", "examples"):
            time.sleep(0.02)
        assert shown.read().drawn and not shown.screen.wrapped and not shown.screen.lines

    def test_a_log_file_gets_few_plain_lines(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(terminal, "SILENCE_SECONDS", 0.3)
        for _ in progress(iter(range(70)), "Evaluating", "batches", 70):
            time.sleep(0.01)
        with Bar("Reading the Hub"):
            time.sleep(0.1)
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert out == "" and "\r" not in err and "\x1b" not in err
        assert 3 <= len(lines) <= 9
        assert all(re.fullmatch(r"Evaluating \.\.\. \d+/70 batches(  0:0\d left)?", line) for line in lines[:-1])
        assert lines[-1].startswith("Reading the Hub ... 0:0")
        assert not Result(0, out, f"{err}warning: row 1, 2, ...\n", ()).error_lines[1:], "the tests tell them apart"


MADE: dict[str, BaseException] = {
    "mended": errors.UserError("data.csv line 3: mend it"),
    "interrupted": KeyboardInterrupt(),
    "a fault": RuntimeError("a fault"),
}


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("kind", MADE)
def test_an_error_begins_a_line(
    terminal_of: Callable[[int], Terminal], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In the body of a loop, which the bar's own code does not hear of."""
    shown = terminal_of(80)
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])

    def main() -> int:
        bar = TrainingBar(300, 0, 0.0)
        train(bar, 150)
        for number in progress(range(9), "Evaluating", "batches"):
            time.sleep(0.1)
            if number == 1:
                os.write(shown.theirs, b"^C" if kind == "interrupted" else b"")
                raise MADE[kind]
        return 0

    with pytest.raises((SystemExit, RuntimeError)) as left:
        errors.run(main)
    first, *rest = shown.read().lines
    assert any(part.startswith("Evaluating") for part in shown.screen.drawn), "it stood there"
    assert first.startswith("Training  50% |") and first.endswith("left")
    expected: dict[str, list[str]] = {
        "mended": ["train.py: error: data.csv line 3: mend it"],
        "interrupted": ["train.py: stopped by Ctrl-C before it was done"],
        "a fault": [],
    }
    assert rest == expected[kind]
    assert shown.screen.column == 0, "the shell's prompt begins a line too"
    assert left.value.args == {"mended": (2,), "interrupted": (130,), "a fault": ("a fault",)}[kind]


def test_ctrl_c_without_a_bar_begins_a_line(
    terminal_of: Callable[[int], Terminal], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["generate.py"])

    def main() -> int:
        print("> i feel^C", end="", flush=True)
        raise KeyboardInterrupt

    shown = terminal_of(80)
    with pytest.raises(SystemExit):
        errors.run(main)
    assert shown.read().lines == ["> i feel^C", "generate.py: stopped by Ctrl-C before it was done"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        errors.run(main)
    assert shown.read().lines[2:] == ["> i feel^C"], "of several processes one tells it"


def test_telling_an_error_imports_nothing_slow() -> None:
    asked = "import sys, emoft.errors; print(sorted({'tqdm', 'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


class TestRealRuns:
    """train.py in a process of its own, with validation texts that take longer than a moment."""

    @pytest.fixture(scope="class")
    @classmethod
    def words(
        cls, tiny_model: Path, train_file: Path, validation_file: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> list[object]:
        texts = tmp_path_factory.mktemp("long") / "validation.txt"
        texts.write_text(validation_file.read_text(encoding="utf-8") * 150, encoding="utf-8")
        settings = {
            "model_name_or_path": tiny_model,
            "train_file": train_file,
            "validation_file": texts,
            "delimiter": ";",
            "per_device_eval_batch_size": 1,
            "num_train_epochs": 2,
            "logging_steps": 5,
            "save_steps": 0,
            "learning_rate": 1e-3,
            "output_dir": "run",
        }
        return [word for name, value in settings.items() for word in (f"--{name}", value)]

    @staticmethod
    def run_on(
        shown: Terminal,
        scripts: WarmScripts,
        words: list[object],
        cwd: Path,
        stop_at: str = "",
        stderr: Path | None = None,
    ) -> int:
        """Run it on a terminal, standard error if wished elsewhere, and press Ctrl-C when a text is shown."""
        streams = {"stdin": os.devnull, "stdout": shown.name, "stderr": str(stderr or shown.name)}
        cache = str(cwd / "cache")
        (pid,) = scripts.start("train.py", *words, cwd=cwd, streams=streams, TERM="xterm", HF_DATASETS_CACHE=cache)
        assert scripts.server.stdout
        while not select.select([scripts.server.stdout], [], [], 0)[0]:
            if stop_at and stop_at in shown.read().written:
                os.write(shown.ours, b"\x03")  # the terminal shows it as ^C
                os.kill(pid, signal.SIGINT)  # and would send this to its own session
                stop_at = ""
            shown.read()
        shown.read()
        return json.loads(scripts.server.stdout.readline())[0]

    @pytest.mark.parametrize("columns", [80, 200])
    def test_on_a_terminal(self, scripts: WarmScripts, words: list[object], tmp_path: Path, columns: int) -> None:
        shown = Terminal(columns)
        assert self.run_on(shown, scripts, words, tmp_path) == 0
        screen = shown.screen
        bars = [part for part in screen.drawn if part.startswith("Training ")]
        logged = [part for part in bars if "loss" in part]
        assert len(logged) >= 5
        for part in logged:
            assert re.search(r"\| \d+/24  loss [\d.]+  [\d.,]+ samples/s  \d+:\d\d left", part), part
            assert ("tokens/s" in part and "% of peak" in part) == (columns == 200)
        assert max(map(len, bars)) < columns
        assert not [row for row in screen.wrapped if "% |" in row]
        assert any(part.startswith("Evaluating ") for part in screen.drawn)
        left = [line for line in screen.lines if "% |" in line]
        assert len(left) == 1 and left[0].startswith("Training 100% |") and left[0].rstrip().endswith(logged[-1][-9:])
        facts = [line for line in screen.lines if line.startswith("step ")]
        assert [line.split(":")[0] for line in facts] == [f"step {step}" for step in (0, 12, 24)]
        assert "Generating" not in screen.written and "Map" not in screen.written, "the bars of datasets"
        shown.close()

    def test_in_a_log_file(self, scripts: WarmScripts, words: list[object], tmp_path: Path) -> None:
        """Both streams in one file, as of `train.py > log 2>&1`."""
        log = tmp_path / "log"
        log.touch()
        shown = Terminal(80)
        shown.name = str(log)
        assert self.run_on(shown, scripts, words, tmp_path, stderr=log) == 0
        shown.close()
        content = log.read_bytes().decode()
        assert "\r" not in content and "\x1b" not in content
        lines = content.splitlines()
        entries = [found for line in lines if (found := ENTRY.fullmatch(line))]
        assert [(found[1], found[2]) for found in entries] == [(str(step), "24") for step in (5, 10, 15, 20, 24)]
        order = [line.split("  ")[0].split(":")[0] for line in lines if line.startswith("step ")]
        entries_and_facts = ["0", "5/24", "10/24", "12", "15/24", "20/24", "24/24", "24"]
        assert order == [f"step {step}" for step in entries_and_facts]
        assert sum(line.startswith("Evaluating ... ") for line in lines) >= 2
        assert not any("%|" in line or "% |" in line for line in lines)

    @pytest.mark.parametrize("stop_at", ["10/24", "Evaluating"])
    def test_ctrl_c(self, scripts: WarmScripts, words: list[object], tmp_path: Path, stop_at: str) -> None:
        shown = Terminal(80)
        assert self.run_on(shown, scripts, words, tmp_path, stop_at) == 130
        screen = shown.screen
        assert screen.column == 0 and screen.written.endswith("\n")
        assert "^C" in screen.written
        assert not any("^C" in line for line in screen.lines)
        (bar,) = (number for number, line in enumerate(screen.lines) if "% |" in line)
        assert screen.lines[bar].startswith("Training ") and screen.lines[bar].endswith(
            "left" if "/" in stop_at else "0/24"
        )
        assert screen.lines[bar + 1].startswith("stopped by SIGINT ")
        shown.close()


def test_bars_of_datasets_are_ours(
    terminal_of: Callable[[int], Terminal], hasty: None, tmp_path: Path, tiny_model: Path, monkeypatch
) -> None:
    from transformers import GPT2Tokenizer

    from emoft.config import TrainConfig
    from emoft.data.reading import read_splits
    from emoft.data.tokenized import tokenize

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "train.csv").write_text("text,label\n" + "i feel fine,joy\ni feel low,sadness\n" * 10_000)
    (tmp_path / "train.jsonl").write_text(
        '{"text": "i feel fine", "label": 1}\n{"text": "so low", "label": 0}\n' * 10_000
    )
    shown = terminal_of(80)
    tokenizer = GPT2Tokenizer.from_pretrained(tiny_model)
    for name in ("train.csv", "train.jsonl"):
        config = TrainConfig(train_file=str(tmp_path / name), template="{label}: {text}")
        splits, text_format = read_splits(config)
        tokenize(splits["train"], tokenizer, text_format, "train")
    assert not shown.read().lines
    begun = {part.split("  ")[0].split(" 0:")[0].split(" 1")[0] for part in shown.screen.drawn}
    for name in ("Reading train.csv", "Reading train.jsonl", "Tokenizing train"):
        assert any(part.startswith(name) for part in begun), (name, begun)
    assert any(
        re.search(r"Tokenizing train +\d+% \|.*\| [1-9][\d,]*/20,000 examples", part) for part in shown.screen.drawn
    )
    assert not shown.screen.wrapped
