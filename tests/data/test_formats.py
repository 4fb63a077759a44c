"""Files as people bring them: each is read as it stands, or refused by a line that says where and what is wrong."""

import csv
import datetime
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from emoft.config import TrainConfig
from emoft.data.formats import guess_delimiter
from emoft.data.reading import read_splits
from emoft.errors import UserError

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")
ROWS = [{"text": "i feel fine", "label": "joy"}, {"text": "i feel low", "label": "sadness"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        with open(path, "wb") as file:
            pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        path.write_text("".join(f"{row['text']};{row['label']}\n" for row in rows), encoding="utf-8")
    return path


def config(path: Path, **settings: object) -> TrainConfig:
    values = {"template": "{label}: {text}", "delimiter": ";" if path.suffix == ".txt" else "", **settings}
    return TrainConfig(train_file=str(path), **values)


def read(path: Path, **settings: object) -> list[dict]:
    return list(read_splits(config(path, **settings))[0]["train"])


def refusal(path: Path, **settings: object) -> str:
    with pytest.raises(UserError) as caught:
        read_splits(config(path, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestPaths:
    @pytest.mark.parametrize("ending", ENDINGS)
    @pytest.mark.parametrize("name", ["train[1]", "a::b", "tr*in", "wh?t", "{a,b}", "a b", "%20", "[x]/train", "hf:x"])
    def test_a_path_is_a_path(self, tmp_path: Path, ending: str, name: str) -> None:
        for wrong in ("train1", "train", "what", "a", "x/train"):
            write(tmp_path / f"{wrong}{ending}", [{"text": "WRONG", "label": "wrong"}])
        assert read(write(tmp_path / f"{name}{ending}", ROWS)) == ROWS

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_a_file_that_was_replaced_is_read_anew_though_its_time_and_size_are_the_same(
        self, tmp_path: Path, ending: str
    ) -> None:
        path = write(tmp_path / f"a{ending}", ROWS)
        before = os.stat(path)
        assert read(path) == ROWS
        others = [{"text": "i feel good", "label": "joy"}, {"text": "i feel bad", "label": "sadness"}]
        write(path, others)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert read(path) == others

    def test_a_file_that_may_not_be_read_is_blamed_itself(self, tmp_path: Path) -> None:
        if os.getuid() == 0:
            pytest.skip("root may read everything")
        path = write(tmp_path / "a.csv", ROWS)
        path.chmod(0)
        assert "check its permissions" in refusal(path)


class TestColumns:
    @pytest.mark.parametrize("ending", [".jsonl", ".json"])
    def test_those_that_are_not_used_may_hold_anything(self, tmp_path: Path, ending: str) -> None:
        """What a library guesses of the first 10 MB does not matter."""
        fill = "x" * 1_000_000
        rows = [{**ROWS[n % 2], "more": {"n": n}, "fill": fill} for n in range(11)]
        rows += [{**ROWS[0], "more": "a string", "new": [1]}, {**ROWS[1], "more": None, "label": 7}]
        found = read(write(tmp_path / f"a{ending}", rows))
        assert [row["text"] for row in found] == [row["text"] for row in rows]
        assert found[-1]["label"] == "7"

    @pytest.mark.parametrize("header", [" text , label", "\ufefftext,label", "text,label ", '"text","label"'])
    def test_blanks_around_a_name(self, tmp_path: Path, header: str) -> None:
        (tmp_path / "a.csv").write_text(f"{header}\nfine,joy\nlow,sadness\n", encoding="utf-8")
        assert [row["text"] for row in read(tmp_path / "a.csv")] == ["fine", "low"]

    def test_names_are_quoted_where_one_is_missing(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("text ;label\nfine,joy\n")
        assert "no column 'text', only 'text ;label'" in refusal(tmp_path / "a.csv")
        write(tmp_path / "a.jsonl", [{"Text": "a", "label": "b"}])
        assert "no column 'text', only 'Text', 'label'" in refusal(tmp_path / "a.jsonl")

    def test_a_header_inside_is_left_out_and_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Two files were put together."""
        (tmp_path / "a.csv").write_text("text,label\nfine,joy\ntext,label\nlow,sadness\n")
        assert len(read(tmp_path / "a.csv")) == 2
        assert "line 3 holds the names of columns once more" in capsys.readouterr().err
        (tmp_path / "b.csv").write_text("message,mood\nfine,joy\n")
        named = {"column_names": ["message", "mood"], "text_column": "message", "label_column": "mood"}
        assert [row["text"] for row in read(tmp_path / "b.csv", **named)] == ["fine"]
        (tmp_path / "c.txt").write_text("text;label\nfine;joy\nlow;sadness\n")
        assert [row["text"] for row in read(tmp_path / "c.txt")] == ["fine", "low"]

    @pytest.mark.parametrize("ending", ENDINGS[:-1])
    def test_the_label_cannot_be_the_text(self, tmp_path: Path, ending: str) -> None:
        path = write(tmp_path / f"a{ending}", ROWS)
        assert "is the column of the texts" in refusal(path, label_column="text")


class TestLines:
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    @pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl"])
    def test_any_line_end(self, tmp_path: Path, ending: str, end: str) -> None:
        path = write(tmp_path / f"a{ending}", ROWS)
        text = path.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\n", end)
        path.write_text(text, encoding="utf-8", newline="")
        assert read(path) == ROWS

    @pytest.mark.parametrize("end", ["\n", "\r"])
    def test_lines_are_counted_whatever_ends_them(self, tmp_path: Path, end: str) -> None:
        (tmp_path / "a.txt").write_bytes(end.join(["fine;joy", "low;sadness", "none"]).encode())
        assert "line 3 has no ';'" in refusal(tmp_path / "a.txt")
        (tmp_path / "b.txt").write_bytes(end.join(["fine;joy", "low;sadness"]).encode() + end.encode() + b"\xff;joy")
        assert "line 3: byte" in refusal(tmp_path / "b.txt")
        (tmp_path / "c.txt").write_bytes(end.join(["fine;joy", "lo\0w;sadness"]).encode())
        assert "line 2 holds a NUL" in refusal(tmp_path / "c.txt")

    def test_a_byte_order_mark_before_any_line_is_dropped(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("\ufefffine;joy\n\ufefflow;sadness\n", encoding="utf-8")
        assert [row["text"] for row in read(tmp_path / "a.txt")] == ["fine", "low"]

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
    @pytest.mark.parametrize("ending", [".txt", ".csv", ".jsonl"])
    def test_other_encodings_are_named(self, tmp_path: Path, encoding: str, ending: str) -> None:
        path = write(tmp_path / f"a{ending}", ROWS * 5)
        path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
        assert f"is in the encoding {encoding[:6].upper()}" in refusal(path)


class TestValues:
    @pytest.mark.parametrize("ending", [".json", ".jsonl"])
    @pytest.mark.parametrize(
        ("third", "said"),
        [
            ('{"text": "x \\udc00", "label": "joy"}', "line 3: the text holds \\udc00"),
            ('{"text": "x", "label": "\\ud83d"}', "line 3: the label holds \\ud83d"),
            ('{"text": 1984, "label": "joy"}', "line 3: 'text' is 1984, a number, not text"),
            ('{"text": true, "label": "joy"}', "line 3: 'text' is true, a truth value, not text"),
            ('{"text": ["a"], "label": "joy"}', "line 3: 'text' is [\"a\"], a list, not text"),
            ('{"text": "x", "label": ["joy", "love"]}', "line 3: the label \"['joy', 'love']\" is a list"),
            ('{"text": "x", "label": {"a": 1}}', "is an object"),
            ('{"text": "x", "label": 0.5}', "line 3: the label '0.5' is a fraction"),
            ("[1]", "line 3 is no JSON object"),
            ('{"text": "x" "label": 1}', "line 3: Expecting"),
        ],
    )
    def test_what_is_wrong_is_told_with_its_line(self, tmp_path: Path, ending: str, third: str, said: str) -> None:
        rows = [json.dumps(row) for row in ROWS]
        content = "\n".join([*rows, third, ""]) if ending == ".jsonl" else f"[{rows[0]},\n{rows[1]},\n{third}\n]"
        (tmp_path / f"a{ending}").write_text(content)
        assert said in refusal(tmp_path / f"a{ending}")

    def test_a_list_over_many_lines(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text("\n\n" + json.dumps([*ROWS, {"text": 5, "label": "joy"}], indent=1))
        assert "line 12: 'text' is 5" in refusal(tmp_path / "a.json"), "the line on which the object begins"

    @pytest.mark.parametrize("end", ["", "]", "] x", ",]"])
    def test_a_list_that_does_not_end_well(self, tmp_path: Path, end: str) -> None:
        (tmp_path / "a.json").write_text("[" + json.dumps(ROWS[0]) + "\n" + end)
        if end == "]":
            assert read(tmp_path / "a.json") == ROWS[:1]
        else:
            assert "line 2" in refusal(tmp_path / "a.json")

    @pytest.mark.parametrize(
        ("labels", "names"),
        [
            ([" joy", "joy", "joy ", "joy\u200b", "\ufeffjoy", "jo\u0079"], {"joy"}),
            (["dégoût", "de\u0301gou\u0302t"], {"dégoût"}),
            ([0, 0.0, "0", "0.0", "0."], {"0"}),
            ([True, "True"], {"True"}),
            (["very  sad", "very sad", "very\nsad"], {"very sad"}),
            ([1, 10, "1", "1.5"], {"1", "10", "1.5"}),
        ],
    )
    def test_one_emotion_however_it_is_written(self, tmp_path: Path, labels: list, names: set[str]) -> None:
        rows = [{"text": f"i feel {number}", "label": label} for number, label in enumerate(labels)]
        splits, text_format = read_splits(config(write(tmp_path / "a.jsonl", rows)))
        assert set(splits["train"]["label"]) == set(text_format.labels) == names

    def test_one_emotion_in_two_files(self, tmp_path: Path) -> None:
        integers = pa.table({"text": ["a", "b"], "label": pa.array([0, 1])})
        floats = pa.table({"text": ["c", "d", "e"], "label": pa.array([0.0, 1.0, None])})
        for name, table in (("train", integers), ("validation", floats)):
            pq.write_table(table, tmp_path / f"{name}.parquet")
        splits, text_format = read_splits(
            config(tmp_path / "train.parquet", validation_file=str(tmp_path / "validation.parquet"))
        )
        assert text_format.labels == ["0", "1"]
        assert splits["validation"]["label"] == ["0", "1"], "the row without a label is skipped"

    def test_labels_that_differ_in_case_only_are_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        read(write(tmp_path / "a.csv", [{"text": "a", "label": "joy"}, {"text": "b", "label": "Joy"}]))
        assert "upper and lower case only: Joy, joy" in capsys.readouterr().err

    @pytest.mark.parametrize("label", [float("nan"), None, "", "  ", "\u200b"])
    def test_missing_labels_are_skipped_and_counted(
        self, tmp_path: Path, label: object, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert read(write(tmp_path / "a.jsonl", [*ROWS, {"text": "x", "label": label}])) == ROWS
        assert "skipped 1 of 3 rows" in capsys.readouterr().err


class TestParquet:
    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
    def test_any_kind_of_string(self, tmp_path: Path, kind: pa.DataType) -> None:
        columns = {name: pa.array([row[name] for row in ROWS], pa.string()).cast(kind) for name in ("text", "label")}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == ROWS

    def test_a_dictionary_of_strings(self, tmp_path: Path) -> None:
        columns = {name: pa.array([row[name] for row in ROWS]).dictionary_encode() for name in ("text", "label")}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == ROWS

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ([b"a", b"b"], "holds binary, not text"),
            ([1, 2], "holds int64, not text"),
            ([["a"], ["b"]], "not text"),
        ],
    )
    def test_no_text(self, tmp_path: Path, values: list, said: str) -> None:
        pq.write_table(pa.table({"text": values, "label": ["x", "y"]}), tmp_path / "a.parquet")
        assert said in refusal(tmp_path / "a.parquet")

    @pytest.mark.parametrize("value", [["joy"], {"a": 1}, datetime.date(2020, 1, 1), b"joy", 0.25])
    def test_no_label(self, tmp_path: Path, value: object) -> None:
        rows = [{"text": "i feel it", "label": value}]
        path = write(tmp_path / "a.parquet", rows)
        assert re.search(r"a\.parquet row 1: the label .* not the name of one emotion", refusal(path))

    @pytest.mark.parametrize("number", [5, -2])
    def test_a_class_beyond_the_names(self, tmp_path: Path, number: int) -> None:
        features = Features({"text": Value("string"), "label": ClassLabel(names=["sadness", " joy", "love"])})
        rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, -1, 0]}, features=features)
        table = rows.with_format("arrow")[:]
        assert read_with_labels(tmp_path, table, [1, -1, 0])[1] == ["sadness", "joy", "love"]
        with pytest.raises(UserError, match=f"row 2: the label {number} is beyond the 3 names"):
            read_with_labels(tmp_path, table, [1, number, 0])


def read_with_labels(folder: Path, table: pa.Table, labels: list[int]) -> tuple[list[dict], list[str]]:
    """Write a table, with the metadata of `datasets`, whose class numbers are replaced; and read it."""
    column = pa.array(labels, pa.int64())
    metadata = {b"huggingface": json.dumps(INFO).encode()}
    changed = table.set_column(1, "label", column).replace_schema_metadata(metadata)
    pq.write_table(changed, folder / "a.parquet")
    splits, text_format = read_splits(config(folder / "a.parquet"))
    return list(splits["train"]), text_format.labels


INFO = {
    "info": {
        "features": {
            "text": {"dtype": "string", "_type": "Value"},
            "label": {"names": ["sadness", " joy", "love"], "_type": "ClassLabel"},
        }
    }
}


class TestTextFiles:
    @pytest.mark.parametrize("delimiter", [";", "\t", "|"])
    def test_what_looks_like_labels_is_told(
        self, tmp_path: Path, delimiter: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = [f"i feel {number}{delimiter}{('joy', 'sadness')[number % 2]}" for number in range(20)]
        (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
        assert f"add --delimiter {delimiter!r}" in refusal(tmp_path / "a.txt", delimiter="")
        without = TrainConfig(train_file=str(tmp_path / "a.txt"))
        assert len(read_splits(without)[0]["train"]) == 20
        assert f"look like text{delimiter}label" in capsys.readouterr().err

    def test_texts_alone_are_left_alone(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "a.txt").write_text("i feel fine; so good\nwell, now\ni am low; that is all of it\n" * 5)
        assert guess_delimiter(tmp_path / "a.txt") == ""
        read_splits(TrainConfig(train_file=str(tmp_path / "a.txt")))
        assert capsys.readouterr().err == ""
        assert "write text;label lines" in refusal(tmp_path / "a.txt", delimiter="")


class TestFolders:
    def folder(self, place: Path, **files: list[dict]) -> Path:
        for name, rows in files.items():
            write(place / name.replace("__", "/").replace("_", "."), rows)
        return place

    def read(self, folder: Path, **settings: object) -> dict[str, list[dict]]:
        flags = TrainConfig(dataset_name=str(folder), template="{label}: {text}", **settings)
        return {name: list(rows) for name, rows in read_splits(flags)[0].items()}

    def test_messages_that_look_like_nothing_are_messages(self, tmp_path: Path) -> None:
        rows = [{"text": text, "label": "007"} for text in ("null", "NA", "nan", "None", "1984")]
        assert self.read(self.folder(tmp_path / "d", train_csv=rows))["train"] == rows

    def test_splits_by_the_names_of_files_and_folders(self, tmp_path: Path) -> None:
        one, two = ROWS[:1], ROWS[1:]
        folder = self.folder(tmp_path / "[d]", **{"train-00000-of-00002_csv": one, "train-00001-of-00002_jsonl": two})
        self.folder(folder, **{"data__valid__part_json": two, ".hidden__train_csv": one})
        assert self.read(folder) == {"train": ROWS, "validation": two}
        assert self.read(self.folder(tmp_path / "e", anything_parquet=ROWS)) == {"train": ROWS}

    def test_all_flags_count(self, tmp_path: Path) -> None:
        folder = tmp_path / "d"
        folder.mkdir()
        (folder / "train.csv").write_text("joy|fine\nfear|bad\n")
        flags = {
            "column_names": ["mood", "message"],
            "delimiter": "|",
            "text_column": "message",
            "label_column": "mood",
        }
        assert [row["text"] for row in self.read(folder, **flags)["train"]] == ["fine", "bad"]

    def test_a_configuration_is_a_folder(self, tmp_path: Path) -> None:
        self.folder(tmp_path / "d", split__train_csv=ROWS[:1], unsplit__train_csv=ROWS)
        assert self.read(tmp_path / "d", dataset_config_name="split") == {"train": ROWS[:1]}
        with pytest.raises(UserError, match="no folder in"):
            self.read(tmp_path / "d", dataset_config_name="other")

    def test_a_folder_without_data(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("nothing")
        with pytest.raises(UserError, match="put files such as train.csv into it"):
            self.read(tmp_path)


def test_a_delimiter_of_another_file_is_not_forced_on_a_table(tmp_path: Path) -> None:
    """--delimiter is one flag for all files."""
    write(tmp_path / "a.csv", ROWS)
    write(tmp_path / "b.txt", ROWS)
    flags = config(tmp_path / "b.txt", validation_file=str(tmp_path / "a.csv"))
    splits, _ = read_splits(flags)
    assert list(splits["train"]) == list(splits["validation"]) == ROWS
    (tmp_path / "c.csv").write_text("text;label\nso, well;joy\n")
    assert read(tmp_path / "c.csv", delimiter=";") == [{"text": "so, well", "label": "joy"}]
    assert "no column 'text', only 'text;label'" in refusal(tmp_path / "c.csv")
