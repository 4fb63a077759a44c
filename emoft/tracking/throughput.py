"""How fast a run is: the operations that a step needs, the rate of the device at best, the memory in use."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config

from emoft.training.precision import Precision

# Rows and columns of the product whose rate is taken for the device's: large enough to be bound by arithmetic.
MATRIX = {"cpu": 1024, "cuda": 8192}


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
    size = MATRIX[precision.device.type]
    a, b = (torch.ones(size, size, device=precision.device, dtype=precision.dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b, precision.device) for _ in range(repeats))


def memory_in_use(device: torch.device) -> int | None:
    """Return the bytes that the process holds; on a GPU the most that were allocated there; None if not to be had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def synchronize(device: torch.device) -> None:
    """Wait until the device has computed all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a function takes, with all that it told the device to do."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start
