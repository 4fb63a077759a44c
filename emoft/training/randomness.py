"""The state of torch's random generators, which dropout draws from."""

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> list[Tensor]:
    """Return the state of torch's generators: the CPU's, and the GPU's if that is the device. Waits for nothing."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Put a state of `random_state` back."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def seed_rank(seed: int, rank: int, step: int) -> None:
    """Begin a stream of random numbers that is that of this rank and step alone."""
    torch.manual_seed(int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0] >> 1))
