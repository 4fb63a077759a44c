"""The learning rate over a run, as a factor of --learning_rate: a linear rise, then linear, cosine or no decay."""

import math

from emoft.errors import UserError


def count_warmup_steps(warmup_steps: float, total_steps: int) -> int:
    """Return the warmup in steps, of a count or a share below 1.

    Raises:
        UserError: the warmup is longer than the run.
    """
    steps = math.ceil(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)
    if steps > total_steps:
        raise UserError(
            f"--warmup_steps {steps} is longer than the run of {total_steps} steps: lower it, or give a share below 1"
        )
    return steps


def schedule_factor(kind: str, step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the factor after so many steps of the schedule.

    Args:
        kind: "linear", "cosine" or "constant", what follows the rise from 0.
        step: steps taken.
        warmup_steps: of the rise.
        total_steps: of the run, at whose end the decay has come to 0.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return max(0.0, 1.0 - progress)
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return 1.0
