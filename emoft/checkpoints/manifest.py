"""What is whole: a manifest of the sizes and checksums of a folder's files, and of itself."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from emoft.files import MANIFEST_FILE, TRAINING_STATE_FILE


def write_manifest(folder: Path, step: int) -> None:
    """Write the size and the SHA-256 of each file of a folder, and of that list itself."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": checksum(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_FILE
    }
    (folder / MANIFEST_FILE).write_text(_manifest_text({"step": step, "files": files}), encoding="utf-8")


def _manifest_text(content: dict[str, Any]) -> str:
    body = json.dumps(content, indent=2, sort_keys=True)
    return f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n"


def damage(checkpoint: Path) -> str:
    """Return what is wrong with a checkpoint, or nothing if all of its files are as they were written."""
    try:
        text = (checkpoint / MANIFEST_FILE).read_text(encoding="utf-8")
        content = json.loads(text.rpartition("}")[0] + "}")
        if text != _manifest_text(content):
            return f"{MANIFEST_FILE} was altered"
        # A copy of any other name is a copy.
        if re.fullmatch(r"checkpoint-\d+", checkpoint.name) and checkpoint.name != f"checkpoint-{content['step']}":
            return f"it is that of step {content['step']}"
        for name, expected in content["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size:,} bytes, not {expected['size']:,}"
            if checksum(path) != expected["sha256"]:
                return f"{name} was altered"
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} cannot be read: {error}"
    if TRAINING_STATE_FILE not in content["files"]:
        return f"{TRAINING_STATE_FILE} is missing"
    return ""


def has_all_files(checkpoint: Path) -> bool | None:
    """Say at once whether a checkpoint's files are there in their sizes; None of a folder without a manifest of ours.

    Unlike `damage` it reads none of them.
    """
    try:
        text = (checkpoint / MANIFEST_FILE).read_text(encoding="utf-8")
        content = json.loads(text.rpartition("}")[0] + "}")
        if text != _manifest_text(content):
            return None
        return all((checkpoint / name).stat().st_size == file["size"] for name, file in content["files"].items())
    except FileNotFoundError as error:
        return None if error.filename and str(error.filename).endswith(MANIFEST_FILE) else False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
