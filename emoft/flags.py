"""What a flag is: a field of a dataclass with its sentence, and how a word of the command line becomes its value."""

import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from emoft.errors import UserError
from emoft.suggestions import one_of, suggest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

BOOLEANS = {
    **dict.fromkeys(("true", "yes", "t", "y", "1", "on"), True),
    **dict.fromkeys(("false", "no", "f", "n", "0", "off"), False),
}

# Whether a resumed run may change a flag. "fixed": no, it alters what is computed. "free": yes. "data": the texts must
# stay, however the flags name them: their tokens are compared by checksum. "step_size": the number of examples in a
# step must stay, which these flags and the number of processes make together.
OnResume = Literal["fixed", "free", "data", "step_size"]


@dataclass(frozen=True)
class Check:
    """What a value must satisfy, and how to say so."""

    holds: Callable[[Any], bool]
    text: str


@dataclass(frozen=True)
class ValueName:
    """What stands for a value in the help."""

    text: str


Count = Annotated[int, Check(lambda value: value >= 1, "must be at least 1")]
CountOrOff = Annotated[int, Check(lambda value: value >= 0, "must be 0 (off) or more")]
Positive = Annotated[float, Check(lambda value: 0 < value < float("inf"), "must be a number above 0")]
NotNegative = Annotated[float, Check(lambda value: 0 <= value < float("inf"), "must be a number of 0 or more")]
Share = Annotated[float, Check(lambda value: 0 <= value < 1, "must be at least 0 and below 1")]
Probability = Annotated[float, Check(lambda value: 0 < value <= 1, "must be above 0 and at most 1")]
Seed = Annotated[int, Check(lambda value: 0 <= value < 2**32, "must be at least 0 and below 2**32")]
Length = Annotated[int, Check(lambda value: value >= 2, "must be at least 2, a token and the next one")]
Name = Annotated[str, ValueName("NAME")]
# Paths: ~ is the home folder, and in a YAML file they are relative to it; see `read_path`.
File = Annotated[str, ValueName("FILE")]
Folder = Annotated[str, ValueName("FOLDER")]
NameOrFolder = Annotated[str, ValueName("NAME_OR_FOLDER")]
PATHS = ("FILE", "FOLDER", "NAME_OR_FOLDER")


def option(
    default: Any,
    help: str,
    *,
    begins_group: str = "",
    on_resume: OnResume = "fixed",
    negation: str = "",
    repeats: bool = False,
    positional: bool = False,
) -> Any:
    """Return a dataclass field that is a flag.

    Args:
        default: its value where it is not given.
        help: the sentence that --help shows.
        begins_group: the title of the section of --help that begins here.
        on_resume: whether a resumed run may change it.
        negation: of a boolean that can be on by default: what --no_FLAG does.
        repeats: of a list: given again, it adds to the values before instead of replacing them.
        positional: it is given without its name, and must be given.
    """
    metadata = {
        "help": help,
        "begins_group": begins_group,
        "on_resume": on_resume,
        "negation": negation,
        "repeats": repeats,
        "positional": positional,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Command:
    """What a script or command says of itself; the dataclass of its flags holds it as `command`."""

    name: str  # train.py, or a module that `python -m` runs
    about: str  # a paragraph
    examples: dict[str, str]  # command lines, and what each is for
    presets: Path | None = None  # the folder of the YAML files that --config takes by name; None: there is no --config
    # Where no --config is given: which one is meant, by the flags that are given, and which of its flags do not count.
    default_config: Callable[[Mapping[str, Any]], tuple[str, Collection[str]]] | None = None
    file_flag: str = ""  # the flag that a file without one was probably meant for
    text_flag: str = ""  # the flag that any other word without one was probably meant for

    @property
    def launch(self) -> str:
        """What starts it."""
        return f"python {self.name}" if self.name.endswith(".py") else f"python -m {self.name}"


@dataclass(frozen=True)
class Flag:
    """A flag, as its field declares it."""

    name: str
    default: Any
    help: str
    kind: type = str  # of one value: str, int, float or bool
    choices: tuple[str, ...] = ()  # empty: any value
    checks: tuple[Check, ...] = ()
    value_name: str = "TEXT"
    is_list: bool = False
    repeats: bool = False
    negation: str = ""
    positional: bool = False
    on_resume: OnResume = "fixed"
    group: str = ""


def flags_of(config_class: "type[DataclassInstance]") -> list[Flag]:
    """Return the flags that the fields of a dataclass declare, in their order."""
    hints = get_type_hints(config_class, include_extras=True)
    flags = []
    group = ""
    for each in fields(config_class):
        metadata = dict(each.metadata)
        group = metadata.pop("begins_group") or group
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        flags.append(Flag(each.name, default, group=group, **metadata, **_described(hints[each.name])))
    return flags


def _described(hint: Any) -> dict[str, Any]:
    """Return what a type says of the values of a flag."""
    is_list = get_origin(hint) is list
    kind, notes = (get_args(hint)[0] if is_list else hint), []
    if get_origin(kind) is Annotated:
        kind, *notes = get_args(kind)
    if isinstance(kind, UnionType):  # with None, which means: not given
        kind = next(each for each in get_args(kind) if each is not type(None))
    choices: tuple[str, ...] = ()
    if get_origin(kind) is Literal:
        kind, choices = str, get_args(kind)
    names = [note.text for note in notes if isinstance(note, ValueName)]
    usual = " | ".join(choices) or {int: "INTEGER", float: "NUMBER", bool: ""}.get(kind, "TEXT")
    return {
        "kind": kind,
        "choices": choices,
        "checks": tuple(note for note in notes if isinstance(note, Check)),
        "value_name": names[0] if names else usual,
        "is_list": is_list,
    }


def read_value(flag: Flag, text: str) -> Any:
    """Return the value that a word stands for.

    Raises:
        UserError: it is of the wrong type, out of range, or none of the choices.
    """
    given = f"--{flag.name} {shlex.quote(text)}"
    value: Any = text
    if flag.choices and text not in flag.choices:
        raise UserError(f"{given}: choose {one_of(flag.choices)}{suggest(text, flag.choices)}")
    if flag.kind is bool:
        value = BOOLEANS.get(text.lower())
        if value is None:
            raise UserError(f"{given} is neither true nor false: give one of them, or --{flag.name} alone for true")
    elif flag.kind is int:
        try:
            value = int(text)
        except ValueError:
            raise UserError(f"{given} is no whole number{_whole(text)}") from None
    elif flag.kind is float:
        try:
            value = float(text)
        except ValueError:
            raise UserError(f"{given} is no number") from None
    for check in flag.checks:
        if not check.holds(value):
            raise UserError(f"{given} {check.text}")
    return value


def read_path(flag: Flag, text: str, folder: Path | None = None) -> str:
    """Return the path that a word stands for; the word itself if the flag takes none, or if it is a name.

    Args:
        flag: that it was given for.
        text: the word.
        folder: of the YAML file in which it stands; None for the command line.
    """
    if flag.value_name not in PATHS or not text:
        return text
    text = os.path.expanduser(text)
    if folder is None or (flag.value_name == "NAME_OR_FOLDER" and not (text[0] == "." or (folder / text).is_dir())):
        return text
    return str(folder / text)


def _whole(text: str) -> str:
    """Return how to write a number such as 1e4 or 3.0 where a whole one is asked for."""
    try:
        return f", write {int(float(text))}" if float(text).is_integer() else ""
    except ValueError:
        return ""


def shown_default(flag: Flag) -> str:
    """Return the default of a flag as one would type it; nothing if it is empty."""
    if isinstance(flag.default, bool):
        return "on" if flag.default else "off"
    if isinstance(flag.default, list):
        return " ".join(map(str, flag.default))
    if isinstance(flag.default, float):
        return f"{flag.default:g}"
    return "" if flag.default is None else str(flag.default)


def flags_on_resume(config_class: "type[DataclassInstance]", *kinds: OnResume) -> Sequence[str]:
    """Return the names of the flags that a resumed run treats in one of these ways, in their order."""
    return tuple(flag.name for flag in flags_of(config_class) if flag.on_resume in kinds)
