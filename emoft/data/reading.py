"""Data: read and check the splits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from emoft.data.cache import cache_dir, cache_fault, cache_in_use, content_hash, fingerprint
from emoft.data.folders import files_of_splits
from emoft.data.formats import Columns, class_names, guess_delimiter, read_rows
from emoft.data.labels import clean_label, differ_in_case_only, label_name
from emoft.data.sources import check_file, is_folder
from emoft.data.template import TextFormat
from emoft.errors import UserError, warn
from emoft.hints import python
from emoft.private import fingerprint_of
from emoft.terminal import Bar

DataConfig = TrainConfig | EvaluateConfig
ROWS_NAMED = 5  # how many of the rows that a warning is about are named in it


@dataclass(frozen=True)
class Source:
    """What was read of a split."""

    rows: Dataset  # columns of strings: "text" and, if it is wanted, "label", each null where there is none
    where: str  # they are from, for messages
    classes: list[str]  # the names of all labels in their order, where the data declare them


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
        raw = {
            split: _read_file(config, f"--{split}_file", path, with_label) for split, path in sources.items() if path
        }
    elif any(sources.values()):
        raise UserError("--validation_file and --test_file need --train_file beside them: name the file to train on")
    else:
        raw = _read_dataset(config, "train", ("train", "validation"), with_label)
    if "validation" not in raw and (config.eval_steps or config.early_stopping_patience):
        raise UserError("--eval_steps and --early_stopping_patience need data to evaluate on: --validation_file")
    splits = {split: _whole_rows(source) for split, source in raw.items()}
    if with_label:
        labels = raw["train"].classes or sorted(splits["train"].unique("label"))
        if alike := differ_in_case_only(labels):
            warn(f"emotions differ in upper and lower case only: {', '.join(alike)}; if they are one, write them alike")
        if len(labels) == 1:
            warn(f"all of train has one emotion, {labels[0]}: there is nothing to tell apart, and no accuracy to show")
        text_format = TextFormat(config.template, config.append_eos, config.max_length, labels)
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
    raw: dict[str, Source] = {}
    with_label = text_format.has_label
    if config.train_file:
        raw["train"] = _read_file(config, "--train_file", config.train_file, with_label)
    if config.test_file:
        raw["test"] = _read_file(config, "--test_file", config.test_file, with_label)
    else:
        found = _read_dataset(config, config.split, ("train", config.split), with_label)
        raw["test"] = found[config.split]
        if "train" in found and "train" not in raw and config.split != "train":
            raw["train"] = found["train"]
    splits = {split: _whole_rows(source) for split, source in raw.items()}
    if text_format.has_label and not text_format.labels:
        names = sorted({label for rows in splits.values() for label in rows.unique("label")})
        text_format = replace(text_format, labels=names)
    if config.max_eval_samples:
        splits["test"] = splits["test"].select(range(min(config.max_eval_samples, len(splits["test"]))))
    return splits, text_format


def _read_file(config: DataConfig, flag: str, name: str, with_label: bool) -> Source:
    """Read a file, or take it from the cache, which knows it by its content."""
    path = check_file(flag, name)
    columns = Columns(
        config.text_column,
        config.label_column if with_label else "",
        config.delimiter,
        tuple(config.column_names),
    )
    if columns.text == columns.label:
        raise UserError(f"--label_column {columns.label} is the column of the texts: name that of the labels")
    try:
        content = content_hash(path)
        if path.suffix.lower() == ".txt" and not columns.delimiter and not with_label:
            _warn_of_labels(path)
        classes = class_names(path, columns)
    except OSError as error:
        raise UserError(f"{flag} {name} cannot be read ({error.strerror or error}): check its permissions") from None
    except pa.ArrowException as error:
        raise UserError(f"{flag} {name} cannot be read as parquet ({error}): write the file again") from None
    try:
        rows = Dataset.from_generator(
            _rows_of_file,
            features=Features(dict.fromkeys(("text", "label") if with_label else ("text",), Value("string"))),
            cache_dir=cache_dir(),
            gen_kwargs={"path": path.resolve(), "columns": columns, "content": content},
        )
    except (DatasetGenerationError, pa.ArrowException, ValueError, OSError) as error:
        raise _cause(error, f"{flag} {name}") from None
    return Source(rows, str(path), _distinct(classes))


def _warn_of_labels(path: Path) -> None:
    if found := guess_delimiter(path):
        warn(
            f"the lines of {path} look like text{found}label, and all of each is taken for the text: add --delimiter"
            f" {found!r} if it is not"
        )


def _distinct(classes: list[str]) -> list[str]:
    """Return the names of classes as labels are compared, each once."""
    return list(dict.fromkeys(map(clean_label, classes)))


def _rows_of_file(path: Path, columns: Columns, content: str) -> Iterator[dict[str, str | None]]:
    yield from read_rows(path, columns)


def _cause(error: BaseException, what: str) -> UserError:
    """Return what lies behind an error of the library: that of a row, of the cache's disk, or of the file."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return cache_fault(error)
    return UserError(f"{what} cannot be read ({error}): mend the file")


def _read_dataset(config: DataConfig, needed: str, wanted: tuple[str, ...], with_label: bool) -> dict[str, Source]:
    """Return those of the wanted splits that --dataset_name has; one of them is needed."""
    name = config.dataset_name
    if not name:
        raise UserError(f"no data: give --train_file or --dataset_name, or run {python()} train.py --config demo")
    # The default of the default data set only: another has configurations of its own, or a single one.
    config_name = config.dataset_config_name or ("split" if name == TrainConfig.dataset_name else "")
    found: dict[str, Any]
    if is_folder(name, "data set", "dataset_name"):
        if config.dataset_revision != "main":
            raise UserError(f"--dataset_name {name} is a folder: leave --dataset_revision away")
        found = files_of_splits(Path(name), config_name)
    else:
        found = _load_from_hub(name, config_name, config.dataset_revision)
    if needed not in found:
        raise UserError(f"--dataset_name {name} has no split {needed}, only {', '.join(found)}: choose another")
    return {
        split: _read_files(config, found[split], with_label)
        if isinstance(found[split], list)
        else _as_strings(found[split], f"{name} split {split}", config, with_label)
        for split in dict.fromkeys(wanted)
        if split in found
    }


def _read_files(config: DataConfig, paths: list[Path], with_label: bool) -> Source:
    """Read files that belong to one split, one after another."""
    sources = [_read_file(config, "--dataset_name", str(path), with_label) for path in paths]
    rows = datasets.concatenate_datasets([source.rows for source in sources])
    return Source(rows, ", ".join(source.where for source in sources), sources[0].classes)


def _load_from_hub(name: str, config_name: str, revision: str) -> dict[str, Any]:
    reason = hub.ask(name, "data set", "dataset_name", revision)
    if reason and revision != "main":
        # The library takes from its cache what it has of that name.
        raise UserError(
            f"--dataset_revision {revision}: the Hub is out of reach ({reason}), and the cache does not tell revisions"
            " apart: go online, or leave it away"
        )
    try:
        with Bar(f"Reading {name}"):
            return datasets.load_dataset(name, config_name or None, revision=revision, cache_dir=cache_dir())
    except Exception as error:  # the libraries raise dozens of types for what is one case to the user
        if isinstance(error, ValueError) and "onfig" in str(error):
            raise UserError(
                f"--dataset_config_name {config_name or '(none)'} of {name}: {error}; choose another"
            ) from None
        raise hub.not_found(name, "data set", "dataset_name", error, reason) from None


def _as_strings(rows: Dataset, where: str, config: DataConfig, with_label: bool) -> Source:
    """Reduce a split of a data set to its texts and the names of its labels."""
    wanted = {config.text_column: "text"} | ({config.label_column: "label"} if with_label else {})
    if with_label and len(wanted) == 1:
        raise UserError(f"--label_column {config.label_column} is the column of the texts: name that of the labels")
    for column, role in wanted.items():
        if column not in rows.column_names:
            raise UserError(
                f"{where} has no column {column!r}, only {', '.join(rows.column_names)}: name one by --{role}_column"
                + (", or give a --template without {label}" if role == "label" else "")
            )
    feature = rows.features[config.text_column]
    if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string", "string_view", "null"):
        kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__
        raise UserError(f"{where}: column {config.text_column!r} holds {kind}, not text: name another by --text_column")
    rows = rows.select_columns(list(wanted)).rename_columns(wanted)
    if not with_label:
        return Source(rows, where, [])
    classes = rows.features["label"].names if isinstance(rows.features["label"], ClassLabel) else []

    def name_labels(labels: list[Any], places: list[int]) -> dict[str, list[str | None]]:
        """Return the names of the labels of some rows, whose places in the file are given."""
        bar.advance(len(labels))
        named = []
        for label, place in zip(labels, places, strict=True):
            try:
                named.append(label_name(label, classes))
            except ValueError as error:
                raise UserError(f"{where} row {place + 1}: {error}; name another column by --label_column") from None
        return {"label": named}

    with cache_in_use(), Bar("Naming labels", "examples", len(rows)) as bar:
        rows = rows.map(
            name_labels,
            batched=True,
            with_indices=True,
            input_columns="label",
            features=Features(rows.features | {"label": Value("string")}),
            new_fingerprint=fingerprint(fingerprint_of(rows), "labels as strings", repr(classes)),
        )
    return Source(rows, where, _distinct(classes))


def _whole_rows(source: Source) -> Dataset:
    """Return the rows of a split without those in which a text or a label is missing, or nothing but blanks."""
    rows, where = source.rows, source.where
    if len(rows) == 0:
        raise UserError(f"{where} holds no example: it needs at least one")
    whole: Any = True
    table = rows.with_format("arrow")[:]
    for column in table.columns:
        trimmed = pc.utf8_trim_whitespace(column.cast(pa.string()))
        whole = pc.and_(whole, pc.fill_null(pc.greater(pc.utf8_length(trimmed), 0), False))
    is_whole = whole.to_numpy()
    missing = np.flatnonzero(~is_whole)
    what = " or ".join(rows.column_names)
    if len(missing) == len(rows):
        raise UserError(f"{where}: every row is without {what}, fill in the columns or name others")
    if len(missing):
        named = ", ".join(str(index + 1) for index in missing[:ROWS_NAMED])
        more = ", ..." if len(missing) > ROWS_NAMED else ""
        warn(f"{where}: skipped {len(missing)} of {len(rows)} rows, which have no {what}: row {named}{more}")
        rows = rows.select(np.flatnonzero(is_whole))
    return rows
