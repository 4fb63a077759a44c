"""What differs by device, on the CPU; accelerators, of which there may be none, are played by their names."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from emoft import device as devices
from emoft.errors import UserError

CPU = torch.device("cpu")


def play(monkeypatch: pytest.MonkeyPatch, kind: str, count: int = 2) -> list[int]:
    """Let torch say that it has so many accelerators of a kind; returns those that are chosen."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    return chosen


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_an_accelerator_is_chosen_by_its_rank(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    chosen = play(monkeypatch, kind)
    assert devices.choose_device(use_cpu=False, local_rank=1) == torch.device(kind, 1)
    assert chosen == [1]
    assert devices.choose_device(use_cpu=True, local_rank=1) == CPU


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "mps", count=1)
    with pytest.raises(UserError, match="has 1 mps device, and torchrun started a process too many"):
        devices.choose_device(use_cpu=False, local_rank=1)


def test_without_an_accelerator_the_cpu_is_taken() -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    assert devices.choose_device(use_cpu=False) == CPU
    assert devices.backend() == "gloo"


@pytest.mark.parametrize(("kind", "expected"), [("cuda", "cpu:gloo,cuda:nccl"), ("xpu", "cpu:gloo,xpu:xccl")])
def test_processes_exchange_by_the_backend_of_their_device(
    monkeypatch: pytest.MonkeyPatch, kind: str, expected: str
) -> None:
    play(monkeypatch, kind)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: True)
    assert devices.backend() == expected
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: False)  # on Windows
    assert devices.backend() == "gloo"


@pytest.mark.parametrize(("able", "expected"), [(True, "bf16"), (False, "fp16")])
def test_half_precision_of_an_accelerator(monkeypatch: pytest.MonkeyPatch, able: bool, expected: str) -> None:
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda: able)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    assert devices.half_precision(torch.device("xpu")) == devices.half_precision(torch.device("cuda")) == expected
    assert devices.half_precision(torch.device("mps")) == "no"


def test_the_random_numbers_come_again() -> None:
    state = devices.random_state(CPU)
    first = torch.rand(3)
    devices.set_random_state(state, CPU)
    assert torch.equal(first, torch.rand(3))


def test_a_device_has_a_random_state_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[torch.device, torch.Tensor] = {}
    module = SimpleNamespace(
        get_rng_state=lambda device: torch.tensor([7]),
        set_rng_state=lambda state, device: found.update({device: state}),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    device = torch.device("xpu", 0)
    state = devices.random_state(device)
    assert len(state) == 2 and int(state[1]) == 7
    devices.set_random_state(state, device)
    assert found == {device: state[1]}


def test_the_peak_of_memory_is_seen() -> None:
    devices.reset_peak_memory(CPU)
    before = devices.peak_memory(CPU)
    used = torch.ones(64 << 20, dtype=torch.uint8)
    after = devices.peak_memory(CPU)
    if before is None or after is None:
        pytest.skip("the system does not tell")
    assert after - before > 32 << 20
    del used
    in_use = devices.memory_in_use(CPU)
    assert in_use is None or in_use <= after
    free = devices.free_memory(CPU)
    assert free is None or free > 64 << 20


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "/proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 32000000 kB\n",
        "/sys/fs/cgroup/memory.max": "2000000000\n",
        "/sys/fs/cgroup/memory.current": "500000000\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path: told[str(path)])
    assert devices.free_memory(CPU) == 1_500_000_000
    told["/sys/fs/cgroup/memory.max"] = "max\n"
    told["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = "9223372036854771712"
    told["/sys/fs/cgroup/memory/memory.usage_in_bytes"] = "0"
    assert devices.free_memory(CPU) == 32_768_000_000


def test_what_is_large_on_the_cpu_is_small_elsewhere() -> None:
    other = torch.device("cuda")
    assert devices.loss_rows(CPU, 50257) == 41 and devices.loss_rows(other, 50257) > 2000
    assert devices.token_multiple(CPU) < devices.token_multiple(other)
    assert devices.sums_type(torch.device("mps")) == torch.float32 and devices.sums_type(CPU) == torch.float64


def test_it_is_imported_where_python_has_no_resource_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where nothing tells the peak of memory either."""
    monkeypatch.setitem(sys.modules, "resource", None)
    importlib.reload(devices)
    monkeypatch.setattr(sys, "platform", "win32")

    def missing(path: Path) -> str:
        raise FileNotFoundError(str(path))

    monkeypatch.setattr(Path, "read_text", missing)
    assert devices.peak_memory(CPU) is None and devices.free_memory(CPU) is None
