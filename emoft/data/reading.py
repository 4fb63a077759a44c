"""Data: read and check the splits."""

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from emoft.config import INPUT_FILES, EvaluateConfig, TrainConfig
from emoft.data import hub
from emoft.data.sources import check_file
from emoft.data.template import TextFormat
from emoft.data.tokens import fingerprint
from emoft.errors import UserError, warn
from emoft.hints import python
from emoft.private import fingerprint_of
from emoft.terminal import Bar

DataConfig = TrainConfig | EvaluateConfig
csv.field_size_limit(2**31 - 1)  # a text may be longer than the module's 131,072 characters; it is cut to max_length
JSON_ROW = 'write {"text": ...} for each example, one a line or all in one list'
ROWS_NAMED = 5  # how many of the rows that a warning is about are named in it


def read_splits(config: TrainConfig) -> tuple[dict[str, Dataset], TextFormat]:
    """Read and check all splits that the configuration names.

    Returns:
        The splits "train" and, where there are any, "validation" and "test", each with the string column "text" and,
        if the template names it, "label"; and the format that turns their rows into texts.

    Raises:
        UserError: data that are missing or cannot be used, with the file and the row.
    """
    text_format = TextFormat(config.template, config.append_eos, config.max_length)
    with_label = text_format.has_label
    sources = {field.removesuffix("_file"): getattr(config, field) for field in INPUT_FILES}
    if config.train_file:
        raw = {split: _read_file(config, f"--{split}_file", path) for split, path in sources.items() if path}
    elif any(sources.values()):
        raise UserError("--validation_file and --test_file need --train_file beside them: name the file to train on")
    else:
        raw = _read_hub(config, "train", ("train", "validation"))
        sources = {split: f"{config.dataset_name} split {split}" for split in raw}
    if "validation" not in raw and (config.eval_steps or config.early_stopping_patience):
        raise UserError("--eval_steps and --early_stopping_patience need data to evaluate on: --validation_file")
    splits = {split: _clean(rows, sources[split], config, with_label) for split, rows in raw.items()}
    if with_label:
        feature = raw["train"].features[config.label_column]
        labels = feature.names if isinstance(feature, ClassLabel) else sorted(splits["train"].unique("label"))
        text_format = TextFormat(config.template, config.append_eos, config.max_length, list(labels))
    for split, rows in splits.items():
        if limit := config.max_train_samples if split == "train" else config.max_eval_samples:
            splits[split] = rows.select(range(min(limit, len(rows))))
    return splits, text_format


def read_evaluation_splits(config: EvaluateConfig, text_format: TextFormat) -> tuple[dict[str, Dataset], TextFormat]:
    """Read and check what a saved model is evaluated on.

    Args:
        config: names it.
        text_format: the model's; its labels are taken from the data if it has none.

    Returns:
        The split "test" and, if it can be had, "train", as of `read_splits`; and the format with labels.

    Raises:
        UserError: data that are missing or cannot be used, with the file and the row.
    """
    raw: dict[str, Dataset] = {}
    sources = {"train": config.train_file, "test": config.test_file}
    if config.train_file:
        raw["train"] = _read_file(config, "--train_file", config.train_file)
    if config.test_file:
        raw["test"] = _read_file(config, "--test_file", config.test_file)
    else:
        found = _read_hub(config, config.split, ("train", config.split))
        sources |= {split: f"{config.dataset_name} split {split}" for split in ("train", "test") if split not in raw}
        raw["test"] = found[config.split]
        if "train" in found and "train" not in raw and config.split != "train":
            raw["train"] = found["train"]
    splits = {split: _clean(rows, sources[split], config, text_format.has_label) for split, rows in raw.items()}
    if text_format.has_label and not text_format.labels:
        names = sorted({label for rows in splits.values() for label in rows.unique("label")})
        text_format = replace(text_format, labels=names)
    if config.max_eval_samples:
        splits["test"] = splits["test"].select(range(min(config.max_eval_samples, len(splits["test"]))))
    return splits, text_format


def _read_file(config: DataConfig, flag: str, name: str) -> Dataset:
    path = check_file(flag, name)
    ending = path.suffix.lower()
    try:
        if ending in (".json", ".jsonl"):
            _check_json(path)
        if ending in (".json", ".jsonl", ".parquet"):
            with Bar(f"Reading {path.name}"):
                reader = "parquet" if ending == ".parquet" else "json"
                return datasets.load_dataset(reader, data_files=str(path), split="train")
        columns = _columns(path, config)
        changed = path.stat().st_mtime_ns, path.stat().st_size  # part of the cache's key: an edited file is read again
        return Dataset.from_generator(
            _rows,
            features=Features({column: Value("string") for column in columns}),
            # A tuple of columns: lists are taken for parts of the data to be read one by one.
            gen_kwargs={
                "path": path.resolve(),
                "columns": tuple(columns),
                "delimiter": _delimiter(path, config),
                "has_header": ending != ".txt" and not config.column_names,
                "changed": changed,
            },
        )
    except (DatasetGenerationError, pa.ArrowException, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"{flag} {name} cannot be read ({cause}): mend the file") from None


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file; the first one that is not UTF-8 raises a UserError that names it."""
    with (
        open(path, "rb") as file,
        Bar(f"Reading {path.name}", "B", path.stat().st_size) as bar,
    ):
        for number, line in enumerate(file, start=1):
            try:
                # "utf-8-sig" drops the byte order mark that Windows programs put before the first line.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} line {number}: byte {error.start + 1} ({line[error.start]:#04x}) is not UTF-8,"
                    " save the file in the encoding UTF-8"
                ) from None
            bar.advance(len(line))


def _check_json(path: Path) -> None:
    """See that a file holds JSON objects, one a line or in one list.

    The library's reader tells no line, and some files without objects end the whole process in it.
    """
    lines = ((number, line) for number, line in enumerate(_lines(path), start=1) if line.strip())
    place, first = 1, ""
    try:
        for place, line in lines:
            first = first or line
            if first.lstrip().startswith("["):
                content = json.loads("".join([first, *(more for _, more in lines)]))
                for row, example in enumerate(content, start=1):
                    if not isinstance(example, dict):
                        raise UserError(f"{path} row {row} is no JSON object: {JSON_ROW}")
            elif not isinstance(json.loads(line), dict):
                raise UserError(f"{path} line {place} is no JSON object: {JSON_ROW}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {place}: {getattr(error, 'msg', error)}; {JSON_ROW}") from None


def _delimiter(path: Path, config: DataConfig) -> str:
    return config.delimiter or {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower(), "")


def _columns(path: Path, config: DataConfig) -> list[str]:
    """Return the names of the columns of a .csv, .tsv or .txt file."""
    if path.suffix.lower() == ".txt":
        return [config.text_column, config.label_column] if config.delimiter else [config.text_column]
    delimiter = _delimiter(path, config)
    if len(delimiter) != 1:
        raise UserError(f"--delimiter {delimiter!r} must be a single character for {path}")
    try:
        columns = config.column_names or next(csv.reader(_lines(path), delimiter=delimiter), [])
    except csv.Error as error:
        raise UserError(f"{path} line 1: {error}, mend the line") from None
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: two columns have the same name among {', '.join(columns)}: rename one")
    return columns


def _rows(
    path: Path, columns: tuple[str, ...], delimiter: str, has_header: bool, changed: tuple[int, int]
) -> Iterator[dict[str, str]]:
    """Yield the rows of a .csv, .tsv or .txt file, all values as they stand: a message "NA" or "1984" is a message."""
    if path.suffix.lower() == ".txt":
        for number, line in enumerate(_lines(path), start=1):
            values = line.rstrip("\r\n").rsplit(delimiter, 1) if delimiter else [line.rstrip("\r\n")]
            if len(values) < len(columns) and values[0].strip():
                raise UserError(f"{path} line {number} has no {delimiter!r}: write text{delimiter}label")
            # An empty line stays, as a row without text, so that the rows a warning names are lines of the file.
            yield dict(zip(columns, values + [""] * (len(columns) - len(values)), strict=True))
        return
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    number = 0
    try:
        for number, values in enumerate(reader):
            if (number == 0 and has_header) or not values:
                continue
            if len(values) != len(columns):
                raise UserError(
                    f"{path} line {reader.line_num} has {len(values)} fields instead of {len(columns)}"
                    f" ({', '.join(columns)}): put a text that holds {delimiter!r} between double quotes"
                )
            yield dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}, mend the line") from None
    if number == 0 and has_header:
        raise UserError(f"{path} holds no example, only the names of columns: it needs at least one")


def _read_hub(config: DataConfig, needed: str, wanted: tuple[str, ...]) -> dict[str, Dataset]:
    """Return those of the wanted splits that there are; one of them is needed."""
    name = config.dataset_name
    if not name:
        raise UserError(f"no data: give --train_file or --dataset_name, or run {python()} train.py --config demo")
    is_local = hub.is_local(name, "data set", "dataset_name")
    # The default of the default data set only: another has configurations of its own, or a single one.
    config_name = config.dataset_config_name or ("split" if name == TrainConfig.dataset_name else None)
    try:
        with Bar(f"Reading {name}"):
            found = datasets.load_dataset(name, config_name)
    except Exception as error:  # the libraries raise dozens of types for what is one case to the user
        if isinstance(error, ValueError) and "onfig" in str(error):
            raise UserError(
                f"--dataset_config_name {config_name or '(none)'} of {name}: {error}; choose another"
            ) from None
        if is_local:
            raise UserError(
                f"--dataset_name {name} cannot be read ({error}): put data files such as train.csv into it"
            ) from None
        raise hub.not_found(name, "data set", "dataset_name", error) from None
    if needed not in found:
        raise UserError(f"--dataset_name {name} has no split {needed}, only {', '.join(found)}: choose another")
    return {split: found[split] for split in wanted if split in found}


def _clean(rows: Dataset, where: str, config: DataConfig, with_label: bool) -> Dataset:
    """Reduce a split to the string columns "text" and "label", without the rows in which one is null or blank."""
    if len(rows) == 0:
        raise UserError(f"{where} holds no example: it needs at least one")
    wanted = {config.text_column: "text"} | ({config.label_column: "label"} if with_label else {})
    for column, role in wanted.items():
        if column not in rows.column_names:
            raise UserError(
                f"{where} has no column {column!r}, only {', '.join(rows.column_names)}: name one by --{role}_column"
                + (", or give a --template without {label}" if role == "label" else "")
            )
    feature = rows.features[config.text_column]
    if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string", "null"):
        kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__
        raise UserError(f"{where}: column {config.text_column!r} holds {kind}, not text: name another by --text_column")
    rows = rows.select_columns(list(wanted)).rename_columns(wanted)
    if with_label:
        rows = _label_names(rows)

    whole: Any = True
    table = rows.with_format("arrow")[:]
    for column in table.columns:
        trimmed = pc.utf8_trim_whitespace(column.cast(pa.string()))
        whole = pc.and_(whole, pc.fill_null(pc.greater(pc.utf8_length(trimmed), 0), False))
    is_whole = whole.to_numpy()
    missing = np.flatnonzero(~is_whole)
    what = " or ".join(rows.column_names)
    if len(missing) == len(rows):
        raise UserError(f"{where}: every row is without {what}, fill column {config.text_column!r} or name another")
    if len(missing):
        named = ", ".join(str(index + 1) for index in missing[:ROWS_NAMED])
        more = ", ..." if len(missing) > ROWS_NAMED else ""
        warn(f"{where}: skipped {len(missing)} of {len(rows)} rows, which have no {what}: row {named}{more}")
        rows = rows.select(np.flatnonzero(is_whole))
    return rows


def _label_names(rows: Dataset) -> Dataset:
    """Turn the column "label" from ids of a ClassLabel, numbers or anything else into strings."""
    feature = rows.features["label"]
    names = feature.names if isinstance(feature, ClassLabel) else None
    if feature == Value("string"):
        return rows

    def to_strings(labels: list[Any]) -> dict[str, list[str | None]]:
        bar.advance(len(labels))
        if names:
            return {"label": [names[label] if label is not None and label >= 0 else None for label in labels]}
        return {"label": [None if label is None else str(label) for label in labels]}

    with Bar("Naming labels", "examples", len(rows)) as bar:
        return rows.map(
            to_strings,
            batched=True,
            input_columns="label",
            features=Features(rows.features | {"label": Value("string")}),
            new_fingerprint=fingerprint(fingerprint_of(rows), "labels as strings", repr(names)),
        )
