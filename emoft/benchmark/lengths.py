"""How long the texts are that the comparisons draw."""

import numpy as np

# Lengths in GPT-2 tokens of the 16,000 training messages of dair-ai/emotion (Saravia et al., EMNLP 2018), each as
# "Emotion: {text}", by percentile; their mean is 23.0. Drawn lengths are interpolated between these.
LENGTHS = {
    0: 5,
    5: 9,
    10: 10,
    20: 13,
    30: 15,
    40: 18,
    50: 21,
    60: 24,
    70: 27,
    80: 32,
    90: 39,
    95: 46,
    99: 58,
    99.9: 67,
    100: 89,
}


def draw_lengths(count: int, max_length: int, seed: int) -> np.ndarray:
    """Return lengths in tokens like those of real messages, end-of-text included, cut to `max_length`."""
    uniform = np.random.default_rng(seed).uniform(0, 100, count)
    lengths = np.interp(uniform, list(LENGTHS), list(LENGTHS.values())).round().astype(int)
    return np.minimum(lengths + 1, max_length)
