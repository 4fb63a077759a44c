"""From the figures of a run to plain words: what is wrong, what follows from what, and what could not be checked."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emoft.config import GradientsConfig
from emoft.gradients import data_checks, loss_checks, model_checks, rate_checks, step_checks
from emoft.gradients.causes import by_cause
from emoft.gradients.finding import Finding
from emoft.gradients.record import CannotCheckError, Record, read_record

# What is asked, and who answers.
CHECKS: dict[str, Callable[[Record], list[Finding]]] = {
    "every step was finite": step_checks.check_finite,
    "each target is the next token": data_checks.check_labels,
    "train's texts are different from each other": data_checks.check_repetition,
    "train's texts are not cut": data_checks.check_cut,
    "train has several emotions": data_checks.check_emotions,
    "labels fit their texts": data_checks.check_label_information,
    "the validation texts are not train's": data_checks.check_overlap,
    "the weights start neither too large nor too small": model_checks.check_start,
    "the model starts no worse than knowing nothing": model_checks.check_first_loss,
    "no layer starts unlike the others": model_checks.check_layers,
    "gradients reach the first block as they do the last": model_checks.check_depth,
    "every block learns": model_checks.check_frozen,
    "the units of every MLP are alive": model_checks.check_saturation,
    "attention looks at more than single tokens": model_checks.check_attention,
    "no single number holds a whole activation": model_checks.check_kurtosis,
    "the learning rate is what the flags say": rate_checks.check_schedule,
    "updates change as slowly as the schedule": rate_checks.check_update_jumps,
    "the first steps are not too large": rate_checks.check_warmup,
    "the learning rate is not too high": rate_checks.check_rate_too_high,
    "the learning rate is not too low": rate_checks.check_rate_too_low,
    "something of the pretrained model is left": step_checks.check_distance,
    "the texts of a step do not all say the same": step_checks.check_batch,
    "weight decay leaves the weights": step_checks.check_decay,
    "clipping is the exception": step_checks.check_clipping,
    "fp16 drops few steps": step_checks.check_skipped,
    "the loss falls below that of word frequencies": loss_checks.check_fall,
    "the loss has no spikes": loss_checks.check_spikes,
    "dropout leaves most of what is computed": model_checks.check_dropout,
    "the evaluation loss does not rise": loss_checks.check_overfitting,
    "emotions are told apart": data_checks.check_recognition,
}


@dataclass(frozen=True)
class Diagnosis:
    """The outcome of all checks."""

    findings: list[Finding]  # causes first
    because: dict[str, str]  # by the name of a consequence, that of its cause
    fine: list[str]  # checks that found nothing
    unchecked: dict[str, str]  # checks that could not be made, and why

    @property
    def verdict(self) -> str:
        """All of it in one line."""
        found = len(CHECKS) - len(self.fine) - len(self.unchecked)
        said = f"{found} found something, " if found else "nothing is wrong as far as could be checked: "
        if not found and not self.unchecked:
            return f"nothing is wrong: all {len(CHECKS)} checks found nothing"
        left = f", {len(self.unchecked)} could not be made" if self.unchecked else ""
        return f"{said if not found else f'of {len(CHECKS)} checks {said}'}{len(self.fine)} found nothing{left}"


def diagnose(record: Record) -> Diagnosis:
    """Make all checks of a run."""
    findings: list[Finding] = []
    fine: list[str] = []
    unchecked: dict[str, str] = {}
    for question, check in CHECKS.items():
        try:
            found = check(record)
        except CannotCheckError as reason:
            unchecked[question] = str(reason)
            continue
        if found:
            findings += found
        else:
            fine.append(question)
    return Diagnosis(*by_cause(findings), fine, unchecked)


def describe_depth(record: Record) -> str:
    """Return the gradient norm of each block in one line."""
    if not record.blocks:
        return "gradients by depth: not measured; train with --log_gradients_every 100 to see them"
    return f"gradient norm by depth: {', '.join(f'{name} {norm:.3g}' for name, norm in _depth(record).items())}"


def _depth(record: Record) -> dict[str, float]:
    return {name: statistics.median(record.curves[f"gradient_norm/{name}"].values()) for name in record.blocks}


def report(config: GradientsConfig) -> None:
    """Read a run and print its diagnosis.

    Raises:
        UserError: the folder holds no run.
    """
    record = read_record(Path(config.run_dir))
    diagnosis = diagnose(record)
    steps = sorted(record.curves.get("train/loss", {}))
    if config.json:
        print(json.dumps(as_json(record, diagnosis), indent=2))
        return
    measured = len(record.curves[f"gradient_norm/{record.blocks[0]}"]) if record.blocks else 0
    print(f"{config.run_dir}: {len(steps)} log entries, gradients measured at {measured} steps")
    print(describe_depth(record))
    if line := step_checks.describe_batch(record):
        print(line)
    for finding in diagnosis.findings:
        cause = diagnosis.because.get(finding.name)
        print(f"- {f'[follows from {cause}] ' if cause else ''}{finding.text}\n  open: {finding.tag}")
    for question, reason in diagnosis.unchecked.items():
        print(f"could not check whether {question}: {reason}")
    print(diagnosis.verdict)


def as_json(record: Record, diagnosis: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis as an object of JSON."""
    return {
        "steps": max(record.curves.get("train/loss", {}), default=0),
        "depth": _depth(record),
        "verdict": diagnosis.verdict,
        "findings": [
            {**asdict(finding), "because_of": diagnosis.because.get(finding.name)} for finding in diagnosis.findings
        ],
        "fine": diagnosis.fine,
        "could_not_check": diagnosis.unchecked,
    }
