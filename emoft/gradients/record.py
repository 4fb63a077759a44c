"""What a run has left for a diagnosis: its curves, its flags, and the reports of its bad steps."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from emoft.errors import UserError
from emoft.files import CONFIG_FILE
from emoft.gradients.curves import Curve, read_curves


class CannotCheckError(Exception):
    """What a check would need and a run does not have, in a few words: "8 log entries, 10 needed"."""


@dataclass(frozen=True)
class Record:
    """A run, as far as it has come."""

    curves: dict[str, Curve]  # by tag
    flags: dict[str, Any] = field(default_factory=dict)  # of train.py; none if the run's folder does not tell them
    faults: list[dict[str, Any]] = field(default_factory=list)  # nonfinite-STEP.json, in the order of the steps

    spikes: list[dict[str, Any]] = field(default_factory=list)  # spike-STEP.json, likewise

    @property
    def data(self) -> dict[str, float]:
        """A checksum of the tokens of each split, as far as the run tells."""
        found = {split: self.curves.get(f"data/{split}_checksum", {}) for split in ("train", "validation")}
        return {split: curve[min(curve)] for split, curve in found.items() if curve}

    @property
    def blocks(self) -> list[str]:
        """The blocks whose gradients were measured: "h00" and so on."""
        return sorted({match[1] for tag in self.curves if (match := re.fullmatch(r"gradient_norm/(h\d+)", tag))})

    def points(self, tag: str, least: int = 1, unit: str = "log entries", how: str = "") -> list[tuple[int, float]]:
        """Return step and value of each finite point of a curve, in the order of the steps.

        Args:
            tag: of the curve.
            least: how many are needed.
            unit: what one of them is.
            how: to get them.

        Raises:
            CannotCheckError: there are fewer.
        """
        found = [(step, value) for step, value in sorted(self.curves.get(tag, {}).items()) if math.isfinite(value)]
        if len(found) < least:
            raise CannotCheckError(f"{len(found)} {unit}, {least} needed" + (f": {how}" if how else ""))
        return found

    def values(self, tag: str, least: int = 1, unit: str = "log entries", how: str = "") -> list[float]:
        """Return the values of `points`."""
        return [value for _, value in self.points(tag, least, unit, how)]

    def measured_blocks(self, least: int = 1) -> list[str]:
        """Return the blocks.

        Raises:
            CannotCheckError: gradients were measured at fewer steps, or never.
        """
        blocks = self.blocks
        measured = min((len(self.curves[f"gradient_norm/{name}"]) for name in blocks), default=0)
        if measured < least:
            raise CannotCheckError(f"gradients measured at {measured} steps, {least} needed: --log_gradients_every 100")
        return blocks


def read_record(run_dir: Path) -> Record:
    """Read a run, finished or not.

    Raises:
        UserError: the folder holds no run that can be read.
    """
    curves = read_curves(run_dir)
    flags = _read(run_dir / CONFIG_FILE, yaml.safe_load)
    return Record(curves, flags, _reports(run_dir, "nonfinite-*.json"), _reports(run_dir, "spike-*.json"))


def _reports(run_dir: Path, pattern: str) -> list[dict[str, Any]]:
    found = [_read(path, json.loads) for path in run_dir.glob(pattern)]
    return sorted((each for each in found if isinstance(each.get("step"), int)), key=lambda each: each["step"])


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return what a file of the run holds; nothing if there is none, or it cannot be understood."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
