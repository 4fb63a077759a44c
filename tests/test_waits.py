"""No step that logs nothing reads a number from the device, for which a GPU would have to be waited for."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES
from torch.utils._python_dispatch import TorchDispatchMode

import train
from emoft.config import TrainConfig
from emoft.data.steps import Step
from emoft.distributed.world import World
from emoft.run.run import Run

# Operators whose result the host needs before it goes on: a number, or a size that depends on values.
READS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class Reads(TorchDispatchMode):
    """Counts the reads of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        if name in READS or by_mask:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class AsOnAGpu(Run):
    """A run that looks at its losses as it would on a GPU, where it does not at every step; it counts its reads."""

    reads: list[Counter[str]]

    def steps(self) -> Iterator[Step]:
        self.guard.looks_always = False
        for step in super().steps():
            if self.timetable.logs(step.number) or self.timetable.evaluates(step.number):
                yield step
                continue
            with Reads() as reads:
                yield step
            self.reads.append(reads.found)


CASES = {
    "packed": {},
    "padded": {"batching": "padded"},
    "in bf16": {"mixed_precision": "bf16"},
    "contrast": {"label_contrast": 0.5, "template": "{label}: {text}"},
    "padded contrast": {"label_contrast": 0.5, "template": "{label}: {text}", "batching": "padded"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointed activations": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_a_step_that_logs_nothing_reads_nothing(tmp_path: Path, flags: dict[str, Any]) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in SENTENCES), encoding="utf-8")
    config = TrainConfig(
        model_name_or_path="",
        config_overrides="n_layer=2,n_embd=16,n_head=2",
        vocab_size=300,
        train_file=str(file),
        output_dir=str(tmp_path / "run"),
        max_steps=6,
        logging_steps=6,
        load_best_model_at_end=False,
        use_cpu=True,
        **{"mixed_precision": "no", **flags},
    )
    AsOnAGpu.reads = []
    assert train.train(config, World(), run_class=AsOnAGpu) == 0
    assert AsOnAGpu.reads == [Counter()] * 5


def test_a_read_would_be_seen() -> None:
    with Reads() as reads:
        values = torch.ones(3)
        if values.sum() > 1:
            values[values > 0] = 2.0
    assert reads.found == {"_local_scalar_dense": 1, "index_put_": 1}
