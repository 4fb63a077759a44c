"""A folder of data files as splits: a file belongs to that which its own name says, or the name of its folder."""

import re
from pathlib import Path

from emoft.data.sources import FORMATS
from emoft.errors import UserError

# The words by which `datasets` tells splits too.
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def files_of_splits(folder: Path, config_name: str) -> dict[str, list[Path]]:
    """Return the data files of each split, in the order of their names. Files that name no split are for training.

    Args:
        folder: is there; what stands in hidden files and folders is not looked at.
        config_name: of a folder in it that holds one of several configurations; "" if there is one.

    Raises:
        UserError: there is no such configuration, or no data file.
    """
    if config_name and not (folder / config_name).is_dir():
        raise UserError(f"--dataset_config_name {config_name} is no folder in {folder}: leave it out, or name one")
    root = folder / config_name if config_name else folder
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        is_hidden = any(part.startswith(".") for part in inside.parts)
        if path.is_file() and path.suffix.lower() in FORMATS and not is_hidden:
            found.setdefault(_split_of(inside), []).append(path)
    if not found:
        raise UserError(f"--dataset_name {folder} holds no data: put files such as train.csv into it")
    return found


def _split_of(path: Path) -> str:
    for name in (path.stem, *reversed(path.parts[:-1])):
        words = set(re.split(r"[^a-z]+", name.lower()))
        for split, called in SPLITS.items():
            if words & called:
                return split
    return "train"
