"""What the user can mend: one line on standard error and exit code 2, never a traceback."""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend. Its text says what is wrong, where, and what to do."""


def warn(message: str) -> None:
    """Print one line of warning to standard error."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def run(main: Callable[[], int]) -> NoReturn:
    """Run a script's main function and leave the process with its exit code.

    Exit codes: what `main` returns; 2 after a `UserError`; 130 after Ctrl-C; 141 when the reader of our output went
    away (as in `generate.py ... | head`). Any other exception is a fault of ours and keeps its traceback (code 1).
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Texts are UTF-8 in any locale; what is none must not end a run that only wants to print it.
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        code = main()
        sys.stdout.flush()
    except UserError as error:
        line = f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}"
        print(line, file=sys.stderr)
        _tell_torchrun(line)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _tell_torchrun(line: str) -> None:
    """Give the line to torchrun too, whose own report of the failure, a page long, then ends with it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")
