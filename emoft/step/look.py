"""What the loop made of a step, once."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from emoft.data.batching import Batch
from emoft.data.steps import Step


@dataclass
class Look:
    """What the loop made of the step once."""

    loss: float  # of the loop
    grad_norm: float
    hidden: list[Tensor]  # of each micro-batch, (B, T, C)
    given: list[tuple[Tensor, Tensor, Tensor]]  # likewise targets, places and losses, (K,) each
    batches: list[Batch]
    contrast: float  # unweighted
    weight_gradient: float = math.nan  # of the chosen weight
    gradient_norms: dict[str, float] = field(default_factory=dict)
    loss_scale: float = 1.0
    from_input: float = 0.0  # norm of the part of the embedding's gradient that comes through the model's input
    from_head: float = 0.0  # and through its head
    scores: Tensor | None = None  # (B, T, 3 C), queries, keys and values of the first block in the first micro-batch
    largest_difference: float = 0.0  # of the gradients to those kept, as a share of the largest

    def precise_loss(self, step: Step, weight: float) -> float:
        """Return the loss of the step in float64: that of the loop, summed anew."""
        total = sum(float(losses.double().sum()) for losses in self.losses_of_texts())
        return total / step.tokens + weight * self.contrast

    def losses_of_texts(self) -> list[Tensor]:
        """Return the losses of each micro-batch without those of rivals; see `training.contrast`."""
        found = []
        for batch, (_, places, losses) in zip(self.batches, self.given, strict=True):
            owners = batch.owners().flatten().to(places.device)[places]
            found.append(torch.where(owners < batch.examples, losses, 0))
        return found
