"""Standard input, output and error: open, in UTF-8 whatever the locale, and never the reason that a training ends."""

import contextlib
import io
import os
import sys
from typing import Any

OPEN_FLAGS = (os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)  # stands in for a closed stream: neither gives or takes anything


class OutputError(OSError):
    """Standard output could not be written: its disk is full, its terminal is gone, or it was closed."""

    def __str__(self) -> str:
        return f"standard output cannot be written ({self.strerror}): send it to a file on a disk with room"


class _Raw(io.FileIO):
    """One of the streams, below Python's buffers: bytes that cannot be written do not stay there to fail again."""

    is_optional = False

    def write(self, data: Any) -> int:
        """Write bytes; return how many of them need not be given again.

        Raises:
            BrokenPipeError: nobody reads them any more, and they are asked for.
            OutputError: they cannot be written for another reason, and are asked for.
        """
        try:
            return super().write(data)
        except OSError as error:
            if self.is_optional:
                return len(data)
            if isinstance(error, BrokenPipeError):
                raise
            raise OutputError(error.errno, error.strerror) from None


def prepare(output_is_optional: bool = False) -> None:
    """Make the three streams ready for a script; what is not one of them, as in a test, is left as it is.

    Messages to standard error are always optional: what a script does is worth more than what it says of it. Lines are
    written when they are complete, so that in a log file to which both streams go they stand in their order.

    Args:
        output_is_optional: so is standard output. Otherwise it is what the script is run for: results.
    """
    for number, flags in enumerate(OPEN_FLAGS):
        try:
            os.fstat(number)
        except OSError:  # it was closed; left so, the next file that is opened would take its place and its output
            with contextlib.suppress(OSError):
                os.open(os.devnull, flags)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    sys.stdout = _writable(sys.stdout, 1, output_is_optional)
    sys.stderr = _writable(sys.stderr, 2, True)


def forget_output() -> None:
    """Let what standard output still holds be lost: Python writes it once more at exit, which would fail again."""
    prepare(output_is_optional=True)


def _writable(stream: Any, number: int, is_optional: bool) -> Any:
    if stream is not None:
        if not isinstance(stream, io.TextIOWrapper) or _descriptor(stream) != number:
            return stream
        raw = getattr(stream.buffer, "raw", None)
        if isinstance(raw, _Raw):
            raw.is_optional |= is_optional
            return stream
        with contextlib.suppress(OSError):
            stream.flush()
    raw = _Raw(number, "w", closefd=False)
    raw.is_optional = is_optional
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="replace", line_buffering=True)


def _descriptor(stream: io.TextIOWrapper) -> int:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return -1
