"""The label contrast (GeDi, Krause et al., 2020): a text must be likelier under its own label than under another.

A language model that is trained to predict words hardly needs the label: most words are the same for all of them. The
contrast asks for the label in every text, and makes of the model a classifier too.
"""

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Tokenizer

from emoft.batching import Batch
from emoft.errors import UserError
from emoft.template import TextFormat


class WrongLabels:
    """Writes each text of a batch once more, under a label drawn from the others: its rival."""

    def __init__(self, tokenizer: GPT2Tokenizer, text_format: TextFormat, seed: int) -> None:
        """Prepare what stands before the texts of each label.

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
        self.longest_text, self.seed = text_format.max_length, seed

    def rivals(self, rows: list[dict[str, Any]], epoch: int) -> list[dict[str, Any]]:
        """Return the rows' rivals. Their labels are a function of seed, epoch and text: the same on any rank.

        Raises:
            UserError: a text does not begin with what stands before the texts of a label.
        """
        return [{"input_ids": self._rival(row["input_ids"], epoch)} for row in rows]

    def _rival(self, ids: list[int], epoch: int) -> list[int]:
        own = next((n for n, prefix in enumerate(self.prefixes) if ids[: len(prefix)] == prefix), None)
        if own is None:
            raise UserError(
                "--label_contrast: in this template a token holds both the label and the text: put a blank or a colon"
                " between {label} and {text}"
            )
        random = np.random.default_rng((self.seed, epoch, *ids))
        other = (own + int(random.integers(1, len(self.prefixes)))) % len(self.prefixes)
        return (self.prefixes[other] + ids[len(self.prefixes[own]) :])[: self.longest_text]


def label_contrast(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over the targets of all texts, and the contrast summed over the texts; in nats.

    The contrast is the cross-entropy of the choice between the two labels y and y' by the likelihoods of the text x:
    -log(p(x|y) / (p(x|y) + p(x|y'))) = softplus(log p(x|y') - log p(x|y)).

    Args:
        losses: (K,), of `cross_entropy`.
        batch: holds a rival for each text, the rivals after all texts; or none, and then there is no contrast.
    """
    if not batch.rivals:
        return losses.sum(), losses.new_zeros(())
    owners = batch.owners().to(losses.device).flatten()[batch.predicting]  # (K,)
    owners = owners.clamp(min=0)  # of what only fills up, whose losses are 0
    true, wrong = losses.new_zeros(len(batch.lengths)).index_add(0, owners, losses).split(batch.examples)
    return true.sum(), F.softplus(true - wrong).sum()
