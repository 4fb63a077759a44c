"""Runs that are killed, damaged, or out of space, and what is left of them."""

import json
import os
import pickle
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Result, WarmScripts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kills import Killer
from safetensors.torch import load_file
from test_train import flags, history

from emoft.checkpoints.folder import save_checkpoint, sweep
from emoft.checkpoints.manifest import damage, write_manifest
from emoft.checkpoints.search import find_checkpoint
from emoft.config import TrainConfig
from emoft.distributed.world import World
from emoft.errors import UserError
from emoft.files import MANIFEST_FILE


def test_killed_runs_end_like_the_undisturbed_one(scripts: WarmScripts, tmp_path: Path) -> None:
    """The short form of kills.py, which does a hundred."""
    killer = Killer(scripts, tmp_path / "kills")
    expected = killer.undisturbed()
    for seed in range(1):
        found, kills = killer.disturbed(seed)
        assert found == expected, kills


class TestExactness:
    @pytest.mark.parametrize(
        ("precision", "batching"),
        [("no", "packed"), ("no", "padded"), ("bf16", "packed"), ("bf16", "padded"), ("fp16", "packed")],
    )
    def test_a_resumed_run_ends_with_the_same_bits(
        self, scripts, tmp_path, tiny_model, train_file, validation_file, batching, precision
    ) -> None:
        words = flags(
            tiny_model,
            train_file,
            validation_file=validation_file,
            max_steps=11,  # the second epoch begins after step 8
            save_steps=7,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=3,
            eval_steps=5,
            save_total_limit=0,
            batching=batching,
            mixed_precision=precision,
        )
        whole = scripts("train.py", *words, cwd=tmp_path)
        assert whole.code == 0, whole.err
        (tmp_path / "run").rename(tmp_path / "whole")
        (tmp_path / "run").mkdir()
        (tmp_path / "whole/checkpoint-7").rename(tmp_path / "run/checkpoint-7")
        resumed = scripts("train.py", *words, "--resume_from_checkpoint=latest", cwd=tmp_path)
        assert resumed.code == 0, resumed.err
        ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "whole"))
        assert ours == theirs
        assert history(tmp_path / "run") == history(tmp_path / "whole")
        assert resumed.out.splitlines()[-3] == whole.out.splitlines()[-3], "the sample text"

    def test_changed_flags_are_refused_with_their_difference(
        self, run: Callable[..., Result], tmp_path, tiny_model, train_file, validation_file
    ) -> None:
        words = flags(tiny_model, train_file, max_steps=2, save_steps=1)
        assert run("train.py", *words).code == 0
        more = [*words, "--resume_from_checkpoint=latest"]
        refused = run("train.py", *more, "--seed=7", "--learning_rate=0.5")
        assert refused.code == 2
        assert "--learning_rate 0.001, not 0.5" in refused.error_lines[-1]
        assert "--seed 42, not 7" in refused.error_lines[-1]
        other = run("train.py", *more, f"--train_file={validation_file}")
        assert other.code == 2
        assert f"--train_file {train_file}, not {validation_file}" in other.error_lines[-1]
        moved = tmp_path / "elsewhere.txt"
        moved.write_bytes(train_file.read_bytes())
        assert run("train.py", *more, f"--train_file={moved}", "--save_steps=5").code == 0, "the same texts"
        moved.write_bytes(train_file.read_bytes().replace(b"happy", b"hoppy"))
        changed = run("train.py", *more, f"--train_file={moved}")
        assert changed.code == 2
        assert "other texts" in changed.error_lines[-1]


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(scripts: WarmScripts, tmp_path_factory, tiny_model, train_file) -> Path:
    folder = tmp_path_factory.mktemp("two")
    assert scripts("train.py", *flags(tiny_model, train_file, max_steps=2, save_steps=1), cwd=folder).code == 0
    return folder / "run"


FILES = (
    "config.json",
    "emoft.json",
    "generation_config.json",
    "manifest.json",
    "merges.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_state.pt",
    "vocab.json",
)


class TestDamage:
    def test_the_list_of_files_is_complete(self, two_checkpoints: Path) -> None:
        assert tuple(sorted(os.listdir(two_checkpoints / "checkpoint-2"))) == FILES
        assert damage(two_checkpoints / "checkpoint-1") == damage(two_checkpoints / "checkpoint-2") == ""

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_every_damage_is_found_and_the_one_before_taken(self, two_checkpoints: Path, data: st.DataObject) -> None:
        newest, before = two_checkpoints / "checkpoint-2", two_checkpoints / "checkpoint-1"
        path = newest / data.draw(st.sampled_from(FILES))
        content = path.read_bytes()
        kind = data.draw(st.sampled_from(["truncated", "flipped", "missing", "empty", "swapped", "longer"]))
        if kind == "truncated":
            harm = content[: data.draw(st.integers(0, len(content) - 1))]
        elif kind == "flipped":
            place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
            harm = content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]
        elif kind == "swapped":
            harm = (before / path.name).read_bytes()
        else:
            harm = {"missing": None, "empty": b"", "longer": content + b"\n"}[kind]
        if harm == content:
            return  # both checkpoints have the same tokenizer
        try:
            if harm is None:
                path.unlink()
            else:
                path.write_bytes(harm)
            assert damage(newest)
            config = TrainConfig(output_dir=str(two_checkpoints), resume_from_checkpoint="latest")
            assert find_checkpoint(config, World()) == before
            with pytest.raises(UserError, match="checkpoint-2 is"):
                find_checkpoint(TrainConfig(output_dir="x", resume_from_checkpoint=str(newest)), World())
        finally:
            path.write_bytes(content)
        assert damage(newest) == ""

    def test_whole_checkpoints_that_changed_places(self, two_checkpoints: Path) -> None:
        first, second, third = (two_checkpoints / f"checkpoint-{n}" for n in (1, 2, 3))
        first.rename(third)
        try:
            assert "step 1" in damage(third)
            config = TrainConfig(output_dir=str(two_checkpoints), resume_from_checkpoint="latest")
            assert find_checkpoint(config, World()) == second
        finally:
            third.rename(first)

    def test_a_run_says_that_it_fell_back(self, run, tmp_path, two_checkpoints, tiny_model, train_file) -> None:
        shutil.copytree(two_checkpoints, tmp_path / "run")
        (tmp_path / "run/checkpoint-2/model.safetensors").write_bytes(b"torn")
        result = run(
            "train.py", *flags(tiny_model, train_file, max_steps=2, save_steps=1), "--resume_from_checkpoint=latest"
        )
        assert result.code == 0, result.err
        assert "checkpoint-2 is damaged" in result.err
        assert "resuming from run/checkpoint-1" in result.out
        assert (tmp_path / "run/model.safetensors").read_bytes() == (two_checkpoints / "model.safetensors").read_bytes()

    def test_what_a_killed_run_left_is_swept(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, 3, lambda folder: (folder / "x").touch(), {})
        (tmp_path / ".staging-4").mkdir()
        (tmp_path / ".staging-4/half").touch()
        (tmp_path / ".all_results.json.tmp").touch()
        os.replace(tmp_path / "checkpoint-3", tmp_path / ".aside-3")  # killed between two renames
        sweep(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["checkpoint-3"]
        assert damage(tmp_path / "checkpoint-3") == ""

    def test_a_manifest_of_another_kind(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path, 3, lambda folder: (folder / "x").touch(), {})
        for text in ("", "[]", "{}", '{"files": {"../../etc/passwd": {}}, "step": 3}', "null"):
            (tmp_path / "checkpoint-3" / MANIFEST_FILE).write_text(text)
            assert damage(tmp_path / "checkpoint-3")


# ---- No space --------------------------------------------------------------------------------------------------------

# The script as it is, in a process that from some step on cannot write files beyond a size.
LIMITED = f"""
import os, resource, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from emoft.tracking.tracker import Tracker
count_step = Tracker.count_step
def counted(self, *arguments, **keywords):
    count_step(self, *arguments, **keywords)
    first, last, size = map(int, os.environ["LIMIT"].split())
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size if first <= self.run.step <= last else whole, whole))
Tracker.count_step = counted
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


class TestNoSpace:
    def limited(self, run, tmp_path: Path, words: list[str], limit: str) -> Result:
        (tmp_path / "limited.py").write_text(LIMITED)
        return run(str(tmp_path / "limited.py"), *words, LIMIT=limit)

    def test_a_failed_save_stops_nothing_and_is_tried_again(self, run, tmp_path, tiny_model, train_file) -> None:
        words = flags(tiny_model, train_file, max_steps=12, save_steps=3, save_total_limit=0)
        result = self.limited(run, tmp_path, words, "5 7 20000")  # the model has 170,000 bytes
        assert result.code == 0, result.err
        assert "cannot save in run" in result.err
        assert "Traceback" not in result.err
        steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
        assert steps == [3, 8, 9, 12], "that of step 6 failed, at 7 again, and at 8 there was space"
        assert not [damage(path) for path in (tmp_path / "run").glob("checkpoint-*") if damage(path)]

    def test_the_event_file(self, run, tmp_path, tiny_model, train_file) -> None:
        words = flags(tiny_model, train_file, max_steps=30, log_gradients_every=1)
        result = self.limited(run, tmp_path, words, "5 25 20000")
        assert result.code == 0, result.err
        assert "event file" in result.err
        assert "Traceback" not in result.err
        assert len(history(tmp_path / "run")) == 30

    def test_the_last_save(self, run, tmp_path, tiny_model, train_file) -> None:
        words = flags(tiny_model, train_file, max_steps=4, save_steps=2)
        result = self.limited(run, tmp_path, words, "4 99 20000")
        assert result.code == 2
        assert "cannot save in run" in result.error_lines[-1]
        assert "Traceback" not in result.err
        assert damage(tmp_path / "run/checkpoint-2") == ""
        assert not (tmp_path / "run/model.safetensors").exists()

    def test_a_signal_without_space(self, run, scripts, tmp_path, tiny_model, train_file) -> None:
        (tmp_path / "limited.py").write_text(LIMITED)
        words = flags(tiny_model, train_file, max_steps=100_000)
        (process,) = scripts.start(str(tmp_path / "limited.py"), *words, cwd=tmp_path, LIMIT="1 999999 20000")
        wait_for(tmp_path / "run/runs")
        time.sleep(1)
        os.kill(process, signal.SIGTERM)
        result = scripts.finish()
        assert result.code == 2
        assert "could not be saved" in result.error_lines[-1]


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.05)


# ---- Signals, locks, links -------------------------------------------------------------------------------------------

# The script as it is, but telling of each evaluation as soon as it begins, and once.
TELLING = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import emoft.terminal
emoft.terminal.DELAY_SECONDS, emoft.terminal.SILENCE_SECONDS = 0, 3600
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


def wait_for_evaluation(scripts: WarmScripts, number: int) -> None:
    """Wait until a run of TELLING is in its so manieth evaluation."""
    deadline = time.monotonic() + 60
    while scripts.files["stderr"].read_text(errors="replace").count("Evaluating ... ") < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_signal_in_the_middle_of_an_evaluation(scripts, tmp_path, tiny_model, train_file) -> None:
    """It is left to the resumed run, which ends as if nothing had been."""
    (tmp_path / "telling.py").write_text(TELLING)
    (tmp_path / "many.txt").write_text("\n".join(f"i feel number {n};joy" for n in range(500)) + "\n")
    words = flags(
        tiny_model,
        train_file,
        validation_file=tmp_path / "many.txt",
        max_steps=6,
        eval_steps=3,
        per_device_eval_batch_size=1,
        max_eval_samples=500,
    )
    # The resumed run is stopped in the same evaluation; the one before the first step is not its.
    for more, number in (([], 2), (["--resume_from_checkpoint=latest"], 1)):
        (process,) = scripts.start(str(tmp_path / "telling.py"), *words, *more, cwd=tmp_path)
        wait_for_evaluation(scripts, number)
        os.kill(process, signal.SIGTERM)
        stopped = scripts.finish()
        assert stopped.code == 143, stopped.err
        assert "after step 3 and saved run/checkpoint-3" in stopped.out
        state = json.loads((tmp_path / "run/checkpoint-3/trainer_state.json").read_text())
        assert not any("eval_loss" in entry and entry["step"] for entry in state["log_history"])
    resumed = scripts("train.py", *words, "--resume_from_checkpoint=latest", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    whole = scripts("train.py", *words, "--output_dir=whole", cwd=tmp_path)
    assert whole.code == 0
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_signal_in_the_evaluation_before_the_first_step(scripts, tmp_path, tiny_model, train_file) -> None:
    (tmp_path / "telling.py").write_text(TELLING)
    (tmp_path / "many.txt").write_text("\n".join(f"i feel number {n};joy" for n in range(500)) + "\n")
    words = flags(
        tiny_model, train_file, validation_file=tmp_path / "many.txt", max_steps=2, per_device_eval_batch_size=1
    )
    (process,) = scripts.start(str(tmp_path / "telling.py"), *words, cwd=tmp_path)
    wait_for_evaluation(scripts, 1)
    os.kill(process, signal.SIGINT)
    stopped = scripts.finish()
    assert stopped.code == 130, stopped.err
    told, command = stopped.out.splitlines()[-2:]
    assert told == "stopped by SIGINT before the first step, with nothing to save yet; to start, run:"
    assert not list(tmp_path.glob("run/checkpoint-*"))
    python, script, *again = shlex.split(command)
    assert Path(shutil.which(python) or "") == Path(sys.executable)
    started = scripts(script, *again, "--max_eval_samples=1", cwd=tmp_path)
    assert started.code == 0, started.err


def test_a_second_run_is_kept_out_but_not_by_a_dead_one(run, scripts, tmp_path, tiny_model, train_file) -> None:
    words = flags(tiny_model, train_file, max_steps=100_000, save_steps=5)
    (process,) = scripts.start("train.py", *words, cwd=tmp_path)
    wait_for(tmp_path / "run/checkpoint-5")
    other = WarmScripts(tmp_path)
    refused = other("train.py", *words, "--resume_from_checkpoint=latest", cwd=tmp_path)
    assert refused.code == 2
    assert "in use by another run" in refused.error_lines[-1]
    os.kill(process, signal.SIGKILL)
    scripts.finish()
    words = flags(tiny_model, train_file, max_steps=100_000, save_steps=5, resume_from_checkpoint="latest")
    (process,) = other.start("train.py", *words, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while "resuming from" not in other.files["stdout"].read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    other.finish()
    other.close()


def test_a_link_as_output_folder(run, tmp_path, tiny_model, train_file) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    words = flags(tiny_model, train_file, max_steps=2, save_steps=1)
    assert run("train.py", *words).code == 0
    assert run("train.py", *words, "--overwrite_output_dir").code == 0
    assert (tmp_path / "run").is_symlink()
    assert damage(tmp_path / "real/checkpoint-2") == ""


def test_another_file_system(run, tmp_path, tiny_model, train_file) -> None:
    if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    folder = tempfile.mkdtemp(dir="/dev/shm")
    try:
        words = flags(tiny_model, train_file, f"{folder}/run", max_steps=2, save_steps=1)
        assert run("train.py", *words).code == 0
        assert damage(Path(folder) / "run/checkpoint-2") == ""
    finally:
        shutil.rmtree(folder)


# ---- Strangers -------------------------------------------------------------------------------------------------------


class Malice:
    """Unpickled, it writes a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


class TestStrangers:
    def test_the_marker_would_be_written(self, tmp_path: Path) -> None:
        pickle.loads(pickle.dumps(Malice(tmp_path / "marker")))
        assert (tmp_path / "marker").exists()

    def test_a_pickle_as_training_state(self, run, tmp_path, two_checkpoints, tiny_model, train_file) -> None:
        shutil.copytree(two_checkpoints, tmp_path / "run")
        checkpoint = tmp_path / "run/checkpoint-2"
        words = [*flags(tiny_model, train_file, max_steps=2, save_steps=1), "--resume_from_checkpoint=latest"]
        for write in (
            lambda path: path.write_bytes(pickle.dumps(Malice(tmp_path / "marker"))),
            lambda path: torch.save({"config": Malice(tmp_path / "marker")}, path),
        ):
            write(checkpoint / "training_state.pt")
            write_manifest(checkpoint, 2)  # a stranger knows how to make a manifest too
            result = run("train.py", *words)
            assert result.code == 2
            assert len(result.error_lines) == 1
            assert not (tmp_path / "marker").exists()

    def test_a_pickle_as_weights(self, run, tmp_path, tiny_model, train_file) -> None:
        shutil.copytree(tiny_model, tmp_path / "model")
        (tmp_path / "model/model.safetensors").unlink()
        torch.save({"x": Malice(tmp_path / "marker")}, tmp_path / "model/pytorch_model.bin")
        for script, words in (
            ("train.py", flags(tmp_path / "model", train_file, max_steps=1)),
            ("generate.py", ["--model_name_or_path", tmp_path / "model"]),
        ):
            result = run(script, *words)
            assert result.code == 2
            assert "save_pretrained" in result.error_lines[-1], "how to convert it"
            assert len(result.error_lines) == 1
        assert not (tmp_path / "marker").exists()

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "emoft.json"])
    def test_a_pickle_as_anything_else(self, run, tmp_path, tiny_model, train_file, name: str) -> None:
        shutil.copytree(tiny_model, tmp_path / "model")
        (tmp_path / "model" / name).write_bytes(pickle.dumps(Malice(tmp_path / "marker")))
        result = run("train.py", *flags(tmp_path / "model", train_file, max_steps=1))
        assert result.code in (0, 2), result.err
        assert not (tmp_path / "marker").exists()

    def test_yaml_that_would_run_code(self, run, tmp_path) -> None:
        marker = tmp_path / "marker"
        (tmp_path / "flags.yaml").write_text(f"seed: !!python/object/apply:pathlib.Path.touch [{marker}]\n")
        result = run("train.py", "--config=flags.yaml")
        assert result.code == 2
        assert len(result.error_lines) == 1
        assert not marker.exists()

    def test_labels_never_become_paths(self, run, tmp_path, tiny_model) -> None:
        (tmp_path / "data.txt").write_text("i feel it;../../escape\nand so on;/tmp/escape\n" * 8)
        words = flags(
            tiny_model,
            "data.txt",
            max_steps=2,
            save_steps=1,
            template="{label}: {text}",
            sample_every=1,
            log_gradients_every=1,
        )
        before = set(tmp_path.parent.rglob("*escape*"))
        assert run("train.py", *words).code == 0
        assert set(tmp_path.parent.rglob("*escape*")) == before
        assert load_file(tmp_path / "run/model.safetensors")
