"""A language model from outside as judge of texts: how likely it finds them, and how near they come to people's.

The judge was trained on other texts: what the writing model thinks of its own ones says little. Each text is put into
the judge's own template, which must not name the emotion; where the judge was taught that texts end, end-of-text
follows those that ended by themselves; then all is cut to the judge's `max_length`. Every token but the first is
predicted and counts, as in the evaluation of a split (`emoft.evaluate.scoring`). The figures depend on the judge, and a
low perplexity alone is no merit (the same simple sentence again and again has one): they are to be compared with those
of texts that people wrote, judged in the same way.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import numpy as np
import torch
from datasets import Dataset

from emoft.data import hub
from emoft.data.batching import pad, split_loader
from emoft.data.template import TextFormat
from emoft.data.tokens import byte_lengths, make_tokens, most_characters
from emoft.errors import UserError
from emoft.evaluate.saved import load_text_model
from emoft.evaluate.scoring import Scores, score_examples
from emoft.files import FORMAT_FILE
from emoft.model.loading import TextModel
from emoft.training.runtime import Runtime

FLAG = "judge_model"
FEWEST = 40  # texts of each kind, below which MAUVE, which puts them into clusters of 20, says nothing


class LanguageJudge:
    """A saved model that judges texts which it did not write."""

    def __init__(self, text_model: TextModel, runtime: Runtime, batch_size: int) -> None:
        """Prepare it.

        Args:
            text_model: with packed attention, in evaluation mode; its template holds no {label}.
            runtime: one process.
            batch_size: texts computed at once.
        """
        self.text_model, self.runtime, self.batch_size = text_model, runtime, batch_size

    def rows(self, texts: Sequence[str], ended: Sequence[bool]) -> list[list[int]]:
        """Return the token ids of texts in the judge's template, end-of-text behind those that ended, then cut."""
        tokenizer, text_format = self.text_model.tokenizer, self.text_model.text_format
        most = most_characters(tokenizer, text_format.max_length)
        encoded = make_tokens(tokenizer, [text_format.fill(text)[:most] for text in texts])
        end = [tokenizer.eos_token_id]
        rows = [ids + end * (ends and text_format.append_eos) for (ids, _), ends in zip(encoded, ended, strict=True)]
        # Of an empty text there is nothing to predict; it still needs a token to be computed at all.
        return [row[: text_format.max_length] or end for row in rows]

    def score(self, texts: Sequence[str], ended: Sequence[bool]) -> Scores:
        """Return how likely it finds each of N texts.

        Args:
            texts: without any template.
            ended: (N,) whether each ended by itself.
        """
        model, tokenizer = self.text_model.model, self.text_model.tokenizer
        rows = Dataset.from_dict({"input_ids": self.rows(texts, ended)})
        loader = split_loader(
            rows, self.batch_size, tokenizer.eos_token_id, self.runtime.device, "packed", self.runtime.world
        )
        sizes = byte_lengths(tokenizer, model.config.vocab_size)
        scores = score_examples(model, loader, self.runtime, sizes, "Judging")
        assert scores
        return scores

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> np.ndarray:
        """Return (N, C) float32, the last hidden state at the last token of each text, before any end-of-text."""
        model, end = self.text_model.model, self.text_model.tokenizer.eos_token_id
        found = []
        for start in range(0, len(texts), self.batch_size):
            part = texts[start : start + self.batch_size]
            rows = self.rows(part, [False] * len(part))
            batch = pad([{"input_ids": row} for row in rows], end).to(self.runtime.device)
            with self.runtime.precision.autocast():
                hidden = model.transformer(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, C)
            last = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
            found.append(hidden[torch.arange(len(rows), device=hidden.device), last].float().cpu())
        return torch.cat(found).numpy()


def load_judge(name: str, runtime: Runtime, batch_size: int) -> LanguageJudge:
    """Return the judge of --judge_model.

    Args:
        name: of its folder, or on the Hub; one without a saved template sees the texts alone.
        runtime: one process.
        batch_size: texts computed at once.

    Raises:
        UserError: it cannot be had, or would have to be told the emotion.
    """
    folder = hub.model_folder(name, FLAG)
    text_format = TextFormat.load(folder, name) if (folder / FORMAT_FILE).exists() else TextFormat("{text}")
    if text_format.has_label:
        raise UserError(
            f"--{FLAG} {name} has the template {text_format.template!r}, and a judge must not be told the emotion: name"
            " a model that was trained with --template '{text}'"
        )
    return LanguageJudge(load_text_model(name, "main", text_format, runtime.device, FLAG), runtime, batch_size)


def mauve_is_available() -> bool:
    """Whether the packages are installed that MAUVE is computed by."""
    return find_spec("mauve") is not None and find_spec("faiss") is not None


def mauve(first: np.ndarray, second: np.ndarray) -> float:
    """Return how near two sets of texts come to each other, from 0 to 1 (MAUVE: Pillutla et al., 2021).

    Args:
        first: (N, C) features.
        second: (M, C) features.
    """
    # Here, since it need not be installed.
    from mauve import compute_mauve

    with _quiet():
        return float(compute_mauve(p_features=first, q_features=second).mauve)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let nothing reach standard error: faiss warns of clusters of fewer than 39 texts, which MAUVE wants so."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def mauve_beside_people(
    judge: LanguageJudge, written: dict[str, list[str]], human: dict[str, list[str]]
) -> tuple[float, float] | None:
    """Return MAUVE of written texts against one half of people's, and of the other half of people's against it.

    Both compare equally many texts of each emotion, since the figure depends on their number.

    Args:
        judge: gives the features.
        written: texts by emotion.
        human: likewise; halved for each emotion: every other text.

    Returns:
        The two; None if there are too few texts.
    """
    first, second, own = list[str](), list[str](), list[str]()
    for label, texts in written.items():
        count = min(len(texts), len(human.get(label, [])) // 2)
        own += texts[:count]
        first += human.get(label, [])[0 : 2 * count : 2]
        second += human.get(label, [])[1 : 2 * count : 2]
    if len(own) < FEWEST:
        return None
    features = [judge.features(each) for each in (own, first, second)]
    return mauve(features[0], features[1]), mauve(features[2], features[1])
