"""What a run counts at each step, without waiting for the device; and how it takes steps back."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import GPT2Config

from emoft.data.batching import target_tokens
from emoft.data.steps import Step
from emoft.device import sums_type
from emoft.tracking.run_state import RunState
from emoft.tracking.throughput import training_operations


@dataclass(frozen=True)
class Moment:
    """What a run had counted before a step."""

    run: RunState
    sums: Tensor  # on the device


class Counts:
    """Adds up steps in a run's state. Loss, targets and clipped steps are summed on the device until they are read."""

    def __init__(self, run: RunState, shape: GPT2Config, max_grad_norm: float, device: torch.device) -> None:
        """Go on from what a run has counted.

        Args:
            run: its state.
            shape: of the model, by which its operations are counted.
            max_grad_norm: above which a gradient is clipped; 0 clips none.
            device: that computes the losses.
        """
        self.run, self.shape, self.max_grad_norm = run, shape, max_grad_norm or math.inf
        # Reading a number from a GPU waits for all that it still has to do.
        sums = [run.loss_sum, run.loss_tokens, run.clipped_steps]
        self._sums = torch.tensor(sums, dtype=sums_type(device), device=device)

    def add(self, step: Step, loss: Tensor, grad_norm: Tensor, skipped: bool) -> None:
        """Add an optimizer step; see `Tracker.count_step`."""
        run = self.run
        run.step += 1
        run.skipped_steps += skipped
        run.samples += len(step.examples)
        tokens = target_tokens(step.lengths)
        run.tokens += tokens
        run.operations += training_operations(self.shape, step.lengths)
        is_clipped = grad_norm > self.max_grad_norm
        row = torch.stack([loss * tokens, torch.full_like(loss, tokens), is_clipped]).to(self._sums.dtype)
        self._sums += torch.where(loss.isfinite() & grad_norm.isfinite(), row, 0)

    def read(self) -> None:
        """Bring the sums into the run's state. Reads from the device: a CPU-GPU sync point."""
        self.run.loss_sum, loss_tokens, clipped_steps = self._sums.tolist()
        self.run.loss_tokens, self.run.clipped_steps = int(loss_tokens), int(clipped_steps)

    def remember(self) -> Moment:
        """Return what brings the counts back to where they stand now, by `return_to`. Reads nothing from the device."""
        run = self.run
        # These grow in place.
        depth = {
            "depth_steps": list(run.depth_steps),
            "depth_norms": list(run.depth_norms),
            "depth_others": {kind: list(values) for kind, values in run.depth_others.items()},
        }
        now = replace(run, recent_losses=list(run.recent_losses), **depth)  # type: ignore[arg-type]  # of two kinds
        return Moment(now, self._sums.clone())

    def return_to(self, moment: Moment) -> None:
        """Forget the steps that were counted since a moment; the seconds that they took stay spent."""
        seconds = self.run.train_seconds
        for name, value in vars(moment.run).items():
            setattr(self.run, name, value)
        self.run.train_seconds = seconds
        self._sums.copy_(moment.sums)
