"""What the user can mend: one line on standard error and exit code 2, never a traceback; Ctrl-C: one line too."""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from emoft import streams

Value = TypeVar("Value")


class UserError(Exception):
    """Something the user can mend. Its text says what is wrong, where, and what to do."""


_open_bars: list[Callable[[], None]] = []  # what closes each, the innermost last


def bar_opened(close: Callable[[], None]) -> None:
    """Note that a bar may stand on the terminal until it is closed: what is printed must not be glued to it."""
    _open_bars.append(close)


def close_bars(outermost: Callable[[], None] | None = None) -> bool:
    """Close the bars that are open, the innermost first; return whether there were any.

    Args:
        outermost: as given to `bar_opened`; only this bar and those inside it are closed.
    """
    if outermost not in (None, *_open_bars):
        return False
    found = bool(_open_bars)
    while _open_bars:
        close = _open_bars.pop()
        close()
        if close == outermost:
            break
    return found


def program() -> str:
    """Return the name of what the user started: train.py, or emoft.evaluate for `python -m emoft.evaluate`."""
    path = Path(sys.argv[0])
    return f"{path.parent.parent.name}.{path.parent.name}" if path.name == "__main__.py" else path.name


def warn(message: str) -> None:
    """Print one line of warning to standard error, above the bars."""
    if _open_bars:
        from tqdm import tqdm  # here, so that a message needs no import of it: whoever opened a bar has it already

        tqdm.write(f"warning: {message}", file=sys.stderr)
    else:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Say whether an error means that memory could not be had, the device's or the host's.

    Of the devices' there is a class, but the CPU's is any RuntimeError to torch, and only its words tell.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "out of memory")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in words)


def memory_asked_for(error: BaseException) -> str:
    """Return how much was asked for in vain, as " (2 GiB more were asked for)"; nothing if it does not say."""
    found = re.search(r"tried to allocate ([\d.]+) ?([KMGT]iB|bytes)", str(error), flags=re.IGNORECASE)
    if not found:
        return ""
    number, unit = float(found[1]), found[2]
    if unit == "bytes":
        number, unit = round(number / 2**30, 2), "GiB"
    return f" ({number:g} {unit} more were asked for)"


def run(main: Callable[[], int]) -> NoReturn:
    """Run a script's main function and leave the process with its exit code: what `main` returns; see `guarded`."""
    sys.exit(guarded(main))


def guarded(function: Callable[[], Value]) -> Value:
    """Return what a function returns, or leave the process if it fails in a way that is no fault of ours.

    Exit codes: 2 after a `UserError`, when memory could not be had, or when our output could not be written; 130 after
    Ctrl-C; 141 when the reader of our output went away (as in `generate.py ... | head`). Any other exception is a fault
    of ours and keeps its traceback (code 1).
    Whatever happens, the bars are closed first, so that the line that tells of it begins at the beginning of a line.
    """
    streams.prepare()
    name, bars_open = program(), False
    try:
        try:
            value = function()
        finally:
            bars_open = close_bars()
        sys.stdout.flush()
        return value
    except UserError as error:
        line = f"{name}: error: {' '.join(str(error).split())}"
        print(line, file=sys.stderr)
        _tell_torchrun(line)
        code = 2
    except KeyboardInterrupt:
        # The terminal has written ^C where the cursor stood: at the end of a bar, of which the line is empty now, or
        # behind something that must stay.
        fresh_line = "" if not sys.stderr.isatty() else "\r\x1b[K" if bars_open else "\n"
        if os.environ.get("LOCAL_RANK", "0") == "0":  # under torchrun all ranks of a host hear of it, and one tells
            print(f"{fresh_line}{name}: stopped by Ctrl-C before it was done", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 141
    except streams.OutputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        line = (
            f"{name}: error: out of memory{memory_asked_for(error)}: compute less at once by a smaller batch (--help"
            " names its flag), or take shorter texts or a smaller model"
        )
        print(line, file=sys.stderr)
        _tell_torchrun(line)
        code = 2
    if code in (2, 141):
        streams.forget_output()
    sys.exit(code)


def _tell_torchrun(line: str) -> None:
    """Give the line to torchrun too, whose own report of the failure, a page long, then ends with it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
