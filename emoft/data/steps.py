"""The train split as optimization steps: which examples each of them has, in which micro-batches."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from emoft.config import TrainConfig
from emoft.data.batching import Batch, Lengths, build_loader, epoch_batches, target_tokens, token_lengths
from emoft.distributed.parallel import Agreement
from emoft.distributed.world import World


@dataclass(eq=False)
class Step:
    """An optimization step as data: what it computes on, and what repeats it."""

    number: int  # of the optimizer step, from 1
    examples: list[int]  # of all ranks, as indices into the train split
    lengths: Lengths  # tokens of each of them
    micro_batches: list[Batch]  # of this rank
    learning_rate: float = 0.0  # that the update is made with
    loss_scale: float = 1.0  # likewise; above 1 in fp16 only
    random_state: list[Tensor] = field(default_factory=list)  # in which it began
    # What the loss was given and what it returned, of each micro-batch: targets, places and losses, (K,) each; see
    # `training.loss.given_targets`.
    targets: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    agreement: Agreement | None = None  # of several ranks, on whether it fits in memory, if that is not known

    @property
    def tokens(self) -> int:
        """How many tokens are predicted, on all ranks; at least 1, so that it can be divided by."""
        return max(1, target_tokens(self.lengths))

    def aligned_share(self) -> float:
        """Return the share of the targets that are the token after the place that predicts them; see `Batch`.

        NaN if nobody knows what the loss was given.
        """
        pairs = zip(self.micro_batches, self.targets, strict=False)
        return min((batch.aligned_share(targets, places) for batch, (targets, places, _) in pairs), default=math.nan)


class StepLoader:
    """Makes the steps of a run. Their order is a function of seed and epoch, so that a resumed run finds its place.

    A step has the same examples on any number of ranks: they share them, and cut their shares into micro-batches.
    """

    def __init__(
        self,
        rows: Dataset,
        examples_per_step: int,
        config: TrainConfig,
        world: World,
        pad_id: int,
        device: torch.device,
        with_rivals: Callable[..., list[dict[str, Any]]] | None = None,
    ) -> None:
        """Remember what the steps are made of.

        Args:
            rows: the tokenized train split.
            examples_per_step: of all ranks and micro-batches.
            config: size of a micro-batch at first, batching, seed, and how long the run is.
            world: all ranks.
            pad_id: of the token that fills up.
            device: decides to which multiple.
            with_rivals: gives for some rows and an epoch these and others that follow them; see `training.contrast`.
        """
        self.rows = rows.select_columns("input_ids")
        self.config, self.world, self.pad_id, self.device = config, world, pad_id, device
        self.examples_per_step, self.with_rivals = examples_per_step, with_rivals
        self.micro_batch_size = config.per_device_train_batch_size  # most examples in each
        self.lengths = token_lengths(rows)
        self.steps_per_epoch = math.ceil(len(rows) / examples_per_step)
        by_epochs = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        self.total_steps = config.max_steps if config.max_steps > 0 else by_epochs

    def after(self, steps_taken: int) -> Iterator[Step]:
        """Yield the steps of an epoch that come after so many steps of the run."""
        epoch, done = divmod(steps_taken, self.steps_per_epoch)
        steps = epoch_batches(len(self.rows), self.examples_per_step, self.config.seed, epoch)[done:]
        shares = [self.world.share(examples, self.micro_batch_size) for examples in steps]
        with_rivals = self.with_rivals

        def rivals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return with_rivals(rows, epoch) if with_rivals else rows

        parts = list(chain(*shares))
        micro_batches = iter(build_loader(self.rows, parts, self.pad_id, self.device, self.config.batching, rivals))
        for number, (examples, share) in enumerate(zip(steps, shares, strict=True), start=steps_taken + 1):
            # All micro-batches of a step are fetched before it begins. What they have to predict is counted by the
            # lengths of the examples, which all ranks know, so that nobody has to ask the others, or a GPU.
            yield Step(number, examples, self.lengths[examples], list(islice(micro_batches, len(share))))

    def largest_step(self, steps_taken: int) -> int:
        """Return the number of the step with the largest micro-batch, of those of an epoch after so many of the run."""
        epoch, done = divmod(steps_taken, self.steps_per_epoch)
        steps = epoch_batches(len(self.rows), self.examples_per_step, self.config.seed, epoch)[done:]
        steps = steps[: max(1, self.total_steps - steps_taken)]
        return steps_taken + 1 + int(np.argmax([self.largest_micro_batch(examples) for examples in steps]))

    def largest_micro_batch(self, examples: list[int]) -> int:
        """Return how many tokens, with padding, are in the largest micro-batch of a step on any rank.

        It is a function of what all ranks know. Rivals of texts are left out: each text has as many.

        Args:
            examples: of the step.
        """
        sizes = []
        for rank in range(self.world.size):
            for part in replace(self.world, rank=rank).share(examples, self.micro_batch_size):
                lengths = self.lengths[part]
                padded = len(part) * int(lengths.max(initial=0))
                sizes.append(padded if self.config.batching == "padded" else int(lengths.sum()))
        return max(sizes)
