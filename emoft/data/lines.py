"""The lines of a text file, in UTF-8, or a message that says what is in the file instead."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

from emoft.errors import UserError
from emoft.terminal import Bar

MARK = "\ufeff"  # the byte order mark, which some programs put before a text
AFTER_CARRIAGE_RETURN = re.compile(r"(?<=\r)(?!\n|$)")
# Longer marks first: that of UTF-16 is the beginning of that of UTF-32.
ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
SAVE = "save the file in the encoding UTF-8"
LOOKED_AT = 4096  # bytes at the beginning of a file, by which its encoding is guessed


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file with their ends: a line feed, a carriage return, or both.

    A byte order mark before a line is dropped; it stands inside a file where two were put together.

    Raises:
        UserError: the file is not text in UTF-8; it names the line, and the encoding where that can be told.
    """
    refuse_other_encodings(path)
    number = 1
    with (
        open(path, "rb") as file,
        Bar(f"Reading {path.name}", "B", path.stat().st_size) as bar,
    ):
        for line in file:
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = number + line[: error.start].count(b"\r")
                raise UserError(
                    f"{path} line {place}: byte {error.start + 1} ({line[error.start]:#04x}) is not UTF-8, {SAVE}"
                ) from None
            if "\0" in text:
                place = number + text[: text.index("\0")].count("\r")
                raise UserError(f"{path} line {place} holds a NUL, which no text has: it is not a text file, or {SAVE}")
            for part in AFTER_CARRIAGE_RETURN.split(text):
                yield part.removeprefix(MARK)
                number += 1
            bar.advance(len(line))


def refuse_other_encodings(path: Path) -> None:
    """See that a file does not begin like text in UTF-16 or UTF-32, with a byte order mark or without one.

    Raises:
        UserError: it does.
    """
    with open(path, "rb") as file:
        beginning = file.read(LOOKED_AT)
    encoding = next((name for mark, name in ENCODINGS.items() if beginning.startswith(mark)), "")
    if not encoding and len(beginning) > 3:
        # Latin letters leave every second byte 0 in UTF-16, and three of four in UTF-32.
        zeros = [beginning[start::4].count(0) / len(beginning[start::4]) for start in range(4)]
        if sum(share > 0.8 for share in zeros) == 3:
            encoding = "UTF-32"
        elif min(zeros[0], zeros[2]) > 0.8 or min(zeros[1], zeros[3]) > 0.8:
            encoding = "UTF-16"
    if encoding:
        raise UserError(f"{path} is in the encoding {encoding}: {SAVE}")
