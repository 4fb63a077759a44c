"""Which token comes next: the likeliest, or one drawn at random by its probability."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the scores of all."""

    do_sample: bool = False  # draw at random; otherwise the likeliest is taken, and the rest says nothing
    temperature: float = 1.0  # scores are divided by it
    top_k: int = 50  # only the so many likeliest are drawn (0: all)
    top_p: float = 1.0  # of those, only the likeliest that together reach this share (Holtzman et al., 2020)

    def choose(self, scores: Tensor) -> Tensor:
        """Return the next token of each row, (B,), from scores (B, V): logits, up to a constant.

        A draw looks at no more tokens than it has to: softmax and draws over all of GPT-2's 50,257 would take longer on
        a CPU than the model.
        """
        if not self.do_sample:
            return scores.argmax(-1)
        count = min(self.top_k or scores.shape[-1], scores.shape[-1])
        ids: Tensor | None = None
        if count < scores.shape[-1] or self.top_p < 1:
            scores, ids = scores.topk(count)  # the likeliest first
        chances = (scores / self.temperature).softmax(-1)
        if self.top_p < 1:
            likelier = chances.cumsum(-1) - chances  # the share of all that are likelier than each
            chances = chances.masked_fill(likelier >= self.top_p, 0)
        # A model with NaN in it writes nonsense, but ends no training.
        chosen = chances.nan_to_num(1.0).multinomial(1)
        return (chosen if ids is None else ids.gather(1, chosen))[:, 0]


def ban_repeats(ids: Tensor, padding: Tensor, size: int, scores: Tensor) -> Tensor:
    """Return scores with minus infinity for each token that would complete a sequence that the row holds already.

    The rule of transformers' `NoRepeatNGramLogitsProcessor`, which works row by row in Python, and takes the
    end-of-text that fills the rows up for a token of the prompt: a prompt would be continued differently beside a
    longer one than alone.

    Args:
        ids: (B, T), the rows so far.
        padding: (B,), tokens in front of each row that are not its own.
        size: tokens of a sequence.
        scores: (B, V).
    """
    if ids.shape[1] < size:
        return scores
    windows = ids.unfold(1, size, 1)  # (B, W, size)
    latest = ids[:, ids.shape[1] - size + 1 :]  # (B, size - 1), what a token would complete
    in_text = torch.arange(windows.shape[1], device=ids.device) >= padding[:, None]
    repeats = (windows[..., :-1] == latest[:, None]).all(-1) & in_text  # (B, W)
    banned = torch.where(repeats, -torch.inf, torch.inf).to(scores.dtype)
    return scores.scatter_reduce(1, windows[..., -1], banned, "amin")
