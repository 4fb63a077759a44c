"""The one label shift, and the cross-entropy summed over targets, head included."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emoft.data.batching import IGNORED
from emoft.device import loss_rows

LOGIT_BYTES = 64 << 20  # of logits in float32 at a time in inference: enough rows for a fast matrix product
WEIGHT_ROWS = 8192  # of the head's gradient at a time, likewise


_given: list[tuple[Tensor, Tensor, Tensor]] | None = None  # see `given_targets`


@contextmanager
def given_targets() -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Collect what `cross_entropy` is really given while it trains in this context, whatever the loop meant to give it.

    Yields:
        For each call the targets, (K,), the places in the flattened rows that predict them, (K,), and what it
        returned, (K,).
    """
    global _given
    outer, _given = _given, []
    try:
        yield _given
    finally:
        _given = outer


def shift_labels(labels: Tensor) -> Tensor:
    """Return for each position the token that it has to predict: the label of the next one; the last has none.

    The labels decide what is a target. They are made from the lengths of the texts, never by comparing ids with the
    padding's: pad is end-of-text here, and a real end-of-text is a target like any other. The first token of a text
    is no target, so that in a packed row no text predicts the beginning of its neighbour.

    Args:
        labels: (B, T) token ids, `IGNORED` for padding and for the first token of each text.

    Returns:
        (B, T) target ids, `IGNORED` where there is none.
    """
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    return targets


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, predicting: Tensor) -> Tensor:
    """Return the cross-entropy of each target, (K,), in nats, computed in float32 at least.

    In words that need more memory and time, it is

        logits = (hidden @ head.T).flatten(0, 1)[predicting]                                    # (K, V)
        losses = F.cross_entropy(logits.float(), targets.flatten()[predicting], ignore_index=-100, reduction="none")

    No mean, so that the caller can divide once by the targets of a whole step: a mean of the means of micro-batches
    would give the tokens of short texts more weight. Logits exist only where there is a target.

    Args:
        hidden: (B, T, C), the last hidden states.
        head: (V, C), the weight of the language model's head.
        targets: (B, T), of `shift_labels`: the token that each place has to predict.
        predicting: (K,) the places, flattened, that predict a token; 0 is returned for those whose target is `IGNORED`.
    """
    hidden = hidden.flatten(0, 1).index_select(0, predicting)
    targets = targets.flatten().index_select(0, predicting)
    if not torch.is_grad_enabled():
        return _without_gradient(hidden, head, targets)
    losses: Tensor = _LinearCrossEntropy.apply(hidden, head, targets)
    if _given is not None:
        _given.append((targets, predicting, losses.detach()))
    return losses


def _without_gradient(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The same without a backward pass: no logits are kept for it, they exist for a few rows at a time only."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
    hidden, head = hidden.to(dtype), head.to(dtype)
    rows = max(1, LOGIT_BYTES // (4 * len(head)))
    losses = []
    with torch.autocast(device, enabled=False):
        for block, labels in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = _widen(block @ head.t())  # (rows, V)
            losses.append(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none"))
    return torch.cat(losses)


class _LinearCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy in one, so that logits in float32 exist for a few rows at a time only.

    Logits are kept in autocast's type, in which the head computes them; their gradient takes their place.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        ctx.dtypes = hidden.dtype, head.dtype
        hidden, head = hidden.to(dtype), head.to(dtype)
        with torch.autocast(device, enabled=False):
            logits = hidden @ head.t()  # (K, V)
        normalizer = torch.cat([_widen(block).logsumexp(1) for block in logits.split(_rows(logits))])  # (K,)
        is_target = targets != IGNORED
        chosen = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        ctx.save_for_backward(hidden, head, logits, normalizer, targets)
        return (normalizer - chosen) * is_target

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, head, logits, normalizer, targets = ctx.saved_tensors
        is_target = targets != IGNORED
        # The gradient of a target's cross-entropy with respect to its logits: softmax, less 1 at the target.
        for start in range(0, len(targets), _rows(logits)):
            block = slice(start, start + _rows(logits))
            softmax = _widen(logits[block]).sub(normalizer[block, None]).exp_()
            softmax.scatter_add_(
                1, targets[block, None].clamp(min=0), softmax.new_full((1, 1), -1.0).expand(len(softmax), 1)
            )
            logits[block] = softmax.mul_((gradient * is_target)[block, None])
        hidden_dtype, head_dtype = ctx.dtypes
        head_gradient = torch.empty_like(head, dtype=head_dtype)
        for part, columns in zip(head_gradient.split(WEIGHT_ROWS), logits.split(WEIGHT_ROWS, dim=1), strict=True):
            part.copy_(columns.t() @ hidden)
        return (logits @ head).to(hidden_dtype), head_gradient, None


def _rows(logits: Tensor) -> int:
    return loss_rows(logits.device, logits.shape[1])


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
