"""A data file -> a data set of the columns that are wanted, kept on disk; a fault in a file is told with its line."""

import csv
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from tqdm import tqdm

from emoft.config import TrainConfig
from emoft.errors import UserError

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")

Row = dict[str, str | None]


def read_file(config: TrainConfig, flag: str, name: str, wanted: dict[str, str]) -> Dataset:
    """Read a data file; an unchanged one is taken from the cache.

    Args:
        config: tells the delimiter and the names of the columns, where the file does not.
        flag: that names the file, for messages.
        name: of the file; its ending tells the format.
        wanted: the column to be read as "text" and, if the template needs it, the one to be read as "label".

    Returns:
        A memory-mapped data set. That of a .parquet file has all its columns, in their own types; the others have the
        wanted ones, as strings.

    Raises:
        UserError: the file is missing, empty or damaged, with the line where that can be told.
    """
    path = Path(os.path.expanduser(name))
    ending = path.suffix.lower()
    if os.path.isdir(path):
        raise UserError(f"{flag} {name} is a folder: name a file in it, or give the folder as --dataset_name")
    if not os.path.exists(path):
        raise UserError(f"{flag} {name}: no such file, check the path")
    if ending not in FORMATS:
        raise UserError(f"{flag} {name}: its ending tells no format, use one of {' '.join(FORMATS)}")
    try:
        status = path.stat()
        changed = status.st_mtime_ns, status.st_size
        if status.st_size == 0:
            raise UserError(f"{flag} {name} is empty: it needs at least one example")
        if ending == ".parquet":
            return _read_parquet(path, wanted)
        return Dataset.from_generator(
            _rows,
            features=Features({column: Value("string") for column in wanted}),
            # The arguments are the key of the cache: an edited file has another time or size and is read again.
            # Tuples, because lists are taken for parts of the data to be read one by one.
            gen_kwargs={
                "path": path.resolve(), "wanted": wanted, "delimiter": config.delimiter, "changed": changed,
                "names": tuple(config.column_names),
            },
        )  # fmt: skip
    except (DatasetGenerationError, pa.ArrowException, OSError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(
            f"{flag} {name} cannot be read ({cause}): check that it is whole, that you may read it, and that"
            f" {datasets.config.HF_DATASETS_CACHE} has room"
        ) from None


def no_column(where: object, column: str, role: str, columns: list[str]) -> UserError:
    """Return the error for a column that is not there, with what to do."""
    remedy = f"name one by --{role}_column" + (
        ", or what separates columns by --delimiter" if len(columns) == 1 else ""
    )
    return UserError(f"{where} has no column {column!r}, only {', '.join(columns)}: {remedy}")


def _read_parquet(path: Path, wanted: dict[str, str]) -> Dataset:
    if pq.read_metadata(path).num_rows == 0:
        raise UserError(f"{path} holds no example: it needs at least one")
    # Escaped, because the library takes a name with * or [ for a pattern.
    rows = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
    for name in wanted.keys() & set(rows.column_names):
        column = rows.with_format("arrow")[:][name]
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:  # a program other than Arrow may have written any bytes as text
            number = next(i for i, value in enumerate(column.cast(pa.binary()), start=1) if not _is_utf8(value.as_py()))
            raise UserError(f"{path} row {number}: {name!r} is not UTF-8, write the file again") from None
    return rows


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


def _rows(
    path: Path, wanted: dict[str, str], delimiter: str, names: tuple[str, ...], changed: tuple[int, int]
) -> Iterator[Row]:
    """Yield the rows of a text format, all values as they stand: a message "NA" or "1984" is a message."""
    delimiter = delimiter.replace("\\t", "\t")  # as one types it in a shell
    if path.suffix.lower() == ".txt":
        rows = _text_rows(path, wanted, delimiter, names)
    elif path.suffix.lower() in (".json", ".jsonl"):
        rows = _json_rows(path, wanted)
    else:
        rows = _table_rows(path, wanted, delimiter or ("\t" if path.suffix.lower() == ".tsv" else ","), names)
    row = None
    for row in rows:
        yield row
    if row is None:
        raise UserError(f"{path} holds no example: it needs at least one")


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their ends, whether those of Unix, Windows or old Macs.

    Raises:
        UserError: a line is not UTF-8.
    """
    number = 0
    with (
        open(path, "rb") as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"Reading {path.name}", delay=2) as bar,
    ):
        for chunk in file:
            # Of bytes, splitlines knows \n, \r and \r\n only: other separators, such as U+2028, stay in the text.
            for line in chunk.splitlines(keepends=True):
                number += 1
                try:
                    # "utf-8-sig" drops the byte order mark that Windows programs put before the first line.
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path} line {number}: byte {error.start + 1} ({line[error.start]:#04x}) is not UTF-8,"
                        " save the file in the encoding UTF-8"
                    ) from None
            bar.update(len(chunk))


def _text_rows(path: Path, wanted: dict[str, str], delimiter: str, names: tuple[str, ...]) -> Iterator[Row]:
    """Yield the lines of a .txt file; with a delimiter, what stands before and after the last one in the line."""
    if names:
        raise UserError(f"--column_names is for .csv and .tsv files; a line of {path} is text{delimiter or ';'}label")
    if not delimiter and len(wanted) > 1:
        raise UserError(
            f"{path} needs a --delimiter, such as ';', between texts and labels: the template has {{label}}"
        )
    for number, line in enumerate(_lines(path), start=1):
        line = line.rstrip("\r\n")
        text, found, label = line.rpartition(delimiter) if delimiter else (line, "", "")
        if delimiter and not found and line.strip():
            raise UserError(f"{path} line {number} has no {delimiter!r}: write text{delimiter}label")
        # An empty line stays, as a row without text, so that the rows a warning names are lines of the file.
        yield dict(zip(wanted, (text, label), strict=False))


def _table_rows(path: Path, wanted: dict[str, str], delimiter: str, names: tuple[str, ...]) -> Iterator[Row]:
    """Yield the rows of a .csv or .tsv file, whose columns have the given names or else those of its first row."""
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise UserError(f"--delimiter {delimiter!r} cannot separate the columns of {path}: give a single character")
    records = _records(path, delimiter)
    header = list(names) or next(records, (0, []))[1]
    for column, role in wanted.items():
        if header and column not in header:
            raise no_column(path, column, role, header)
        if header.count(column) > 1:
            raise UserError(f"{path}: two columns have the same name {column!r}: rename one")
    for line, values in records:
        if len(values) != len(header):
            raise UserError(
                f"{path} line {line} has {len(values)} fields instead of {len(header)} ({', '.join(header)}):"
                f" put a text that holds {delimiter!r} between double quotes"
                + (", or give a name for each column to --column_names" if names else "")
            )
        yield {column: values[header.index(column)] for column in wanted}


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a .csv or .tsv file but blank lines, each with the number of the line it begins on."""
    csv.field_size_limit(2**31 - 1)  # the default forbids texts above 128 KiB
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    line = 1
    try:
        for values in reader:
            if values:
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path} line {line}: {error} in the row that begins there; close its double quotes, and write one that"
            " belongs to a text twice"
        ) from None


def _json_rows(path: Path, wanted: dict[str, str]) -> Iterator[Row]:
    """Yield the rows of a .json or .jsonl file. A key that an object lacks is null, one that all lack is an error."""
    keys: dict[str, None] = {}
    for where, value in _json_values(path):
        if not isinstance(value, dict):
            raise UserError(f'{path} {where} is no object: write {{"{next(iter(wanted))}": "..."}}')
        keys |= dict.fromkeys(value)
        yield {
            column: _json_text(f"{path} {where}", column, role, value.get(column)) for column, role in wanted.items()
        }
    for column, role in wanted.items():
        if keys and column not in keys:
            raise no_column(path, column, role, list(keys))


def _json_text(where: str, column: str, role: str, value: Any) -> str | None:
    """Return a text, or the name of a label, which may also be a number."""
    if role == "label" and isinstance(value, int):
        value = json.dumps(value)
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{where}: {column!r} is {json.dumps(value)[:40]}, not text: put it between double quotes, or name another"
            f" column by --{role}_column"
        )
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:  # JSON can write half of a pair of surrogates
        half = ascii(error.object[error.start])
        raise UserError(f"{where}: {column!r} holds half a character ({half}): take it out") from None
    return value


def _json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the values of a file with one on each line, or the elements of an array, each with its place."""
    lines = _lines(path)
    for number, line in enumerate(lines, start=1):
        is_array = line.lstrip().startswith("[")
        if not line.strip():
            continue
        content = line + "".join(lines) if is_array else line
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            place = number + getattr(error, "lineno", 1) - 1
            raise UserError(
                f"{path} line {place}: {getattr(error, 'msg', error)}; write an object on each line, or one array"
            ) from None
        if is_array:
            yield from ((f"element {index}", element) for index, element in enumerate(value, start=1))
        else:
            yield f"line {number}", value
