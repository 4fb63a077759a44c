"""What a run knows about itself besides weights, optimizer and random states; stored in each checkpoint."""

import math
from dataclasses import dataclass, field
from typing import Any

# What a log entry tells of the steps since the entry before.
SUMS = ("train_seconds", "samples", "tokens", "operations", "loss_sum", "loss_tokens", "clipped_steps")


@dataclass
class RunState:
    """What a run knows about itself besides weights, optimizer and random states; stored in each checkpoint."""

    step: int = 0  # optimizer steps taken
    skipped_steps: int = 0  # of them, those whose update fp16's loss scaling dropped
    nonfinite_steps: int = 0  # of them, those whose loss or gradient was infinite or NaN
    nonfinite_in_row: int = 0  # of these, the latest ones without another step between
    last_nonfinite_step: int = 0
    spikes: int = 0  # steps whose loss stood out
    spikes_in_row: int = 0  # of these, the latest ones without another step between
    micro_batch_size: int = 0  # that fits in memory, found when a larger one did not; 0: the flag's
    most_fitted: int = 0  # tokens of a micro-batch of several ranks that did; see `training.memory`
    threads: list[list[int]] = field(default_factory=list)  # [step, number] from which on so many computed on the CPU
    recent_losses: list[float] = field(default_factory=list)  # that did not: see `training.spikes`
    clipped_steps: int = 0
    train_seconds: float = 0.0  # without evaluating, saving and sampling
    samples: int = 0
    tokens: int = 0  # that were targets
    operations: float = 0.0  # floating-point operations that the model's mathematics needed
    loss_sum: float = 0.0  # over the targets of all steps that were applied, in nats
    loss_tokens: int = 0  # how many those are
    logged: dict[str, float] = field(default_factory=dict)  # SUMS and the step at the last log entry
    best_loss: float = math.inf  # lowest evaluation loss
    best_step: int = 0
    evaluations_since_best: int = 0
    other_validation_until: int = -1  # evaluations up to this step are of other validation data than those now
    evaluation_due: bool = False  # a signal came before it was finished
    # As the run began: the norms of the layers of each kind by block, and some weights of each block.
    layers_at_start: dict[str, dict[int, float]] = field(default_factory=dict)
    weights_at_start: dict[str, list[float]] = field(default_factory=dict)
    depth_steps: list[int] = field(default_factory=list)  # the steps whose gradients were measured
    depth_norms: list[list[float]] = field(default_factory=list)  # and the norm of each block at them
    depth_others: dict[str, list[list[float]]] = field(default_factory=dict)  # other figures of each block at them
    log_history: list[dict[str, Any]] = field(default_factory=list)

    def since_log(self, name: str) -> float:
        """Return how much a sum has grown since the last log entry."""
        return float(getattr(self, name)) - self.logged.get(name, 0)
