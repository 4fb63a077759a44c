"""Several ranks: the same as one, whatever happens to them. test_torchrun.py adds torchrun itself."""

import functools
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Result, WarmScripts, read_scalars
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_train import flags, history
from training.test_nonfinite import planted

from emoft.distributed.world import World

Run = Callable[..., Result]


class TestShare:
    @given(examples=st.integers(1, 40), size=st.integers(1, 9), batch_size=st.integers(1, 5))
    def test_no_example_is_lost_or_repeated(self, examples: int, size: int, batch_size: int) -> None:
        parts = [World(rank, size).share(range(100, 100 + examples), batch_size) for rank in range(size)]
        assert [i for part in parts for micro_batch in part for i in micro_batch] == list(range(100, 100 + examples))
        assert len({len(part) for part in parts}) == 1, "a collective belongs to each micro-batch"
        counts = [sum(map(len, part)) for part in parts]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] - counts[-1] <= 1
        assert max(len(micro_batch) for part in parts for micro_batch in part) <= batch_size


def apart(ours: Path, theirs: Path) -> float:
    """How far the weights of two runs are apart, relative to their norm."""
    a, b = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    distance = math.hypot(*((a[name].double() - b[name].double()).norm().item() for name in a))
    return distance / math.hypot(*(weight.double().norm().item() for weight in b.values()))


def assert_same(ours: Path, theirs: Path) -> None:
    """Losses, logged figures and final weights are those of another run, but for the rounding of sums."""
    found, expected = history(ours), history(theirs)
    assert len(found) == len(expected)
    for entry, other in zip(found, expected, strict=True):
        assert entry.keys() == other.keys()
        for name, value in other.items():
            is_known = value != [None, None]  # the interval of a single example
            same = pytest.approx(value, rel=1e-6 if "loss" in name else 1e-5) if is_known else value
            assert entry[name] == same, (name, other["step"])
    assert apart(ours, theirs) < 1e-6


# 43 examples, 8 a step: the last step of an epoch has 3, fewer than 4 ranks. 8 to evaluate on, 3 in a batch.
SETTINGS = {
    "num_train_epochs": 2,
    "max_train_samples": 43,
    "per_device_eval_batch_size": 3,
    "template": "{label}: {text}",
    "eval_steps": 5,
    "log_gradients_every": 4,
    "warmup_steps": 3,
}


def words_of(model: Path, train_file: Path, output_dir: str, **settings: object) -> list[str]:
    return flags(model, train_file, output_dir, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def single(scripts: WarmScripts, still_model, train_file, validation_file, tmp_path_factory) -> Callable[[str], Path]:
    """Gives the folder of a run of one process, 8 examples a step, packed or padded."""

    @functools.cache
    def run_once(batching: str) -> Path:
        folder = tmp_path_factory.mktemp("single") / batching
        words = words_of(
            still_model,
            train_file,
            str(folder),
            validation_file=validation_file,
            per_device_train_batch_size=8,
            batching=batching,
            save_steps=3,
            save_total_limit=0,
        )
        result = scripts("train.py", *words, cwd=folder.parent)
        assert result.code == 0, result.err
        return folder

    return run_once


@pytest.mark.parametrize(
    ("batching", "ranks", "parallel", "batch_size", "accumulation"),
    [
        ("packed", 2, "ddp", 2, 2),
        ("packed", 4, "ddp", 2, 1),
        ("packed", 2, "fsdp", 4, 1),
        ("packed", 4, "fsdp", 1, 2),
        ("padded", 2, "ddp", 4, 1),
        ("padded", 2, "fsdp", 2, 2),
    ],
)
def test_several_ranks_follow_one(
    run: Run,
    single,
    still_model,
    train_file,
    validation_file,
    tmp_path,
    batching,
    ranks,
    parallel,
    batch_size,
    accumulation,
) -> None:
    words = words_of(
        still_model,
        train_file,
        "run",
        validation_file=validation_file,
        batching=batching,
        parallel=parallel,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    result = run("train.py", *words, ranks=ranks)
    assert result.codes == (0,) * ranks, result.err
    assert_same(tmp_path / "run", single(batching))
    # Rank 0 alone speaks and writes; the others neither.
    assert result.out.count("saved the model in run") == 1
    assert f"on {ranks} processes" not in result.err
    assert len(list((tmp_path / "run" / "runs").iterdir())) == 1
    # What is measured of gradients is that of the whole batch. AdamW's first steps make much of the rounding of the
    # gradients that are nothing else, such as those of the biases of keys.
    ours, theirs = read_scalars(tmp_path / "run"), read_scalars(single(batching))
    assert ours.keys() == theirs.keys()
    measured = [
        tag
        for tag in theirs
        if tag.split("/")[0] in ("gradient_norm", "weight_norm") or tag.startswith("activation") and accumulation == 1
    ]
    assert len(measured) > 10
    for tag in measured:
        assert ours[tag] == pytest.approx(theirs[tag], rel=1e-4, abs=1e-7), tag


def test_in_half_precision_weights_are_gathered_in_it_and_nothing_else_changes(
    run: Run, still_model, train_file, validation_file, tmp_path
) -> None:
    """FSDP gathers what autocast would convert anyway; losses, samples and weights are those of DDP."""
    (tmp_path / "planted.py").write_text(f"""
import json, os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from torch.nn.modules.module import register_module_forward_hook
types = set()
def look(module, inputs, output):
    if module.training and hasattr(module, "weight"):
        types.add((type(module).__name__, str(module.weight.dtype)))
register_module_forward_hook(look)
import atexit
atexit.register(lambda: json.dump(sorted(types), open("types-" + os.environ["RANK"] + ".json", "w")))
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
    for parallel in ("ddp", "fsdp"):
        words = words_of(
            still_model,
            train_file,
            parallel,
            validation_file=validation_file,
            parallel=parallel,
            mixed_precision="bf16",
            per_device_train_batch_size=4,
            num_train_epochs=1,
        )
        result = run("train.py" if parallel == "ddp" else str(tmp_path / "planted.py"), *words, ranks=2)
        assert result.codes == (0, 0), result.err
    for rank in (0, 1):
        assert json.loads((tmp_path / f"types-{rank}.json").read_text()) == [
            ["Conv1D", "torch.bfloat16"],
            ["Embedding", "torch.float32"],
            ["LayerNorm", "torch.float32"],
        ]
    assert_same(tmp_path / "fsdp", tmp_path / "ddp")


def test_sharded_blocks_are_not_compiled(run: Run, tiny_model, train_file) -> None:
    result = run("train.py", *flags(tiny_model, train_file, parallel="fsdp"), "--torch_compile", ranks=2)
    assert result.codes == (2, 2)
    assert result.error_lines == ["train.py: error: --torch_compile does not go with --parallel fsdp: drop one of them"]


def test_a_checkpoint_resumes_on_any_number_of_ranks(
    run: Run, single, still_model, train_file, validation_file, tmp_path
) -> None:
    """1 -> 2 -> 4 -> 1, with the weights spread in between; the flags are those of the single process throughout."""
    last = single("packed")
    for ranks, parallel, step in ((2, "ddp", 3), (4, "fsdp", 6), (0, "ddp", 9)):
        folder = tmp_path / f"on-{ranks}-from-{step}"
        words = words_of(
            still_model,
            train_file,
            str(folder),
            validation_file=validation_file,
            per_device_train_batch_size=8,
            parallel=parallel,
            save_steps=3,
            save_total_limit=0,
            resume_from_checkpoint=last / f"checkpoint-{step}",
        )
        result = run("train.py", *words, ranks=ranks)
        assert result.code == 0, result.err
        assert_same(folder, single("packed"))
        last = folder


def test_dropout_differs_between_ranks_and_resumes_exactly(run: Run, tiny_model, train_file, tmp_path) -> None:
    words = flags(
        tiny_model, train_file, num_train_epochs=1, per_device_train_batch_size=2, save_steps=5, save_total_limit=0
    )
    whole = run("train.py", *words, ranks=2)
    assert whole.code == 0, whole.err
    (tmp_path / "run").rename(tmp_path / "whole")
    states = torch.load(tmp_path / "whole/checkpoint-5/training_state.pt")["random_states"]
    assert len(states) == 2
    assert not torch.equal(states[0][0], states[1][0])
    resumed = run("train.py", *words, "--resume_from_checkpoint=whole/checkpoint-5", ranks=2)
    assert resumed.code == 0, resumed.err
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "whole"))
    assert ours == theirs


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_is_not_finite_is_found_on_any_rank(run: Run, tiny_model, tmp_path, parallel) -> None:
    text = "so long a text that its positions go beyond the thirtieth, which is where an infinite value stands " * 2
    (tmp_path / "data.txt").write_text("".join(f"short {number};joy\n" for number in range(19)) + text + ";joy\n")
    broken = planted(tiny_model, tmp_path / "broken", "transformer.wpe.weight", (30, slice(None)), math.inf)
    reports = []
    for ranks in (0, 2):
        words = flags(
            broken,
            tmp_path / "data.txt",
            f"on-{ranks}",
            num_train_epochs=1,
            template="{text}",
            parallel=parallel if ranks else "ddp",
            per_device_train_batch_size=2 if ranks else 4,
        )
        result = run("train.py", *words, ranks=ranks)
        assert result.code == 2, result.err
        assert len([line for line in result.error_lines if "not finite" in line]) == 1, result.err
        reports.append(json.loads(next((tmp_path / f"on-{ranks}").glob("nonfinite-*.json")).read_text()))
    one, two = reports
    for name in ("step", "module", "found", "examples", "examples_at_fault", "texts", "values_not_finite"):
        assert one[name] == two[name], name


class TestFailure:
    def plant(self, folder: Path, line: str) -> str:
        """The script as it is, but for a line that runs on rank 1 after its second step."""
        (folder / "planted.py").write_text(f"""
import os, runpy, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import emoft.distributed.heartbeat
from emoft.errors import UserError
from emoft.tracking.tracker import Tracker
emoft.distributed.heartbeat.SILENCE_SECONDS = 5
count_step = Tracker.count_step
def counted(tracker, *arguments, **keywords):
    count_step(tracker, *arguments, **keywords)
    if os.environ["RANK"] == "1" and tracker.run.step == 2:
        {line}
Tracker.count_step = counted
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
        return str(folder / "planted.py")

    def fail(self, run: Run, model: Path, train_file: Path, folder: Path, line: str) -> tuple[Result, float]:
        started = time.monotonic()
        result = run(self.plant(folder, line), *flags(model, train_file, max_steps=1000), ranks=2)
        return result, time.monotonic() - started

    def test_a_fault_ends_all_with_its_own_message(self, run: Run, tiny_model, train_file, tmp_path) -> None:
        result, seconds = self.fail(run, tiny_model, train_file, tmp_path, "raise RuntimeError('planted')")
        assert result.codes == (1, 1)
        assert result.err.count("RuntimeError: planted") == 1
        assert result.err.count("Traceback") == 1, "that of rank 1"
        assert seconds < 30

    def test_what_the_user_can_mend_is_one_line(self, run: Run, tiny_model, train_file, tmp_path) -> None:
        result, seconds = self.fail(run, tiny_model, train_file, tmp_path, "raise UserError('mend it')")
        assert result.codes == (1, 2)
        assert result.error_lines == ["train.py: error: mend it"]
        assert seconds < 30

    def test_a_killed_rank_ends_all(self, run: Run, tiny_model, train_file, tmp_path) -> None:
        result, seconds = self.fail(run, tiny_model, train_file, tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
        assert result.codes == (1, -signal.SIGKILL)
        assert "Traceback" not in result.err
        assert seconds < 30

    def test_a_silent_rank_ends_all(self, scripts, tiny_model, train_file, tmp_path) -> None:
        """As one whose host or link is gone."""
        script = self.plant(tmp_path, "os.kill(os.getpid(), signal.SIGSTOP)")
        first, second = scripts.start(script, *flags(tiny_model, train_file, max_steps=1000), cwd=tmp_path, ranks=2)
        while _is_alive(first):
            time.sleep(0.1)
        os.kill(second, signal.SIGKILL)
        result = scripts.finish()
        assert result.codes[0] == 1
        assert "no sign of life" in "".join(result.error_lines)

    def test_a_rank_that_lives_but_does_not_come_is_waited_for_by_the_step(
        self, run: Run, tiny_model, train_file, tmp_path
    ) -> None:
        """Longer in the first step, which the second rank enters late; it never leaves its second one."""
        (tmp_path / "late.py").write_text(f"""
import os, runpy, sys, time
from datetime import timedelta
sys.path.insert(0, {str(ROOT)!r})
import emoft.distributed.world
from emoft.run.run import Run
emoft.distributed.world.LATER_STEPS = timedelta(seconds=4)
steps = Run.steps
def late(run):
    for step in steps(run):
        if os.environ["RANK"] == "1":
            time.sleep(8 if step.number == 1 else 600 if step.number == 3 else 0)
        yield step
Run.steps = late
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
        words = flags(tiny_model, train_file, max_steps=1000, logging_steps=1, save_steps=2)
        started = time.monotonic()
        result = run(str(tmp_path / "late.py"), *words, ranks=2)
        assert result.codes == (1, 1)
        assert "Timed out waiting 4000ms" in result.err
        assert time.monotonic() - started < 60
        assert (tmp_path / "run/checkpoint-2").is_dir(), "it was waited for in the first step"

    def test_flags_and_data_that_are_wrong_are_one_line(self, run: Run, tiny_model, train_file, tmp_path) -> None:
        wrong = run("train.py", *flags(tiny_model, train_file, learning_rate=-1), ranks=2)
        assert wrong.codes == (2, 2)
        assert len(wrong.error_lines) == 1
        missing = run("train.py", *flags(tiny_model, tmp_path / "missing.txt"), ranks=2)
        assert missing.codes == (2, 2)
        assert len(missing.error_lines) == 1
        assert "missing.txt" in missing.error_lines[0]

    def before_meeting(self, folder: Path, lines: str) -> str:
        """The script as it is, but for what each rank does first."""
        (folder / "planted.py").write_text(f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import emoft.distributed.world
emoft.distributed.world.MEETING_SECONDS = 5
{lines}
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
        return str(folder / "planted.py")

    @pytest.mark.parametrize("missing", [0, 1])
    def test_a_rank_that_never_came_is_not_waited_for(
        self, run: Run, tiny_model, train_file, tmp_path, missing
    ) -> None:
        script = self.before_meeting(
            tmp_path,
            f"""os.environ["LOCAL_RANK"] = "0"  # of a host each
if os.environ["RANK"] == "{missing}":
    sys.exit(3)
""",
        )
        result = run(script, *flags(tiny_model, train_file), ranks=2)
        assert sorted(result.codes) == [2, 3]
        (line,) = result.error_lines
        assert "not all 2 processes are there" in line
        assert not (tmp_path / "run").exists()

    def test_each_host_tells_of_its_own_flags(self, run: Run, tiny_model, train_file, tmp_path) -> None:
        """The processes as the first of a host each, where a file is missing on the second one."""
        (tmp_path / "there.yaml").write_text("max_steps: 1\n")
        script = self.before_meeting(
            tmp_path,
            """os.environ["LOCAL_RANK"] = "0"
if os.environ["RANK"] == "1":
    sys.argv[-1] = "missing.yaml"
""",
        )
        result = run(script, *flags(tiny_model, train_file), "--config", "there.yaml", ranks=2)
        assert result.codes == (2, 2)
        assert any("--config missing.yaml" in line for line in result.error_lines), result.err
        assert "Traceback" not in result.err

    def test_sharding_needs_torchrun(self, run: Run, tiny_model, train_file) -> None:
        result = run("train.py", *flags(tiny_model, train_file, parallel="fsdp"))
        assert result.code == 2
        assert "torchrun" in result.error_lines[0]

    def test_another_batch_is_no_resume(self, run: Run, tiny_model, train_file) -> None:
        words = flags(tiny_model, train_file, max_steps=2, save_steps=1)
        assert run("train.py", *words).code == 0
        again = [*words, "--resume_from_checkpoint=latest", "--per_device_train_batch_size=8"]
        result = run("train.py", *again, ranks=2)
        assert result.code == 2
        assert "4 examples a step" in result.error_lines[0]


def _is_alive(process: int) -> bool:
    """Whether a process that is not our own child runs: a zombie, which waits to be asked for its end, does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_signal_to_any_rank_saves_one_whole_checkpoint(
    scripts: WarmScripts, tiny_model, train_file, validation_file, tmp_path
) -> None:
    words = flags(tiny_model, train_file, validation_file=validation_file, num_train_epochs=300, eval_steps=7)
    processes = scripts.start("train.py", *words, cwd=tmp_path, ranks=2)
    while not list(tmp_path.glob("run/runs/*")):
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(processes[1], signal.SIGTERM)
    result = scripts.finish()
    assert result.codes == (143, 143), result.err
    assert "--resume_from_checkpoint latest" in result.out
    assert len(list(tmp_path.glob("run/checkpoint-*"))) >= 1
    resumed = scripts("train.py", *words, "--resume_from_checkpoint=latest", "--max_steps=1", cwd=tmp_path)
    assert "max_steps" in resumed.err, "whole, and refused for its flags only"
