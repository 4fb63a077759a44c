"""The files of a run by name, and how a file is written: whole, or not at all."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emoft.errors import UserError

# In output_dir.
CONFIG_FILE = "train_config.yaml"  # every flag of the run
FORMAT_FILE = "emoft.json"  # how its texts are made: see `data.template`
TRAINER_STATE_FILE = "trainer_state.json"  # its log, in the format of `transformers.TrainerState`
RESULTS_FILE = "all_results.json"
EVENTS_FOLDER = "runs"  # TensorBoard's
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"  # of the model
# Of the tokenizer, for other programs; emoft itself reads tokenizer.json.
VOCABULARY_FILES = ("vocab.json", "merges.txt")

# In a checkpoint-STEP folder besides.
TRAINING_STATE_FILE = "training_state.pt"  # what makes a folder a checkpoint, and not only a model
MANIFEST_FILE = "manifest.json"

# Of `python -m emoft.evaluate --output_dir`.
EVALUATION_FILE, SAMPLES_FILE, CONFUSION_FILE = "evaluation.json", "samples.jsonl", "confusion.png"
SUSPECTS_FILE = "suspects.csv"


def fault_file(step: int) -> str:
    """Return the name of the file that tells of a step that was not finite."""
    return f"nonfinite-{step}.json"


def spike_file(step: int) -> str:
    """Return the name of the file that tells of a step whose loss stood out."""
    return f"spike-{step}.json"


def make_folder(path: Path) -> Path:
    """Return an output folder, made if it is not there.

    Raises:
        UserError: it cannot be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {path} cannot be written ({error.strerror}): name another") from None
    return path


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all. Numbers that JSON has no word for (NaN, infinite) become null."""
    write_text(path, json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text beside the target and rename it, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let a function write a file beside the target and rename it; if it fails, nothing is left of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(content: Any) -> Any:
    """Return content with None for numbers that JSON has no word for."""
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
