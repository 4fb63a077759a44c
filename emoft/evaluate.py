"""How well a model predicts a split: token-weighted loss and perplexity."""

import math
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import GPT2LMHeadModel

from emoft.batching import Batch
from emoft.distributed import World
from emoft.loss import cross_entropy
from emoft.precision import Precision
from emoft.signals import StopSignals


@dataclass(frozen=True)
class Evaluation:
    """The result over a split: mean cross-entropy of its target tokens in nats, and how many those are."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a number."""
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where that is too large for a number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.no_grad()  # not inference_mode: the weights that FSDP gathers in it could not be trained any more
def evaluate(
    model: GPT2LMHeadModel, loader: DataLoader[Batch], precision: Precision, world: World, signals: StopSignals | None
) -> Evaluation | None:
    """Return the loss over all batches of all ranks' loaders, each token weighing the same; dropout is off meanwhile.

    The sum is kept in float64, so that the order of the batches does not show in the result.

    Args:
        model: in either mode.
        loader: this rank's batches of the split, as many on each rank.
        precision: of the run.
        world: all ranks.
        signals: if one was received, the evaluation ends at the next batch.

    Returns:
        The result; None if a signal ended it.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=precision.device)  # loss and tokens
    for batch in tqdm(loader, desc="Evaluating", unit="batch", leave=False, dynamic_ncols=True):
        if signals and signals.poll():
            break
        total[1] += batch.target_tokens
        batch = batch.to(precision.device)
        with precision.autocast():
            hidden = model.transformer(**batch.inputs, use_cache=False).last_hidden_state
            total[0] += cross_entropy(hidden, model.lm_head.weight, batch.predicting, batch.targets).sum()
    model.train(was_training)
    if signals and signals.received:
        return None
    loss, tokens = world.sum(total).tolist()
    return Evaluation(loss=loss / max(1, tokens), tokens=int(tokens))
