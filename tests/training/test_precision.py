import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from emoft.device import choose_device, half_precision
from emoft.training.precision import Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_sets_the_type_of_matrix_products(name: str, dtype: torch.dtype) -> None:
    precision = Precision(name, CPU)
    with precision.autocast():
        assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == dtype
    assert precision.scaler.is_enabled() == (name == "fp16")


def test_products_of_float32_stay_float32() -> None:
    """Even where the environment has switched TF32 on."""
    torch.set_float32_matmul_precision("high")
    Precision("no", CPU)
    assert torch.get_float32_matmul_precision() == "highest"


def test_auto_is_what_the_processor_computes_in() -> None:
    flags = open("/proc/cpuinfo").read() if torch.cpu.is_available() else ""  # noqa: SIM115
    expected = "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "no"
    assert half_precision(CPU) == Precision("auto", CPU).name == expected


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx512_bf16": True, "amx_tile": False}, "bf16"),
        ({"avx512_bf16": False, "amx_tile": True}, "bf16"),
        ({"avx512_bf16": False, "amx_tile": False, "avx512_f": True}, "no"),
        ({"neon": True}, "no"),  # another architecture
    ],
)
def test_auto_on_other_processors(monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert half_precision(CPU) == expected


def test_the_names_of_what_a_processor_can_do() -> None:
    able = torch.cpu.get_capabilities()
    if able["architecture"] == "x86_64":
        assert {"avx512_bf16", "amx_tile"} <= set(able), "torch gives them other names: auto would find no bf16"


def test_use_cpu_wins() -> None:
    assert choose_device(use_cpu=True) == CPU


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_halves_the_scale_and_changes_nothing_else(fused: bool) -> None:
    """The fused optimizer's own step is called either way and skips inside: only the scale tells."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    precision = Precision("fp16", CPU)
    scaler = precision.scaler
    rates, scales, moved = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            with precision.autocast():
                loss = model(torch.ones(2, 8)).float().square().mean()
            scaler.scale(loss).backward()
            if step in (0, 2):  # the first step too: the schedule would warn if it ran ahead of the optimizer
                model.weight.grad[0, 0] = torch.inf
            scaler.unscale_(optimizer)
            before = model.weight.detach().clone()
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped = scaler.get_scale() < scale
            if not skipped:
                schedule.step()
            optimizer.zero_grad(set_to_none=True)
            moved.append(not torch.equal(before, model.weight))
            scales.append(scaler.get_scale())
            rates.append(schedule.get_last_lr()[0])
    assert moved == [False, True, False, True]
    assert scales == [32768, 32768, 16384, 16384]
    assert rates == pytest.approx([0.1, 0.05, 0.05, 0.025])
