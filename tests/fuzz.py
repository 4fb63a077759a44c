"""Data files as they should not be: `python tests/fuzz.py [CASES]`.

train.py takes a step on each, in a process of its own, and must succeed or end with exit code 2 and a line that names
the file: never a traceback, a crash, or more than 20 seconds.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from conftest import WarmScripts
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SECONDS = 20.0  # none may take longer
TEXT = st.text(max_size=40)
VALUE = st.one_of(TEXT, st.integers(), st.floats(), st.none(), st.booleans(), st.lists(TEXT, max_size=3))
CELL = st.one_of(st.just("i feel fine"), st.text(alphabet=st.characters(exclude_characters="\r\n"), max_size=30))


def lines(cells: list[list[str]], delimiter: str, end: str) -> bytes:
    return (end.join(delimiter.join(row) for row in cells) + end).encode("utf-8", errors="replace")


def csv_bytes(draw: st.DrawFn) -> bytes:
    strange = st.lists(st.sampled_from(["text", "label", "text", "x", ""]), min_size=1, max_size=4)
    columns = draw(st.one_of(st.just(["text", "label"]), strange))
    whole = st.lists(CELL, min_size=len(columns), max_size=len(columns))
    rows = draw(st.lists(st.one_of(whole, whole, whole, st.lists(CELL, max_size=5)), max_size=6))
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    return lines([columns, *rows], draw(st.sampled_from([",", ",", "\t", ";"])), end)


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
    own = {"csv": [".csv", ".tsv"], "json": [".json", ".jsonl"], "text": [".txt"]}.get(kind, [])
    ending = draw(st.sampled_from([*own * 4, ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt"]))
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


def check(
    scripts: WarmScripts, model: Path, folder: Path, ending: str, content: bytes, flags: dict[str, object]
) -> str:
    """Train a step on a file; returns how that ended."""
    path = folder / f"data{ending}"
    path.write_bytes(content)
    words = [f"--{name}={value}" for name, value in flags.items()]
    started = time.monotonic()
    result = scripts(
        "train.py",
        f"--model_name_or_path={model}",
        f"--train_file={path.name}",
        "--max_steps=1",
        "--save_steps=0",
        "--overwrite_output_dir",
        "--output_dir=run",
        "--mixed_precision=no",
        "--use_cpu",
        *words,
        cwd=folder,
    )
    assert time.monotonic() - started < SECONDS
    assert result.code in (0, 2), (result.code, result.err)
    assert "Traceback" not in result.err
    if result.code == 2:
        assert path.name in result.error_lines[-1] or "--delimiter" in result.error_lines[-1], result.err
    return {0: "trained", 2: "refused"}[result.code]


def main(cases: int, scripts: WarmScripts, model: Path, folder: Path) -> dict[str, int]:
    """Run so many cases; returns how many ended in which way."""
    outcomes: dict[str, int] = {}

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(file=files())
    def run(file: tuple[str, bytes, dict[str, object]]) -> None:
        outcome = check(scripts, model, folder, *file)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    run()
    return outcomes


def tiny_model(folder: Path) -> Path:
    """Write a model of one block, 8 wide."""
    from emoft.model.loading import fresh_model
    from emoft.model.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["any text"], 300)
    fresh_model("n_layer=1,n_embd=8,n_head=1,n_positions=64", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        scripts = WarmScripts(Path(name))
        print(main(int(sys.argv[1]) if len(sys.argv) > 1 else 500, scripts, tiny_model(Path(name) / "m"), Path(name)))
        scripts.close()
