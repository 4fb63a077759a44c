"""A data file as rows: each format is parsed here, so that nothing is guessed, and only the columns in use are read."""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from emoft.data.labels import label_name
from emoft.data.lines import read_lines
from emoft.errors import UserError, warn

csv.field_size_limit(2**31 - 1)  # a text may be longer than the module's 131,072 characters; it is cut to max_length
JSON_ROW = 'write {"text": ...} for each example, one a line or all in one list'
NULL_TEXTS = pa.types.is_null
DELIMITERS = {".csv": ",", ".tsv": "\t"}
LOOKED_AT = 200  # lines of a text file that tell whether labels stand behind the texts
Row = dict[str, str | None]


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read, and how its rows are cut."""

    text: str
    label: str  # its column; "" if no label is wanted
    delimiter: str = ""
    names: tuple[str, ...] = ()  # of a file without a header line

    @property
    def wanted(self) -> list[str]:
        """The columns that have to be there."""
        return [self.text, self.label] if self.label else [self.text]


def read_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a file, each with "text" and, if it is wanted, "label"; None where there is none.

    Raises:
        UserError: the file cannot be read, or a row cannot be used; it names the line.
    """
    readers = {".txt": _text_rows, ".json": _json_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}
    yield from readers.get(path.suffix.lower(), _table_rows)(path, columns)


def class_names(path: Path, columns: Columns) -> list[str]:
    """Return the names that a file declares for its labels, as parquet files of `datasets` do; none otherwise."""
    if path.suffix.lower() != ".parquet" or not columns.label:
        return []
    with open(path, "rb") as file:
        feature = _declared(pq.ParquetFile(file).schema_arrow).get(columns.label)
    return list(feature.names) if isinstance(feature, ClassLabel) else []


def _row(columns: Columns, text: Any, label: Any, place: str, names: list[str] | None = None) -> Row:
    """Return a row of values as they stood in the file.

    Raises:
        UserError: one of them is not what its column should hold.
    """
    if text is not None and not isinstance(text, str):
        kind = {"bool": "a truth value", "list": "a list", "dict": "an object"}.get(type(text).__name__, "a number")
        raise UserError(
            f"{place}: {columns.text!r} is {json.dumps(text)[:40]}, {kind}, not text: write it between double quotes,"
            " or name another column by --text_column"
        )
    row: Row = {"text": text}
    if columns.label:
        try:
            row["label"] = label_name(label, names or ())
        except ValueError as error:
            raise UserError(f"{place}: {error}; name another column by --label_column, or mend the row") from None
    for name, value in row.items():
        if half := re.search("[\ud800-\udfff]", value or ""):
            raise UserError(
                f"{place}: the {name} holds \\u{ord(half[0]):04x}, half of a character (a lone surrogate), which no"
                " text can hold: remove it, or write the whole character"
            )
    return row


def _missing(path: Path, columns: Columns, found: list[str]) -> UserError:
    wanted = {columns.text: "text"} | ({columns.label: "label"} if columns.label else {})
    column, role = next((column, role) for column, role in wanted.items() if column not in found)
    more = ", or give a --template without {label}" if role == "label" else ""
    names = ", ".join(map(repr, found))
    return UserError(f"{path} has no column {column!r}, only {names}: name one by --{role}_column{more}")


# ---- Text files -----------------------------------------------------------------------------------------------------


def _text_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Each line is a text, or a text and a label after the last delimiter. An empty one is a row without a text."""
    if columns.label and not columns.delimiter:
        found = guess_delimiter(path)
        cure = (
            f"its lines look like text{found}label: add --delimiter {found!r}"
            if found
            else ("write text;label lines and add --delimiter ';'")
        )
        raise UserError(
            f"{path} has texts only, and the template needs a label: {cure}, or use a --template without {{label}}"
        )
    for number, line in enumerate(read_lines(path), start=1):
        line = line.rstrip("\r\n")
        text, delimiter, label = line.rpartition(columns.delimiter) if columns.delimiter else (line, "", None)
        if columns.delimiter and not delimiter:
            if line.strip():
                raise UserError(
                    f"{path} line {number} has no {columns.delimiter!r}: write text{columns.delimiter}label"
                )
            text, label = "", ""
        if number == 1 and columns.delimiter and (text.strip(), str(label).strip()) == ("text", "label"):
            warn(f"{path} line 1 holds the names of columns, {line!r}, and is left out")
            continue
        yield _row(columns, text, label, f"{path} line {number}")


def guess_delimiter(path: Path) -> str:
    """Return what seems to stand between text and label in the lines of a text file; "" if they seem to be texts alone.

    It is believed of a character that stands in nearly every line, behind which a few short words come back.
    """
    lines = []
    for line in read_lines(path):
        if line.strip():
            lines.append(line.rstrip("\r\n"))
        if len(lines) == LOOKED_AT:
            break
    for delimiter in ";\t|,":
        behind = [line.rpartition(delimiter)[2].strip() for line in lines if delimiter in line]
        is_short = [0 < len(label) <= 30 and len(label.split()) <= 2 for label in behind]
        is_common = len(behind) >= 0.9 * len(lines) and len(lines) >= 2
        if is_common and all(is_short) and len(set(behind)) <= max(2, len(lines) // 2):
            return delimiter
    return ""


# ---- Tables ---------------------------------------------------------------------------------------------------------


def _table_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """All values of a .csv or .tsv file as they stand: a message "NA" or "1984" is a message."""
    delimiter = _delimiter_of_table(path, columns)
    reader = csv.reader(read_lines(path), delimiter=delimiter, strict=True)
    names, examples, repeated = list(columns.names), 0, []
    try:
        if not names:
            names = [name.strip() for name in next((values for values in reader if values), [])]
        if len(set(names)) < len(names):
            raise UserError(f"{path}: two columns have the same name among {', '.join(names)}: rename one")
        if not set(columns.wanted) <= set(names):
            raise _missing(path, columns, names)
        text, label = (names.index(column) if column else None for column in (columns.text, columns.label))
        for values in reader:
            if not values:
                continue
            if len(values) != len(names):
                raise UserError(
                    f"{path} line {reader.line_num} has {len(values)} fields instead of {len(names)}"
                    f" ({', '.join(names)}): put a text that holds {delimiter!r} between double quotes"
                )
            if [value.strip() for value in values] == names:
                repeated.append(reader.line_num)
                continue
            examples += 1
            place = f"{path} line {reader.line_num}"
            yield _row(columns, values[text or 0], None if label is None else values[label], place)
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}, mend the line") from None
    if repeated:
        warn(f"{path}: line {repeated[0]} holds the names of columns once more, and is left out ({len(repeated)} such)")
    if not examples:
        raise UserError(f"{path} holds no example, only the names of columns: it needs at least one")


def _delimiter_of_table(path: Path, columns: Columns) -> str:
    """Return --delimiter, or what is usual for the format; that too if only then the header line names the columns.

    A --delimiter that is meant for one file is given for all of them, and for those of a folder.
    """
    usual = DELIMITERS[path.suffix.lower()]
    asked = columns.delimiter or usual
    if len(asked) != 1:
        raise UserError(f"--delimiter {asked!r} must be a single character for {path}")
    if columns.names or asked == usual:
        return asked
    header = next((line for line in read_lines(path) if line.strip()), "")
    by_usual = [name.strip() for name in next(csv.reader([header], delimiter=usual), [])]
    return usual if asked not in header and set(columns.wanted) <= set(by_usual) else asked


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _json_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """JSON objects, one a line or all in one list. Other columns than those in use may hold anything."""
    seen: set[str] = set()
    count = 0
    for line, example in _json_objects(path):
        count += 1
        place = f"{path} line {line}"
        if not isinstance(example, dict):
            raise UserError(f"{place} is no JSON object: {JSON_ROW}")
        seen |= example.keys()
        yield _row(columns, example.get(columns.text), example.get(columns.label), place)
    if count and not set(columns.wanted) <= seen:
        raise _missing(path, columns, sorted(seen))


def _json_objects(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield each value with the line on which it begins."""
    lines = ((number, line) for number, line in enumerate(read_lines(path), start=1) if line.strip())
    number, line = next(lines, (1, ""))
    try:
        if not line.lstrip().startswith("["):
            while line:
                yield number, json.loads(line)
                number, line = next(lines, (number, ""))
            return
        first = number
        text = "".join([line, *(more for _, more in _with_blank_lines(path, first))])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number}: {getattr(error, 'msg', error)}; {JSON_ROW}") from None
    yield from _list_of_json(path, text, first)


def _with_blank_lines(path: Path, after: int) -> Iterator[tuple[int, str]]:
    """Yield the lines after a line, blank ones too, since lines are counted in the text that is put together."""
    return ((number, line) for number, line in enumerate(read_lines(path), start=1) if number > after)


def _list_of_json(path: Path, text: str, line: int) -> Iterator[tuple[int, Any]]:
    """Yield each value of a list with its line; the list begins on the given one."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    counted = 0

    def line_at(place: int) -> int:
        nonlocal line, counted
        line += len(re.findall(r"\r\n|\r|\n", text[counted:place]))
        counted = place
        return line

    def skip(place: int) -> int:
        match = blank.match(text, place)
        return match.end() if match else place

    place = skip(text.index("[") + 1)
    goes_on = text[place : place + 1] != "]"
    try:
        while goes_on:
            value, end = decoder.raw_decode(text, place)
            yield line_at(place), value
            place = skip(end)
            goes_on = text[place : place + 1] == ","
            if goes_on:
                place = skip(place + 1)
            elif text[place : place + 1] != "]":
                raise UserError(f"{path} line {line_at(place)}: expected ',' or ']' after an example; {JSON_ROW}")
        if text[place + 1 :].strip():
            raise UserError(f"{path} line {line_at(place)}: more stands behind the list; {JSON_ROW}")
    except (ValueError, RecursionError) as error:
        at = getattr(error, "pos", place)
        raise UserError(f"{path} line {line_at(at)}: {getattr(error, 'msg', error)}; {JSON_ROW}") from None


# ---- Parquet --------------------------------------------------------------------------------------------------------


def _declared(schema: pa.Schema) -> dict[str, Any]:
    """Return the features that `datasets` wrote beside a schema; none if another program made the file."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    try:
        return dict(Features.from_arrow_schema(schema))
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def _parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The columns in use, whatever the others hold."""
    try:
        with open(path, "rb") as file:  # opened here: the library takes some names for patterns or addresses
            table = pq.ParquetFile(file)
            if not set(columns.wanted) <= set(table.schema_arrow.names):
                raise _missing(path, columns, table.schema_arrow.names)
            names = class_names(path, columns)
            number = 0
            for batch in table.iter_batches(batch_size=1000, columns=columns.wanted):
                texts = batch.column(columns.text)
                kind = texts.type.value_type if pa.types.is_dictionary(texts.type) else texts.type
                if not any(
                    is_kind(kind)
                    for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, NULL_TEXTS)
                ):
                    raise UserError(
                        f"{path}: column {columns.text!r} holds {kind}, not text: name another by --text_column"
                    )
                labels = batch.column(columns.label).to_pylist() if columns.label else [None] * len(batch)
                for text, label in zip(texts.to_pylist(), labels, strict=True):
                    number += 1
                    yield _row(columns, text, label, f"{path} row {number}", names)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}): write the file again") from None
