import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from emoft.model.kernels import Dropout, dropout, use_fast_kernels


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
