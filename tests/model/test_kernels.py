import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from emoft.data.batching import pack
from emoft.model.attention import use_packed_attention
from emoft.model.kernels import Dropout, compile_blocks, dropout, use_fast_kernels


def test_gelu_is_the_same_function() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10))
    use_fast_kernels(model)
    activation = model.transformer.h[0].mlp.act
    assert not isinstance(activation, NewGELUActivation)
    values = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    torch.testing.assert_close(activation(values), NewGELUActivation()(values), rtol=1e-12, atol=1e-15)
    assert model.config.activation_function == "gelu_new"


def test_every_dropout_is_replaced_and_keeps_its_share() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=10, resid_pdrop=0.3))
    before = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    use_fast_kernels(model)
    after = {name: module for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert {name: module.p for name, module in after.items()} == before
    assert {type(module) for module in after.values()} == {Dropout}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_scales_the_rest(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.ones(7, 150_001, dtype=dtype, requires_grad=True)  # a count that four does not divide
    result = dropout(values, share)
    kept = (result != 0).double()
    assert kept.mean().item() == pytest.approx(1 - share, abs=4 * (share * (1 - share) / kept.numel()) ** 0.5 + 1e-5)
    if share < 1:
        assert set(result.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - share), dtype=dtype).item()}
    result.sum().backward()
    assert torch.equal(values.grad, result.detach())  # the same mask and scale


def test_dropout_is_independent_from_value_to_value() -> None:
    """Four values share one random number: its four parts must not go together."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(400_000), 0.5) != 0).double().view(-1, 4)
    correlation = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlation.abs().max() < 0.02
    assert abs(torch.corrcoef(torch.stack([kept.flatten()[:-1], kept.flatten()[1:]]))[0, 1]) < 0.01


def test_dropout_follows_torchs_generator() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(dropout(torch.ones(1000), 0.5))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], dropout(torch.ones(1000), 0.5))


def test_dropout_off() -> None:
    module = Dropout(0.5).eval()
    values = torch.ones(10)
    assert module(values) is values


def nodes_behind(loss: torch.Tensor) -> list[Any]:
    """All nodes of the backward pass."""
    found, new = [], [loss.grad_fn]
    while new:
        node = new.pop()
        if node is not None and node not in found:
            found.append(node)
            new += [each for each, _ in node.next_functions]
    return found


def test_blocks_are_compiled_once_for_all_and_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own tracing, without the C++ compiler behind it, which tests/test_train.py runs."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=1, vocab_size=10, eos_token_id=0, bos_token_id=0))
    model.train()
    use_packed_attention(model)
    use_fast_kernels(model)
    compile_blocks(model.transformer)
    trial = len(counter.graphs)  # whether anything can be compiled

    def compiled() -> int:
        return sum(len(each.graph.nodes) > 0 for each in counter.graphs[trial:])

    for length in (5, 7, 9):
        batch = pack([{"input_ids": [1] * length}, {"input_ids": [2] * (length + 3)}], pad_id=0)
        loss = model.transformer(**batch.inputs, use_cache=False).last_hidden_state.sum()
        nodes = [type(node).__name__ for node in nodes_behind(loss)]
        # Each block is a node of its own: DDP hears of its gradients before the earlier blocks are computed.
        assert nodes.count("CompiledFunctionBackward") == 3
        loss.backward()
    assert compiled() == 1, "all blocks are the same code, for any length"
    model.eval()
    model.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=2, do_sample=False)
    assert compiled() == 1, "evaluation and samples run as they are"
