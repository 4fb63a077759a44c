"""What can be told of a data file or a folder before anything slow is imported."""

import os
from pathlib import Path

from emoft.errors import UserError

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")


def check_file(flag: str, name: str) -> Path:
    """Return the path of a data file.

    Args:
        flag: that names the file, for the message.
        name: as the user wrote it.

    Raises:
        UserError: it is no file that could be read.
    """
    path = Path(name)
    if path.is_dir():
        raise UserError(f"{flag} {name} is a folder: name a file in it, or give the folder as --dataset_name")
    if not path.exists():
        raise UserError(f"{flag} {name}: no such file, check the path")
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{flag} {name}: its ending tells no format, use one of {' '.join(FORMATS)}")
    if path.stat().st_size == 0:
        raise UserError(f"{flag} {name} is empty: it needs at least one example")
    return path


def is_folder(name: str, what: str, flag: str) -> bool:
    """Tell a folder from a Hub id.

    Args:
        name: as the user wrote it.
        what: it should hold, for the message.
        flag: that names it, likewise, without dashes.

    Raises:
        UserError: the name is a path to nowhere.
    """
    if os.path.isdir(name):
        return True
    if os.path.exists(name):
        raise UserError(f"--{flag} {name} is a file: name the folder that holds the {what}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise UserError(f"--{flag} {name}: no such folder; check the path, or name a {what} on the Hub")
    return False
