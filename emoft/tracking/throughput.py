"""How fast a run is: the operations that a step needs, the rate of the device at best, the memory in use."""

from collections.abc import Iterable

import numpy as np
import torch
from transformers import GPT2Config

from emoft.device import matrix_size, seconds_of
from emoft.training.precision import Precision


def training_operations(model: GPT2Config, lengths: Iterable[int]) -> float:
    """Return the floating-point operations of a forward and a backward pass.

    For each weight and token 2 forward and twice that backward (Kaplan et al., 2020, section 2.1), the head's only
    where there is a target; and attention's 12 C for each layer and each pair of tokens that see each other, which are
    T (T + 1) / 2 in a text of T.

    Args:
        model: the shape of the model.
        lengths: tokens of each text; all but the first of each are targets.
    """
    texts = np.fromiter(lengths, dtype=np.float64)
    tokens, targets, pairs = texts.sum(), (texts - 1).sum(), (texts * (texts + 1) / 2).sum()
    weights = block_weights(model) * tokens + model.n_embd * model.vocab_size * targets
    return float(6 * weights + 12 * model.n_embd * model.n_layer * pairs)


def block_weights(model: GPT2Config) -> int:
    """Return the number of weights in the matrices of all blocks."""
    inner = model.n_inner or 4 * model.n_embd
    return model.n_layer * (4 * model.n_embd**2 + 2 * model.n_embd * inner)


def measure_flops(precision: Precision, repeats: int = 3) -> float:
    """Return the rate of a large matrix product in the training's type, the best of a few."""
    size = matrix_size(precision.device)
    a, b = (torch.ones(size, size, device=precision.device, dtype=precision.dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b, precision.device) for _ in range(repeats))
