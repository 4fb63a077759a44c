"""Emotion by degrees: at each token, how much more likely the wanted emotion makes it than the others do.

A model that was trained with its label before the text is its own classifier. By Bayes' rule it knows, after each token
that may come, how likely each emotion is: p(y | x) = p(x | y) / sum of p(x | y') over all emotions y', which are taken
for equally frequent. With the strength S, tokens are chosen by

    p(token | y, text so far) * p(y | text so far and token) ^ S                       (GeDi: Krause et al., 2020)

which favours those that speak for the emotion. This is also classifier-free guidance (Sanchez et al., 2023) with the
factor 1 + S, if what the model writes without an emotion is the mean over emotions, each weighed by how likely the text
so far makes it: the two differ by a factor that no token changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.data.batching import pad
from emoft.data.template import TextFormat
from emoft.data.tokens import make_tokens
from emoft.errors import UserError
from emoft.model.decoding import Decoder
from emoft.training.loss import cross_entropy, shift_labels


@dataclass(frozen=True)
class Steering:
    """How strongly an emotion, or a mixture of several, is asked for."""

    prefixes: list[list[int]]  # token ids of what stands before the text, by label
    labels: list[str]
    strength: float
    mixture: dict[str, float] | None = None  # the share of each emotion; none: each prompt names its own

    @property
    def count(self) -> int:
        """How many labels there are: rows of each prompt."""
        return len(self.prefixes)

    def own(self, row: list[int]) -> int:
        """Return the number of the label that a prompt of token ids begins with; of several the longest.

        Raises:
            UserError: it begins with none.
        """
        found = [n for n, prefix in enumerate(self.prefixes) if row[: len(prefix)] == prefix]
        if not found:
            raise UserError(
                "--strength weighs the emotions of the model against each other, and a prompt names none of them:"
                f" begin each prompt with one of {', '.join(self.labels)}, as the template does, or use --emotion"
            )
        return max(found, key=lambda n: len(self.prefixes[n]))

    def rows(self, row: list[int]) -> list[list[int]]:
        """Return a prompt under each label."""
        text = row[len(self.prefixes[self.own(row)]) :]
        return [prefix + text for prefix in self.prefixes]

    def shares(self, row: list[int]) -> list[float]:
        """Return the share of each label that a prompt asks for; they sum to 1."""
        if self.mixture is None:
            return [float(n == self.own(row)) for n in range(self.count)]
        return [self.mixture.get(label, 0.0) for label in self.labels]


def build_steering(
    tokenizer: GPT2Tokenizer, text_format: TextFormat, strength: float, mixture: dict[str, float] | None = None
) -> Steering:
    """Return how to steer a model.

    Raises:
        UserError: its template cannot steer.
    """
    if not text_format.label_first or len(text_format.labels) < 2:
        raise UserError(
            f"--strength needs a model that writes for several emotions, and this one has {len(text_format.labels)} and"
            f" the template {text_format.template!r}: train with {{label}} before {{text}}, as train.py --config"
            " conditional does"
        )
    prefixes = [ids for ids, _ in make_tokens(tokenizer, list(text_format.prompts().values()))]
    return Steering(prefixes, text_format.labels, strength, mixture)


class Steered:
    """The rows of each text under all labels, which go on with the same token, as one batch with one cache."""

    def __init__(self, decoder: Decoder, end: int, steering: Steering, texts: Sequence[list[int]]) -> None:
        """Prepare it.

        Args:
            decoder: of the model.
            end: the id of end-of-text, which fills rows up.
            steering: how strongly.
            texts: the prompts, token ids, each under its own label.
        """
        self.strength = steering.strength
        with decoder.precision.autocast():
            self.evidence = evidence_of(decoder.model, end, steering, texts)  # (B, L)
        self.shares = torch.tensor([steering.shares(text) for text in texts], device=self.evidence.device)  # (B, L)

    def scores(self, scores: Tensor) -> Tensor:
        """Return the steered scores of each text, (B, V), from those of its rows, (B * L, V)."""
        self.logs = scores.log_softmax(-1).view(*self.evidence.shape, -1)  # (B, L, V)
        return steer(self.logs, self.evidence, self.shares, self.strength)

    def accept(self, chosen: Tensor) -> None:
        """Take the tokens, (B,), that the texts go on with: each is evidence for the labels that made it likely."""
        places = chosen[:, None, None].expand(-1, self.logs.shape[1], -1)
        self.evidence = self.evidence + self.logs.gather(2, places)[..., 0]

    def keep(self, chosen: Tensor) -> None:
        """Go on with some of the texts only, by their places in the batch."""
        self.evidence, self.shares = self.evidence[chosen], self.shares[chosen]


def steer(logs: Tensor, evidence: Tensor, shares: Tensor, strength: float) -> Tensor:
    """Return the logarithms, but for a constant, of the chances of each token; see above.

    Of a mixture of emotions, the logarithms of each are weighed by its share.

    Args:
        logs: (B, L, V), log p(token | label, text so far).
        evidence: (B, L), log p(text so far | label).
        shares: (B, L), of the emotions that are asked for.
        strength: 0 for none.
    """
    posterior = (evidence[..., None] + logs).log_softmax(1)  # (B, L, V): log p(label | text so far and token)
    weights = shares[..., None].expand_as(logs)
    # A share of 0 counts nothing, even of a token that is impossible under its label.
    return torch.where(weights > 0, weights * (logs + strength * posterior), 0.0).sum(1)


@torch.no_grad()
def evidence_of(model: GPT2LMHeadModel, end: int, steering: Steering, rows: Sequence[list[int]]) -> Tensor:
    """Return (B, L) float32, the log-likelihood of what there is of each text under each label, in nats.

    Args:
        model: in evaluation mode.
        end: the id of end-of-text, which fills rows up.
        steering: knows the labels.
        rows: prompts, token ids.
    """
    every = [
        {"input_ids": each, "first_target": len(prefix)}
        for row in rows
        for each, prefix in zip(steering.rows(row), steering.prefixes, strict=True)
    ]
    batch = pad(every, end).to(model.device)
    hidden = model.transformer(**batch.inputs, use_cache=False).last_hidden_state  # (B * L, T, C)
    losses = cross_entropy(hidden, model.lm_head.weight, shift_labels(batch.labels), batch.predicting)  # (K,)
    found = torch.zeros(len(every), device=model.device).index_add(0, batch.target_owners, -losses.float())
    return found.view(len(rows), steering.count)
