"""How long a million lines take to be ready for training, and how much memory: `python tests/million.py`.

Makes a file of so many lines of 20 words, runs train.py on it twice, with a cache of its own and a tiny model, and
prints for each run what stages there were, when the data were ready, and the most memory that the process held. The
words are drawn as those of a language are, a few of them often and many of them seldom (Zipf, 1949); some lines come
again, exactly or but for a word.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
LABELS = ("joy", "sadness", "anger", "fear", "love", "surprise")
WORDS = 20  # of a line
VOCABULARY = 50_000
COPIES = 0.03  # share of the lines that stood before; as many again but for one word
READY = re.compile(r"parameters on .* examples")


def make_vocabulary(random: np.random.Generator) -> np.ndarray:
    """Return (V,) made-up words of one to three syllables, short ones first: they will be the frequent ones."""
    open_syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    syllables = np.array(open_syllables + [syllable + end for syllable in open_syllables for end in "nrst"])
    words: set[str] = set()
    while len(words) < VOCABULARY:
        words.add("".join(syllables[random.integers(len(syllables), size=random.integers(1, 4))]))
    return np.array(sorted(words, key=lambda word: (len(word), word)))


def make_file(path: Path, lines: int, delimiter: str = "", seed: int = 0) -> None:
    """Write lines of words; with a delimiter, a label stands behind each of them."""
    random = np.random.default_rng(seed)
    vocabulary = make_vocabulary(random)
    shares = 1 / np.arange(1, VOCABULARY + 1)
    drawn = random.choice(VOCABULARY, size=(lines, WORDS), p=shares / shares.sum())
    kinds = random.choice(3, size=lines, p=[1 - 2 * COPIES, COPIES, COPIES])
    for line in np.flatnonzero(kinds[1:]) + 1:
        drawn[line] = drawn[random.integers(line)]
        if kinds[line] == 2:
            drawn[line, random.integers(WORDS)] = random.integers(VOCABULARY)
    labels = random.integers(len(LABELS), size=lines)
    with open(path, "w", encoding="utf-8") as file:
        for words, label in zip(drawn, labels, strict=True):
            end = f"{delimiter}{LABELS[label]}" if delimiter else ""
            file.write(f"{' '.join(vocabulary[words])}{end}\n")


@dataclass
class Start:
    """What a run of train.py did until its end."""

    lines: list[tuple[float, str]]  # what it printed, with the seconds from its start
    seconds: float  # in all
    ready: float  # seconds until the data were ready and the training began
    memory: int  # bytes that the process held at most, pages of the cache's files included


def start_training(words: list[str], home: Path) -> Start:
    """Run train.py with a cache of its own."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdout
    lines = [(time.perf_counter() - started, line.rstrip()) for line in process.stdout]
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    assert os.waitstatus_to_exitcode(status) == 0, "\n".join(line for _, line in lines)
    ready = next(second for second, line in lines if READY.search(line))
    return Start(lines, seconds, ready, used.ru_maxrss * 1024)


def training_words(file: Path, output_dir: Path, tokenizer: str, delimiter: str) -> list[str]:
    """Return the flags of a run of one step with a tiny model."""
    template = ["--delimiter", delimiter, "--template", "{label}: {text}"] if delimiter else []
    model = "n_layer=1,n_embd=16,n_head=1,n_positions=64"
    words = ["--model_name_or_path", "", "--config_overrides", model, "--tokenizer_name", tokenizer]
    more = ["--drop_duplicates", "--max_steps", "1", "--save_steps", "0", "--output_dir", str(output_dir)]
    return [*words, "--train_file", str(file), *template, *more]


def main() -> None:
    """Make the file, run twice, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer, such as one that has GPT-2's")
    parser.add_argument("--delimiter", default="", help="put a label behind each text, and train on both")
    parser.add_argument("--folder", help="where the file and the cache are kept; none is left by default")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(flags.folder or temporary)
        folder.mkdir(exist_ok=True, parents=True)
        file = folder / f"{flags.lines}{'-labels' * bool(flags.delimiter)}.txt"
        if not file.exists():
            make_file(file, flags.lines, flags.delimiter)
        for number, name in enumerate(("first", "second")):
            words = training_words(file, folder / f"run-{number}-{time.time_ns()}", flags.tokenizer, flags.delimiter)
            start = start_training(words, folder / "home")
            print(f"---- {name} start")
            print("\n".join(f"{second:7.1f} s  {line}" for second, line in start.lines))
            print(
                f"ready after {start.ready:.1f} s, ended after {start.seconds:.1f} s, {start.memory / 2**30:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
