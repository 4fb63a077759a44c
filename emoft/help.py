"""What --help prints: each flag under the title of its group, with its sentence and its default."""

import shlex
import shutil
import textwrap
from collections.abc import Sequence
from itertools import groupby

from emoft.flags import Command, Flag, shown_default

NARROWEST, WIDEST = 40, 100  # columns; longer lines are hard to read
NO_BREAK = "\xa0"  # a blank at which textwrap begins no new line


def help_text(command: Command, flags: Sequence[Flag]) -> str:
    """Return the help of a command for a terminal as wide as this one, or as the environment's COLUMNS says."""
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    positional = [f"[{flag.name.upper()}]" for flag in flags if flag.positional]
    lines = [
        *_wrapped(f"usage: {' '.join([command.launch, *positional])} [--FLAG VALUE ...]", width, 0),
        "",
        *_wrapped(command.about, width, 0),
    ]
    for group, members in groupby(flags, key=lambda flag: flag.group):
        lines += ["", group] if group else [""]
        for flag in members:
            lines += [*_wrapped(_invocation(flag), width, 2), *_wrapped(_sentence(flag), width, 6)]
    lines += ["", *_wrapped(f"-h or --help shows this. {_spelling(flags)}", width, 0), "", "Examples"]
    for example, purpose in command.examples.items():
        lines += [*_wrapped(example, width, 2), *_wrapped(purpose, width, 6)]
    return "\n".join(lines)


def _invocation(flag: Flag) -> str:
    """Return how a flag is given."""
    if flag.positional:
        return flag.name.upper()
    if flag.negation:
        return f"--{flag.name} | --no_{flag.name}"
    return f"--{flag.name} {flag.value_name}{' ...' if flag.is_list else ''}".rstrip()


def _sentence(flag: Flag) -> str:
    """Return what a flag does, and its default where there is something to say."""
    sentence = flag.help + (f"; --no_{flag.name}: {flag.negation}" if flag.negation else "")
    default = shown_default(flag)
    if not default:
        return sentence
    default = default if flag.is_list else shlex.quote(default)
    default = f"default: {default}".replace(" ", NO_BREAK)
    return f"{sentence[:-1]}; {default})" if sentence.endswith(")") else f"{sentence} ({default})"


def _spelling(flags: Sequence[Flag]) -> str:
    """Return how flags are written, in particular those that are on or off, shown by one of these."""
    booleans = [flag.name for flag in flags if flag.kind is bool]
    if not booleans or any(flag.positional for flag in flags):
        return "Flags are written with underscores or dashes."
    return (
        "Flags are written with underscores or dashes; those that are on or off take true or false too, as in"
        f" --{booleans[-1]} false."
    )


def _wrapped(text: str, width: int, indent: int) -> list[str]:
    """Return the lines of a text, all as far to the right; no flag is broken at a dash."""
    margin = " " * indent
    lines = textwrap.wrap(text, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
    return [line.replace(NO_BREAK, " ") for line in lines]
