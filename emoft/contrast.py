"""The label contrast (GeDi, Krause et al., 2020): a text must be likelier under its own label than under others.

A language model that is trained to predict words hardly needs the label: most words are the same for all of them. The
contrast asks for the label in every text, and makes of the model a classifier too.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Tokenizer

from emoft.batching import Batch
from emoft.errors import UserError
from emoft.template import TextFormat


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
        prefixes: list[list[int]] = tokenizer(prompts, verbose=False)["input_ids"]
        self.prefixes = sorted(prefixes, key=len, reverse=True)  # one may begin like another: the longest fits first
        self.count = min(count, len(prefixes) - 1)
        self.longest_text, self.seed = text_format.max_length, seed

    def rivals(self, rows: list[dict[str, Any]], epoch: int) -> list[dict[str, Any]]:
        """Return the first rival of each row, then the second of each, and so on.

        Their labels are a function of seed, epoch and text: the same on any rank and after a resume.

        Raises:
            UserError: a text does not begin with what stands before the texts of a label.
        """
        rivals = [self._rivals(row["input_ids"], epoch) for row in rows]
        return [{"input_ids": ids} for turn in zip(*rivals, strict=True) for ids in turn]

    def _rivals(self, ids: list[int], epoch: int) -> list[list[int]]:
        own = next((n for n, prefix in enumerate(self.prefixes) if ids[: len(prefix)] == prefix), None)
        if own is None:
            raise UserError(
                "--label_contrast: in this template a token holds both the label and the text: put a blank or a colon"
                " between {label} and {text}"
            )
        random = np.random.default_rng((self.seed, epoch, *ids))
        others = [prefix for n, prefix in enumerate(self.prefixes) if n != own]
        drawn = random.choice(len(others), self.count, replace=False)
        return [(others[n] + ids[len(self.prefixes[own]) :])[: self.longest_text] for n in drawn]


def label_contrast(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over the targets of all texts, and the contrast summed over the texts; in nats.

    The contrast is the cross-entropy of the choice of the label y from itself and the wrong ones y' by the likelihoods
    of the text x: -log(p(x|y) / (p(x|y) + sum of all p(x|y'))).

    Args:
        losses: (K,), of `cross_entropy`.
        batch: holds the rivals of its texts after them, as `WrongLabels.rivals` orders them; or none, and then there is
            no contrast.
    """
    if not batch.rivals:
        return losses.sum(), losses.new_zeros(())
    owners = batch.owners().to(losses.device).flatten()[batch.predicting]  # (K,)
    owners = owners.clamp(min=0)  # of what only fills up, whose losses are 0
    nats = losses.new_zeros(len(batch.lengths)).index_add(0, owners, losses).view(-1, batch.examples)
    return nats[0].sum(), F.cross_entropy(-nats.T, nats.new_zeros(batch.examples, dtype=torch.long), reduction="sum")
