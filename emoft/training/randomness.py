"""A stream of random numbers for each rank, which dropout draws from."""

import numpy as np
import torch


def seed_rank(seed: int, rank: int, step: int) -> None:
    """Begin a stream of random numbers that is that of this rank and step alone."""
    torch.manual_seed(int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0] >> 1))
