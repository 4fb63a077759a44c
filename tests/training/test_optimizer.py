import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from emoft.config import TrainConfig
from emoft.errors import UserError
from emoft.model.loading import fresh_model
from emoft.model.tokenizer import train_tokenizer
from emoft.training.optimizer import (
    build_optimizer,
    build_schedule,
    clip_in_next_step,
    skip_next_step_if,
)
from emoft.training.schedule import count_warmup_steps


def rates(total_steps: int, **settings: object) -> list[float]:
    """The learning rate of each step and the one after the last, relative to the highest."""
    config = TrainConfig(learning_rate=1.0, **settings)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    schedule = build_schedule(optimizer, config, total_steps)
    seen = []
    for _ in range(total_steps + 1):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return seen


class TestSchedule:
    def test_linear(self) -> None:
        assert rates(4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])

    def test_linear_with_warmup(self) -> None:
        assert rates(6, warmup_steps=2) == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25, 0])

    def test_cosine(self) -> None:
        assert rates(4, lr_scheduler_type="cosine") == pytest.approx(
            [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
        )

    def test_constant(self) -> None:
        assert rates(3, warmup_steps=1, lr_scheduler_type="constant") == [0, 1, 1, 1]

    def test_warmup_as_a_share(self) -> None:
        assert count_warmup_steps(0.1, 95) == 10
        assert count_warmup_steps(3, 95) == 3
        assert count_warmup_steps(0, 95) == 0
        assert count_warmup_steps(95, 95) == 95

    def test_warmup_longer_than_the_run(self) -> None:
        with pytest.raises(UserError, match="--warmup_steps 96 is longer than the run of 95"):
            count_warmup_steps(96, 95)


def test_decay_is_for_matrices() -> None:
    model = fresh_model("n_layer=1,n_embd=8,n_head=1", train_tokenizer(["a"], 257))
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert names == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


class TestClipping:
    """A gradient of norm 7, and what one step of the fused optimizer makes of it beside the library's own clipping."""

    def step(self, max_grad_norm: float, ours: bool) -> tuple[float, list[torch.Tensor]]:
        parameters = [nn.Parameter(torch.zeros(2, 1)), nn.Parameter(torch.zeros(1))]
        optimizer = build_optimizer(nn.ParameterList(parameters), TrainConfig(learning_rate=0.1, adam_epsilon=1.0))
        for _ in range(2):
            parameters[0].grad, parameters[1].grad = torch.tensor([[2.0], [3.0]]), torch.tensor([6.0])
            if ours:
                norm = clip_in_next_step(optimizer, max_grad_norm)
                assert parameters[1].grad.item() == 6, "what is measured before the step is not clipped yet"
            else:
                norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
        return norm.item(), [parameter.detach() for parameter in parameters]

    @pytest.mark.parametrize("max_grad_norm", [0.1, 1.0, 7.5, 100.0])
    def test_is_the_librarys(self, max_grad_norm: float) -> None:
        norm, weights = self.step(max_grad_norm, ours=True)
        expected_norm, expected = self.step(max_grad_norm, ours=False)
        assert norm == expected_norm == 7
        for ours, reference in zip(weights, expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)

    def test_zero_is_off(self) -> None:
        torch.testing.assert_close(self.step(0, ours=True), self.step(100.0, ours=False))

    @pytest.mark.parametrize(
        "build",
        [
            lambda parameters: torch.optim.AdamW(parameters),
            lambda parameters: torch.optim.AdamW(parameters, foreach=True),
            lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            lambda parameters: torch.optim.Adagrad(parameters, fused=True),
            lambda parameters: torch.optim.AdamW([{"params": parameters, "fused": False}], fused=True),
        ],
        ids=["AdamW", "AdamW, foreach", "SGD", "Adagrad, fused", "a group of AdamW that is not fused"],
    )
    def test_an_optimizer_that_would_not_clip_is_refused(self, build: Callable[..., Optimizer]) -> None:
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.ones(2)
        optimizer = build([parameter])
        with pytest.raises(TypeError, match="does not clip by itself, only AdamW.*clip_grad_norm_"):
            clip_in_next_step(optimizer, 1.0)
        with pytest.raises(TypeError, match="does not skip a step by itself"):
            skip_next_step_if(optimizer, torch.tensor(True))


@pytest.mark.parametrize("skips", [False, True])
def test_a_step_can_be_left_out(skips: bool) -> None:
    model = nn.Linear(2, 1)
    optimizer = build_optimizer(model, TrainConfig(learning_rate=0.1))
    before = model.weight.detach().clone()
    model(torch.ones(2)).backward()
    skip_next_step_if(optimizer, torch.tensor(skips))
    optimizer.step()
    assert torch.equal(before, model.weight) == skips
