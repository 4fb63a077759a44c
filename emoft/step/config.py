"""The flags of `python -m emoft.step`: train.py's, and how the step is shown."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from emoft.config import PRESETS, TrainConfig
from emoft.files import CONFIG_FILE
from emoft.flags import Command, Count, CountOrOff, File, option

DATA = ("train_file", "validation_file")


def default_config(given: Mapping[str, Any]) -> tuple[str, Collection[str]]:
    """Return which --config is meant where none is given, and which of its flags do not count.

    It is the run of a checkpoint, or the demo. With texts or with a model of one's own only that part of the demo is
    taken that fits to it.

    Args:
        given: the flags of the command line by name.
    """
    checkpoint = given.get("resume_from_checkpoint", "")
    run_dir = Path(given.get("output_dir", "")) if checkpoint == "latest" else Path(checkpoint).resolve().parent
    if checkpoint and (run_dir / CONFIG_FILE).is_file():
        return str(run_dir / CONFIG_FILE), ()
    left_out: set[str] = set()
    if given.get("train_file") or given.get("dataset_name"):
        left_out |= {*DATA, "template"}
    if given.get("model_name_or_path"):
        left_out |= {each.name for each in fields(TrainConfig) if each.name not in DATA}
    return "demo", left_out


@dataclass
class StepConfig(TrainConfig):
    """The flags of `python -m emoft.step`."""

    command: ClassVar[Command] = Command(
        "emoft.step",
        "Show one optimization step of train.py with its real numbers: texts, tokens, the label shift, loss, gradients,"
        " clipping, AdamW, and the loss afterwards. The loop of train.py itself computes them, so that a change of it"
        " is seen here. Nothing is saved. It takes train.py's flags; without any, it is a step of --config demo. Exit"
        " code 1: two numbers that must agree do not.",
        {
            "python -m emoft.step": "the demo's first step that moves a weight",
            "python -m emoft.step --train_file mine.txt --step 50 --output page.html": "your own texts, as a page",
            "python -m emoft.step --resume_from_checkpoint emoft-demo/checkpoint-500": "in the middle of a run",
        },
        presets=PRESETS,
        default_config=default_config,
        file_flag="train_file",
    )

    step: CountOrOff = option(
        0, "the step to show; those before it are trained first (0: the first that moves weights)", begins_group="Show"
    )
    examples: Count = option(2, "texts of the step that are shown token by token")
    language: Literal["en", "km"] = option("en", "the language of the sentences: English or Khmer")
    output: File = option("", "write a page of HTML there too, which needs nothing else")
    json: bool = option(False, "print every number of the page by its name, as one object of JSON")

    def of_training(self) -> dict[str, Any]:
        """Return the flags that are train.py's, by name."""
        return {each.name: getattr(self, each.name) for each in fields(TrainConfig)}
