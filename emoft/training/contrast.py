"""The label contrast (GeDi, Krause et al., 2020): a text must be likelier under its own label than under others.

A language model that is trained to predict words hardly needs the label: most words are the same for all of them. The
contrast asks for the label in every text, and makes of the model a classifier too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import GPT2Tokenizer

from emoft.config import TrainConfig
from emoft.data.batching import Batch
from emoft.data.steps import Step
from emoft.data.template import TextFormat
from emoft.data.tokens import make_tokens
from emoft.distributed.world import World
from emoft.errors import UserError


class WrongLabels:
    """Writes each text of a batch again under labels drawn from the others: its rivals."""

    def __init__(self, tokenizer: GPT2Tokenizer, text_format: TextFormat, count: int, seed: int) -> None:
        """Prepare what stands before the texts of each label.

        Args:
            tokenizer: of the model.
            text_format: of the data, with its labels.
            count: of rivals of each text; all other labels, if there are fewer.
            seed: of the draw.

        Raises:
            UserError: the template names no label before its text, or there are no two of them.
        """
        if len(text_format.labels) < 2:
            raise UserError(
                "--label_contrast tells labels apart: it needs a template with {label} before {text}, such as"
                " '{label}: {text}', and data with at least two labels"
            )
        prompts = [text_format.prompt(label) for label in text_format.labels]
        prefixes = [ids for ids, _ in make_tokens(tokenizer, prompts)]
        self.prefixes = sorted(prefixes, key=len, reverse=True)  # one may begin like another: the longest fits first
        self.count = min(count, len(prefixes) - 1)
        self.max_length, self.seed = text_format.max_length, seed

    def check(self, rows: Dataset) -> None:
        """See that each text of a tokenized split begins with what stands before the texts of a label.

        Raises:
            UserError: one does not.
        """
        for batch in rows.select_columns("input_ids").iter(batch_size=1000):
            for ids in batch["input_ids"]:
                self._own(ids)

    def with_rivals(self, rows: list[dict[str, Any]], epoch: int) -> list[dict[str, Any]]:
        """Return the rows, then the first rival of each, then the second of each, and so on.

        Each has "contrasted" beside its "input_ids": from which token to which it is compared with its rivals. That is
        the text alone, cut to what of it fits under all of these labels. The rivals' labels are a function of seed,
        epoch and text: the same on any rank and after a resume.
        """
        turns = zip(*[self._with_rivals(row["input_ids"], epoch) for row in rows], strict=True)
        return [row for turn in turns for row in turn]

    def _with_rivals(self, ids: list[int], epoch: int) -> list[dict[str, Any]]:
        own = self._own(ids)
        text = ids[len(own) :]
        random = np.random.default_rng((self.seed, epoch, *ids))
        others = [prefix for prefix in self.prefixes if prefix is not own]
        drawn = [others[n] for n in random.choice(len(others), self.count, replace=False)]
        common = text[: max(0, self.max_length - max(map(len, [own, *drawn])))]
        rows = [ids, *(prefix + common for prefix in drawn)]
        return [
            {"input_ids": row, "contrasted": (len(prefix), len(prefix) + len(common))}
            for row, prefix in zip(rows, [own, *drawn], strict=True)
        ]

    def _own(self, ids: list[int]) -> list[int]:
        own = next((prefix for prefix in self.prefixes if ids[: len(prefix)] == prefix), None)
        if own is None:
            raise UserError(
                "--label_contrast: with this template, a token holds both the end of a label and the beginning of a"
                " text: put a colon and a blank between them, as in '{label}: {text}'"
            )
        return own


class LabelContrast:
    """The part of the loss that asks for the label; nothing at all with a weight of 0."""

    def __init__(self, config: TrainConfig, tokenizer: GPT2Tokenizer, text_format: TextFormat, rows: Dataset) -> None:
        """Prepare it, if the flags ask for it.

        Args:
            config: the weight, the number of wrong labels, and the seed of their draw.
            tokenizer: of the model.
            text_format: of the data, with its labels.
            rows: the tokenized train split.

        Raises:
            UserError: the texts do not allow it.
        """
        self.weight = config.label_contrast
        self.with_rivals: Callable[..., list[dict[str, Any]]] | None = None
        if self.weight:
            wrong_labels = WrongLabels(tokenizer, text_format, config.contrast_labels, config.seed)
            wrong_labels.check(rows)
            self.with_rivals = wrong_labels.with_rivals
        self._step: Step | None = None
        self._sum = torch.zeros(())  # of the contrast over this rank's part of the step

    def __call__(self, losses: Tensor, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """Return the losses of the texts alone, and what the contrast adds to the loss of the step.

        Args:
            losses: (K,), of `cross_entropy`.
            batch: holds texts and, if the contrast is on, their rivals.
            step: of which the batch is a part.
        """
        if self.with_rivals is None:
            return losses, losses.new_zeros(())
        of_texts, contrast = label_contrast(losses, batch)
        contrast = contrast / len(step.examples)
        self._sum = contrast.detach() + (self._sum if step is self._step else 0)
        self._step = step
        return of_texts, self.weight * contrast

    def of_last_step(self, world: World) -> dict[str, float]:
        """Return the contrast of the latest step, in nats, under its name in the log; nothing if it is off.

        A collective, and a CPU-GPU sync point.
        """
        return {"label_contrast": world.sum(self._sum).item()} if self.with_rivals else {}


def label_contrast(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the losses of the texts, those of their rivals being 0, and the contrast summed over the texts; in nats.

    The contrast is the cross-entropy of the choice of the label y from itself and the wrong ones y' by the likelihoods
    of the text x: -log(p(x|y) / (p(x|y) + sum of all p(x|y'))).

    Args:
        losses: (K,), of `cross_entropy`.
        batch: holds texts and their rivals, of `WrongLabels.with_rivals`; a rank may have none.
    """
    if batch.contrasted is None:
        return losses, losses.new_zeros(())
    owners = batch.target_owners  # (K,); the losses of what only fills up are 0
    of_texts = torch.where(owners < batch.examples, losses, 0)
    nats = losses.new_zeros(len(batch.lengths)).index_add(0, owners, torch.where(batch.contrasted, losses, 0))
    nats = nats.view(-1, batch.examples)  # (1 + rivals of each, E)
    return of_texts, F.cross_entropy(-nats.T, nats.new_zeros(batch.examples, dtype=torch.long), reduction="sum")
