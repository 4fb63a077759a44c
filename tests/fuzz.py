"""Data files as they should not be: `PYTHONPATH=. python tests/fuzz.py [CASES]`.

Each is read and tokenized as train.py does, and must end in success or in a `UserError` that names the file.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emoft.config import TrainConfig
from emoft.data import read_splits, tokenize
from emoft.errors import UserError
from emoft.model import train_tokenizer

SECONDS = 20.0  # none may take longer
TEXT = st.text(max_size=40)
VALUE = st.one_of(TEXT, st.integers(), st.floats(), st.none(), st.booleans(), st.lists(TEXT, max_size=3))
CELL = st.text(alphabet=st.characters(exclude_characters="\r\n"), max_size=30)


def lines(cells: list[list[str]], delimiter: str, end: str) -> bytes:
    return (end.join(delimiter.join(row) for row in cells) + end).encode("utf-8", errors="replace")


def csv_bytes(draw: st.DrawFn) -> bytes:
    columns = draw(st.lists(st.sampled_from(["text", "label", "text", "x", ""]), min_size=1, max_size=4))
    rows = draw(st.lists(st.lists(CELL, max_size=5), max_size=6))
    return lines([columns, *rows], draw(st.sampled_from([",", "\t", ";"])), draw(st.sampled_from(["\n", "\r\n", "\r"])))


def json_bytes(draw: st.DrawFn) -> bytes:
    row = st.dictionaries(st.sampled_from(["text", "label", "more"]), VALUE, max_size=3)
    rows = draw(st.lists(st.one_of(row, VALUE, st.dictionaries(TEXT, row, max_size=2)), max_size=6))
    if draw(st.booleans()):
        return json.dumps(rows).encode()
    return b"\n".join(json.dumps(each).encode() for each in rows)


def text_bytes(draw: st.DrawFn) -> bytes:
    rows = draw(st.lists(st.lists(CELL, min_size=1, max_size=3), max_size=6))
    return lines(rows, ";", draw(st.sampled_from(["\n", "\r\n", "\n\n"])))


@st.composite
def files(draw: st.DrawFn) -> tuple[str, bytes, dict[str, object]]:
    """The ending of a file, its content, and flags to read it with."""
    kind = draw(st.sampled_from(["csv", "json", "text", "bytes", "huge"]))
    ending = draw(st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt"]))
    if kind == "bytes":
        content = draw(st.binary(max_size=300))
    elif kind == "huge":  # a line of 10 MB
        content = draw(st.sampled_from([b"i feel ", b"x", b"\x00", "ភា".encode(), b'"'])) * 1_500_000
    else:
        content = {"csv": csv_bytes, "json": json_bytes, "text": text_bytes}[kind](draw)
    if draw(st.booleans()):
        content = b"\xef\xbb\xbf" + content
    if content and draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, min(len(content), 200)))
        content = content[:place] + draw(st.sampled_from([b"\x00", b"\xff", b"\xed\xa0\x80"])) + content[place:]
    flags: dict[str, object] = {"template": draw(st.sampled_from(["{text}", "{label}: {text}"]))}
    if ending in (".txt", ".csv"):
        flags["delimiter"] = draw(st.sampled_from(["", ";"]))
    return ending, content, flags


def check(folder: Path, ending: str, content: bytes, flags: dict[str, object]) -> str:
    """Read a file; returns how that ended."""
    path = folder / f"data{ending}"
    path.write_bytes(content)
    started = time.monotonic()
    try:
        splits, text_format = read_splits(TrainConfig(train_file=str(path), max_train_samples=50, **flags))  # type: ignore[arg-type]
        tokenize(splits["train"], TOKENIZER, text_format, "train")
        outcome = "read"
    except UserError as error:
        message = str(error)
        assert path.name in message, message
        outcome = "refused"
    assert time.monotonic() - started < SECONDS
    return outcome


TOKENIZER = train_tokenizer(["any text"], 300)


def main(cases: int) -> dict[str, int]:
    outcomes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:

        @settings(
            max_examples=cases, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(file=files())
        def run(file: tuple[str, bytes, dict[str, object]]) -> None:
            outcome = check(Path(folder), *file)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

        run()
    return outcomes


if __name__ == "__main__":
    import datasets

    datasets.disable_progress_bars()
    print(main(int(sys.argv[1]) if len(sys.argv) > 1 else 500))
