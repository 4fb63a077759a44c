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
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, GPT2Tokenizer, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from emoft.data.batching import pad
from emoft.data.template import TextFormat
from emoft.data.tokens import make_tokens
from emoft.errors import UserError
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


class Steered(LogitsProcessor):
    """Chooses the next token of each prompt from its rows under all labels, which go on with the same token.

    All rows advance as one batch with one cache.
    """

    def __init__(
        self, steering: Steering, rows: list[list[int]], evidence: Tensor, rules: LogitsProcessorList, draws: bool
    ) -> None:
        """Prepare it.

        Args:
            steering: how strongly.
            rows: the prompts, token ids, each under its own label.
            evidence: (B, L) float, the log-likelihood of what there is of each text under each label, in nats.
            rules: of transformers, which change the scores (B, V) of a step, in this order.
            draws: a token at random by its probability, instead of the likeliest.
        """
        self.steering, self.rules, self.draws, self.evidence = steering, rules, draws, evidence
        self.shares = torch.tensor([steering.shares(row) for row in rows], device=evidence.device)  # (B, L)
        self.own = torch.tensor([steering.own(row) for row in rows], device=evidence.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B * L, V) that leave a single token for all rows of a prompt.

        Args:
            input_ids: (B * L, T), the rows so far.
            scores: (B * L, V), their logits.
        """
        prompts, count = len(self.own), self.steering.count
        logs = scores.float().log_softmax(-1).view(prompts, count, -1)  # (B, L, V)
        steered = steer(logs, self.evidence, self.shares, self.steering.strength)
        places = torch.arange(prompts, device=scores.device) * count + self.own  # of each prompt under its own label
        before: Any = input_ids[places]
        steered = self.rules(before, steered.nan_to_num(-torch.inf))
        drawn_or_best = steered.softmax(-1).nan_to_num(1.0).multinomial(1) if self.draws else steered.argmax(-1, True)
        chosen = drawn_or_best[:, 0]
        self.evidence += logs.gather(2, chosen[:, None, None].expand(-1, count, 1))[..., 0]
        rows = chosen.repeat_interleave(count)
        return torch.full_like(scores, -torch.inf).scatter(1, rows[:, None], 0.0)


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


class FirstRow(BaseStreamer):
    """Gives a streamer, which knows a single row, the first of several that are the same."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer = streamer

    def put(self, value: Tensor) -> None:
        """Take the prompts, (L, T), then a token of each row, (L,), at a time."""
        self.streamer.put(value[:1])

    def end(self) -> None:
        """End the text."""
        self.streamer.end()
