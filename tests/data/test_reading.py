import csv
import json
import re
from pathlib import Path

import fuzz
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from emoft.config import TrainConfig
from emoft.data.reading import read_splits
from emoft.errors import UserError

# What other readers take for a missing value, a number, two columns or two lines.
TEXTS = ["i feel fine", "NA", "null", "1984", "so; so", 'she said "no", and left', "ខ្ញុំសប្បាយចិត្ត", "  spaced  ", "a\tb"]
LABELS = ["joy", "anger", "fear", "joy", "love", "anger", "joy", "1", "love"]
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, ending: str) -> tuple[Path, dict[str, str]]:
    """Write ROWS in a format; returns the file and the flags it needs."""
    path = folder / f"rows{ending}"
    if ending in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter="\t" if ending == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif ending == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif ending == ".parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text("".join(f"{row['text']};{row['label']}\r\n" for row in ROWS), encoding="utf-8-sig", newline="")
        return path, {"delimiter": ";"}
    return path, {}


def config(path: Path, **settings: object) -> TrainConfig:
    return TrainConfig(train_file=str(path), template="{label}: {text}", **settings)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    path, flags = write(tmp_path, ending)
    splits, text_format = read_splits(config(path, **flags))
    assert list(splits["train"]) == ROWS
    assert text_format.labels == sorted(set(LABELS))
    assert splits["train"].cache_files, "memory-mapped, not held in memory"


def test_text_lines_without_delimiter(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one; two\nthree\u2028four\n", encoding="utf-8")
    splits, _ = read_splits(TrainConfig(train_file=str(tmp_path / "a.txt")))
    assert splits["train"]["text"] == ["one; two", "three\u2028four"]


def test_columns_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("joy|fine\nfear|bad\n")
    settings = {"column_names": ["mood", "message"], "delimiter": "|", "text_column": "message", "label_column": "mood"}
    splits, _ = read_splits(config(tmp_path / "a.csv", **settings))
    assert list(splits["train"]) == [{"text": "fine", "label": "joy"}, {"text": "bad", "label": "fear"}]


def test_class_labels_keep_their_names_and_order(tmp_path: Path) -> None:
    names = ["sadness", "joy", "love"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = {"text": ["a", "b", "c"], "label": [1, -1, 0]}  # -1: the Hub's mark for a row without a label
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    splits, text_format = read_splits(config(tmp_path / "a.parquet"))
    assert list(splits["train"]) == [{"text": "a", "label": "joy"}, {"text": "c", "label": "sadness"}]
    assert text_format.labels == names


def test_numbers_as_labels(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 3}\n{"text": "b", "label": 1}\n')
    splits, text_format = read_splits(config(tmp_path / "a.jsonl"))
    assert splits["train"]["label"] == ["3", "1"]
    assert text_format.labels == ["1", "3"]


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for text in ("one", "two"):
        path.write_text(f"text\n{text}\n")
        splits, _ = read_splits(TrainConfig(train_file=str(path)))
        assert splits["train"]["text"] == [text]


def test_the_first_so_many_samples(tmp_path: Path) -> None:
    path, _ = write(tmp_path, ".csv")
    files = {"validation_file": str(path), "test_file": str(path)}
    splits, _ = read_splits(config(path, **files, max_train_samples=2, max_eval_samples=100))
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [2, len(ROWS), len(ROWS)]
    splits, _ = read_splits(config(path, **files, max_eval_samples=1))
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [len(ROWS), 1, 1]


def test_hostile_files_are_trained_on_or_refused_in_a_line(scripts, tmp_path) -> None:
    """The short form of fuzz.py, which does a thousand."""
    outcomes = fuzz.main(16, scripts, tmp_path)
    assert sum(outcomes.values()) == 16
    assert sum(count for name, count in outcomes.items() if "the right texts" in name) > 3


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.jsonl", '{"text": "a"}\n\nnull\n', "line 3 is no JSON object"),
        ("x.jsonl", '{"text": "a"}\n{"text": \n', "line 2: Expecting value"),
        ("x.json", '[{"text": "a"},\n 5]', "line 2 is no JSON object"),
        ("x.json", "\ufeffnull", "line 1 is no JSON object"),  # ends the process in the library's reader
        ("x.json", "[" * 100_000, "line 1"),
        ("x.csv", '"', "line 1"),
    ],
)
def test_the_line_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{name} {expected}")):
        read_splits(config(tmp_path / name))
