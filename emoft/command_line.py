"""From the words of a command line, and the YAML file below it, to a configuration; each mistake in one line."""

import argparse
import os
import shlex
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import Field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar

import yaml

from emoft.errors import UserError
from emoft.flags import Command, Flag, flags_of, read_path, read_value, shown_default
from emoft.help import help_text
from emoft.suggestions import one_of, suggest, unknown_flag

DATA_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")
YAML_ENDINGS = (".yaml", ".yml")


class HasFlags(Protocol):
    """A dataclass of flags that says which command they belong to."""

    command: ClassVar[Command]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Config = TypeVar("Config", bound=HasFlags)


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Read a configuration from the command line and, below it, from the preset or YAML file of --config.

    Args:
        config_class: the dataclass to fill.
        argv: the words after the script's name; `sys.argv` by default.

    Raises:
        UserError: an unknown flag, or a value that is of the wrong type or out of range.
        SystemExit: --help was asked for and printed.
    """
    command, flags = config_class.command, flags_of(config_class)
    with_config = [_config_flag(command.presets), *flags] if command.presets else flags
    # Python hides bytes that its locale cannot read in surrogates, which no tokenizer takes.
    words = [os.fsencode(word).decode("utf-8", errors="replace") for word in (sys.argv[1:] if argv is None else argv)]
    if {"-h", "--help"} & set(words):
        print(help_text(command, with_config), flush=True)
        raise SystemExit(0)
    given = _read_words(command, with_config, words)
    below: dict[str, Any] = {}
    name = given.pop("config", "")
    left_out: Collection[str] = ()
    if not name and command.default_config:
        name, left_out = command.default_config(given)
    if command.presets and name:
        path = _yaml_path(name, command.presets)
        try:
            read = _read_yaml(path, command, flags)
            below = {flag: value for flag, value in read.items() if flag not in left_out}
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return config_class(**{**below, **given})


def preset_names(presets: Path) -> list[str]:
    """Return the names that --config accepts besides files."""
    return sorted(path.stem for path in presets.glob("*.yaml"))


def _config_flag(presets: Path) -> Flag:
    names = ", ".join(preset_names(presets))
    help = f"a preset ({names}) or a YAML file with lines of the form flag: value; flags given beside it win over it"
    return Flag("config", "", help, value_name="NAME_OR_FILE")


class _Give(argparse.Action):
    """Stores the value of a flag, and refuses a flag without one."""

    def __init__(self, *words: Any, flag: Flag, **keywords: Any) -> None:
        super().__init__(*words, **keywords)
        self.flag = flag

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if values is None or values == []:
            name = self.flag.name
            value = shown_default(self.flag) or self.flag.value_name
            value = value if self.flag.is_list else shlex.quote(value)
            # A negative number is one of argparse's values only if it is written without an exponent.
            may_begin_with_dash = self.flag.kind in (str, float) and not self.flag.choices
            dash = f"; one that begins with a dash is written --{name}=-..." if may_begin_with_dash else ""
            raise UserError(f"{option_string} needs a value, such as --{name} {value}{dash}")
        before = getattr(namespace, self.dest, []) if self.flag.repeats else []
        setattr(namespace, self.dest, [*before, *values] if self.flag.is_list else values)


class _Parser(argparse.ArgumentParser):
    """Ends with one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the message; argparse's own would print a page and exit."""
        raise UserError(f"{message}, see --help")


def _read_words(command: Command, flags: Sequence[Flag], words: Sequence[str]) -> dict[str, Any]:
    """Return the values that a command line gives, by the names of their flags.

    Raises:
        UserError: a word is not understood.
    """
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    positional = [flag for flag in flags if flag.positional]
    for flag in flags:
        read = partial(_read_word, flag)
        if flag.kind is bool:
            # A word after it would be its value; where positional ones come after flags, it takes none.
            if positional:
                parser.add_argument(*_spellings(flag.name), action="store_true")
            else:
                parser.add_argument(*_spellings(flag.name), nargs="?", const=True, type=read)
        elif not flag.positional:
            number = "*" if flag.is_list else "?"
            parser.add_argument(*_spellings(flag.name), nargs=number, type=read, action=_Give, flag=flag)
        if flag.negation:
            refuse = partial(_refuse_value, flag)
            parser.add_argument(*_spellings(f"no_{flag.name}"), dest=flag.name, nargs="?", const=False, type=refuse)
    values, unread = parser.parse_known_args(words)
    given, rest = vars(values), [word for word in unread if word != "--"]
    for flag in positional:
        if strays := [word for word in rest if not _is_flag(word)]:
            given[flag.name] = _read_word(flag, strays[0])
            rest.remove(strays[0])
    if rest:
        unknown = _is_flag(rest[0])
        raise UserError(_unknown(rest[0], command, flags) if unknown else _stray(rest, command, flags, words))
    return given


def _read_word(flag: Flag, text: str) -> Any:
    return read_value(flag, read_path(flag, text))


def _spellings(name: str) -> Iterable[str]:
    return dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))


def _refuse_value(flag: Flag, text: str) -> NoReturn:
    raise UserError(f"--no_{flag.name} takes no value: leave {shlex.quote(text)} away, or give --{flag.name} true")


def _is_flag(word: str) -> bool:
    """Whether a word can be meant as a flag: not a number, a text with blanks, or the - that means standard input."""
    return word.startswith("-") and not word.lstrip("-")[:1].isdigit() and " " not in word and word.strip("-") != ""


def _unknown(word: str, command: Command, flags: Sequence[Flag]) -> str:
    """Return what to say of an unknown flag."""
    names = [flag.name for flag in flags if not flag.positional]
    booleans = [flag.name for flag in flags if flag.kind is bool]
    preferred = [name for name in (command.file_flag, command.text_flag) if name]
    unnamed = next((flag.name.upper() for flag in flags if flag.positional), "")
    otherwise = f"{unnamed} stands without one, see --help" if unnamed else "see --help"
    return unknown_flag(word.partition("=")[0], command.name, names, booleans, preferred, otherwise)


def _stray(rest: Sequence[str], command: Command, flags: Sequence[Flag], words: Sequence[str]) -> str:
    """Return what to say of words that belong to no flag: the flag that they were probably meant for."""
    names = {flag.name: flag for flag in flags}
    strays = [word for word in rest if not _is_flag(word)]
    word, together = strays[0], " ".join(strays)
    quoted, path = shlex.quote(word), Path(word)
    flag_before, value_before = ["", "", *words[: words.index(word)]][-2:]
    cut = names.get(flag_before.lstrip("-").replace("-", "_"))
    meant = ""
    if word.partition("=")[0] in names and "=" in word:
        meant = f"--{word}"
    elif "config" in names and (path.suffix in YAML_ENDINGS or word in preset_names(command.presets or path)):
        meant = f"--config {quoted}"
    elif cut and cut.kind is str and not cut.choices and not cut.is_list and not _is_flag(value_before):
        meant = f"--{cut.name} {shlex.quote(f'{value_before} {together}')}"
    elif command.file_flag and (path.suffix.lower() in DATA_ENDINGS or path.is_file()):
        meant = f"--{command.file_flag} {quoted}"
    elif "model_name_or_path" in names and (path / "config.json").is_file():
        meant = f"--model_name_or_path {quoted}"
    elif command.text_flag:
        meant = f"--{command.text_flag} {shlex.quote(together)}"
    taken = " and ".join(flag.name.upper() for flag in flags if flag.positional)
    taken = f"{taken} only" if taken else "flags only"
    return f"{command.name} takes {taken}, not {quoted}: " + (f"did you mean {meant}?" if meant else "see --help")


def _yaml_path(name: str, presets: Path) -> Path:
    """Return the file of a preset, or the file of this name.

    Raises:
        UserError: there is neither.
    """
    names = preset_names(presets)
    if name in names:
        return presets / f"{name}.yaml"
    if Path(name).is_file():
        return Path(name)
    raise UserError(
        f"--config {name}: no such preset or file, choose {one_of([*names, 'a file'])}{suggest(name, names)}"
    )


def _read_yaml(path: Path, command: Command, flags: Sequence[Flag]) -> dict[str, Any]:
    """Return the values of a YAML file by the names of their flags, read from its text as a command line's are.

    Raises:
        UserError: it cannot be read, or holds what is no flag or no value of one.
    """
    try:
        # Values as they are written: YAML's own types would make a false of `mixed_precision: no`.
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # safe: it makes text only
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"not a readable YAML file: {error}") from None
    if settings and not isinstance(settings, dict):
        raise UserError("must hold lines of the form flag: value")
    by_name = {flag.name: flag for flag in flags}
    given = {}
    for key, value in (settings or {}).items():
        if key == "config":
            raise UserError("--config cannot stand in a file: name one file on the command line")
        flag = by_name.get(str(key).replace("-", "_"))
        if flag is None:
            raise UserError(_unknown(f"--{key}", command, flags))
        texts = value if isinstance(value, list) else [value]
        if value in ("null", "~", []):
            continue
        if not all(isinstance(text, str) for text in texts) or (len(texts) > 1 and not flag.is_list):
            raise UserError(f"--{flag.name} takes {'words' if flag.is_list else 'one value'}: put a text in quotes")
        # A preset belongs to nobody's folder: what it names besides its own files lies where it is used.
        folder = None if path.parent == command.presets and flag.value_name != "FILE" else path.parent
        values = [read_value(flag, read_path(flag, text, folder)) for text in texts]
        given[flag.name] = values if flag.is_list else values[0]
    return given
