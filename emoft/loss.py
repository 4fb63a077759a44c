"""The one label shift, the summed cross-entropy and the count of its tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # what cross_entropy skips by default


def shift_labels(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return for each position the token that it has to predict: the next one.

    The last position has none, and neither has one whose next token is padding. Padding is known by the attention
    mask, never by its id: pad is end-of-text here, and a real end-of-text is a target like any other.

    Args:
        input_ids: (B, T) token ids, padded on the right.
        attention_mask: (B, T), 1 for tokens and 0 for padding.

    Returns:
        (B, T) target ids, `IGNORED` where there is none.
    """
    targets = torch.full_like(input_ids, IGNORED)
    targets[:, :-1] = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, IGNORED)
    return targets


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy summed over all targets, in nats, computed in float32 at least.

    A sum, so that the caller can divide once by the targets of a whole step: a mean of the means of micro-batches
    would give the tokens of short texts more weight.

    Args:
        logits: (B, T, V) of the model, not shifted.
        targets: (B, T) of `shift_labels`.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def count_targets(attention_mask: Tensor) -> int:
    """Return how many tokens of a batch are targets: all but the first of each row. Meant for masks on the CPU."""
    return int(attention_mask[:, 1:].sum())
