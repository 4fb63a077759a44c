import pytest
import torch
from transformers import GPT2Config

from emoft.benchmark.machine import Machine, least_seconds, measure_bandwidth
from emoft.tracking.throughput import block_weights, measure_flops, training_operations
from emoft.training.precision import Precision

SMALL = GPT2Config()


def test_the_weights_of_gpt2_small() -> None:
    """124 million parameters are the blocks' matrices, embeddings, and under 0.2 million biases and norms."""
    assert block_weights(SMALL) == 12 * 12 * 768**2
    assert block_weights(SMALL) + 768 * (50257 + 1024) == pytest.approx(124_439_808, rel=1e-3)
    assert block_weights(GPT2Config(n_inner=100, n_layer=1, n_embd=10)) == 4 * 100 + 2 * 10 * 100


def test_operations_are_six_for_each_weight_and_token() -> None:
    lengths = [2, 30, 68]
    pairs = 1 + 2 + sum(range(1, 31)) + sum(range(1, 69))
    weights = block_weights(SMALL) * 100 + 768 * 50257 * 97
    assert training_operations(SMALL, lengths) == pytest.approx(6 * weights + 12 * 768 * 12 * pairs, rel=1e-15)


def test_the_limit_is_the_larger_of_arithmetic_and_memory_and_then_the_update() -> None:
    parameters = block_weights(SMALL) + 768 * (50257 + 1024)
    lengths = [20, 30]
    operations = training_operations(SMALL, lengths)
    memory_bound = least_seconds(Machine(flops=1e30, bandwidth=1e9), SMALL, lengths, half=True)
    assert memory_bound == pytest.approx((10 + 4 + 32) * parameters / 1e9)
    assert least_seconds(Machine(1e30, 1e9), SMALL, lengths, half=False) == pytest.approx(
        (8 + 4 + 32) * parameters / 1e9
    )
    arithmetic_bound = least_seconds(Machine(flops=1e9, bandwidth=1e30), SMALL, lengths, half=True)
    assert arithmetic_bound == pytest.approx(operations / 1e9)


def test_rates_are_measured() -> None:
    precision = Precision("no", torch.device("cpu"))
    assert 1e8 < measure_flops(precision) < 1e15
    assert 1e8 < measure_bandwidth(precision) < 1e13
