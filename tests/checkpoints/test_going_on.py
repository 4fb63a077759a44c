"""Runs that are taken up again, stopped early, moved, or given other data: what is exported, and what is said of it."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result, WarmScripts
from test_train import flags, history

Run = Callable[..., Result]


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def evaluated(run: Run, model: str, file: Path) -> float:
    """The loss that the exported model really has."""
    words = [
        "--model_name_or_path",
        model,
        "--test_file",
        file,
        "--delimiter",
        ";",
        "--mixed_precision",
        "no",
        "--json",
    ]
    result = run("-m", "emoft.evaluate", *words)
    assert result.code == 0, result.err
    return json.loads(result.out)["loss"]


class TestEarlyStop:
    @pytest.fixture
    def words(self, tiny_model: Path, train_file: Path, validation_file: Path) -> list[str]:
        """A rate so high that the first evaluation is the best; a save at each."""
        return flags(
            tiny_model,
            train_file,
            validation_file=validation_file,
            max_steps=30,
            eval_steps=2,
            save_steps=2,
            learning_rate=0.5,
            warmup_steps=0,
            early_stopping_patience=2,
            load_best_model_at_end="true",
        )

    def test_the_same_command_again_gives_the_same_model(self, run: Run, words: list[str], tmp_path: Path) -> None:
        first = run("train.py", *words)
        assert first.code == 0, first.err
        assert "stopped early" in first.out
        model, figures = weights(tmp_path / "run"), results(tmp_path / "run")
        again = run("train.py", *words, "--resume_from_checkpoint=latest")
        assert again.code == 0, again.err
        assert "stopped early" in again.out
        assert weights(tmp_path / "run") == model
        kept = {name for name in figures if not name.startswith("train_")}
        assert {name: figures[name] for name in kept} == {name: results(tmp_path / "run")[name] for name in kept}

    def test_more_patience_goes_on(self, run: Run, words: list[str], tmp_path: Path) -> None:
        assert run("train.py", *words).code == 0
        stopped_at = max(entry["step"] for entry in history(tmp_path / "run"))
        more = run("train.py", *words, "--resume_from_checkpoint=latest", "--early_stopping_patience=4")
        assert more.code == 0, more.err
        assert max(entry["step"] for entry in history(tmp_path / "run")) > stopped_at


class TestFiguresAreOfTheExportedModel:
    @pytest.fixture
    def words(self, still_model: Path, train_file: Path, validation_file: Path) -> list[str]:
        """A run whose best evaluation is an early one."""
        return flags(
            still_model,
            train_file,
            validation_file=validation_file,
            max_steps=8,
            eval_steps=2,
            save_steps=2,
            save_total_limit=0,
            learning_rate=3.0,
            lr_scheduler_type="constant",
            warmup_steps=6,  # until it runs away
            max_grad_norm=0,
            load_best_model_at_end="true",
        )

    @pytest.mark.parametrize("harm", ["missing", "damaged", "elsewhere", "none"])
    def test_whatever_became_of_the_best(
        self, run: Run, words: list[str], tmp_path: Path, validation_file: Path, harm: str
    ) -> None:
        assert run("train.py", *words).code == 0
        best = min((e["eval_loss"], e["step"]) for e in history(tmp_path / "run") if "eval_loss" in e and e["step"])[1]
        assert best < 8, "the test needs an early best"
        checkpoint = tmp_path / f"run/checkpoint-{best}"
        if harm == "missing":
            shutil.rmtree(checkpoint)
        elif harm == "damaged":
            (checkpoint / "model.safetensors").write_bytes(b"torn")
        name = "other" if harm == "elsewhere" else "run"
        again = run("train.py", *words, "--resume_from_checkpoint=run/checkpoint-8", f"--output_dir={name}")
        assert again.code == 0, again.err
        found = results(tmp_path / name)
        assert found["eval_loss"] == pytest.approx(evaluated(run, name, validation_file), rel=1e-5)
        if harm in ("elsewhere", "none"):
            assert f"took the model of step {best}, the best" in again.out
        else:
            assert f"checkpoint-{best} is {harm}" in again.err

    def test_other_validation_data(
        self, run: Run, words: list[str], tmp_path: Path, train_file: Path, validation_file: Path
    ) -> None:
        assert run("train.py", *words).code == 0
        others = tmp_path / "others.txt"
        others.write_text("".join(f"{line} too;joy\n" for line in ("quite another text", "and one more", "the last")))
        again = run("train.py", *words, "--resume_from_checkpoint=run/checkpoint-4", f"--validation_file={others}")
        assert again.code == 0, again.err
        assert "the validation data are not those of before" in again.err
        assert results(tmp_path / "run")["eval_loss"] == pytest.approx(evaluated(run, "run", others), rel=1e-5)
        ended = run(
            "train.py", *words, "--resume_from_checkpoint=run/checkpoint-8", f"--validation_file={validation_file}"
        )
        assert ended.code == 0, ended.err
        assert results(tmp_path / "run")["eval_loss"] == pytest.approx(evaluated(run, "run", validation_file), rel=1e-5)

    def test_the_same_data_under_another_name_are_the_same(
        self, run: Run, words: list[str], tmp_path: Path, validation_file: Path
    ) -> None:
        assert run("train.py", *words).code == 0
        moved = Path(shutil.copy(validation_file, tmp_path / "moved.txt"))
        again = run("train.py", *words, "--resume_from_checkpoint=run/checkpoint-4", f"--validation_file={moved}")
        assert again.code == 0, again.err
        assert "not those of before" not in again.err


def test_an_old_checkpoint_does_not_say_what_it_was_evaluated_on(
    run: Run, tiny_model: Path, train_file: Path, validation_file: Path, tmp_path: Path
) -> None:
    from emoft.checkpoints.manifest import write_manifest

    words = flags(tiny_model, train_file, validation_file=validation_file, max_steps=4, eval_steps=2, save_steps=2)
    assert run("train.py", *words).code == 0
    checkpoint = tmp_path / "run/checkpoint-2"
    state = torch.load(checkpoint / "training_state.pt", weights_only=True)
    del state["validation_checksum"], state["precision"], state["run"]["other_validation_until"]
    torch.save(state, checkpoint / "training_state.pt")
    write_manifest(checkpoint, 2)
    again = run("train.py", *words, f"--resume_from_checkpoint={checkpoint}")
    assert again.code == 0, again.err
    assert again.error_lines == []


def test_another_precision_is_told(run: Run, tiny_model: Path, train_file: Path, tmp_path: Path) -> None:
    """`auto` takes what the processor has: the run goes on, says so, and names the flag that keeps it, which does."""
    from emoft.checkpoints.manifest import write_manifest
    from emoft.training.precision import Precision

    words = flags(tiny_model, train_file, max_steps=2, save_steps=1)
    words = [word for word in words if "mixed_precision" not in word]
    assert run("train.py", *words).code == 0
    here = Precision("auto", torch.device("cpu")).name
    begun = {"bf16": "no", "no": "bf16"}[here]
    checkpoint = tmp_path / "run/checkpoint-1"  # as another processor would have written it
    state = torch.load(checkpoint / "training_state.pt", weights_only=True)
    torch.save({**state, "precision": begun}, checkpoint / "training_state.pt")
    write_manifest(checkpoint, 1)
    words += [f"--resume_from_checkpoint={checkpoint}"]
    again = run("train.py", *words)
    assert again.code == 0, again.err
    assert f"begun in {begun} and goes on in {here}" in again.err and f"--mixed_precision {begun} keeps it" in again.err
    kept = run("train.py", *words, "--mixed_precision", begun)
    assert (kept.code, kept.error_lines) == (0, []), kept.err
    assert f"({begun})" in kept.out
    other = run("train.py", *words, "--mixed_precision", here)
    assert other.code == 2
    assert f"--mixed_precision auto, which was {begun}, not {here}" in other.error_lines[-1]


@pytest.mark.parametrize("name", ["checkpoint-2-good", "my copy", "checkpoint-2.bak", "best"])
def test_a_copy_of_a_checkpoint(run: Run, tiny_model: Path, train_file: Path, tmp_path: Path, name: str) -> None:
    words = flags(tiny_model, train_file, max_steps=4, save_steps=2)
    assert run("train.py", *words).code == 0
    model = weights(tmp_path / "run")
    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "run" / name)
    again = run("train.py", *words, f"--resume_from_checkpoint=run/{name}")
    assert again.code == 0, again.err
    assert weights(tmp_path / "run") == model


@pytest.mark.parametrize("how", ["itself", "a checkpoint in it", "a link to it", "its tokenizer"])
def test_nothing_is_deleted_that_the_run_starts_from(
    run: Run, tiny_model: Path, train_file: Path, tmp_path: Path, how: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    shutil.copytree(tiny_model, tmp_path / "m/checkpoint-5")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    base = {"itself": "m", "a checkpoint in it": "m/checkpoint-5", "a link to it": "link", "its tokenizer": "m"}[how]
    words = flags(base, train_file, "m", max_steps=1, overwrite_output_dir="true")
    if how == "its tokenizer":
        words = flags("", train_file, "m", max_steps=1, tokenizer_name=base, overwrite_output_dir="true")
    refused = run("train.py", *words)
    assert refused.code == 2
    assert "would delete --" in refused.error_lines[-1]
    assert (tmp_path / "m/model.safetensors").exists() and (tmp_path / "m/checkpoint-5").exists()


def test_a_saved_checkpoint_is_there(scripts: WarmScripts, tiny_model: Path, train_file: Path, tmp_path: Path) -> None:
    """The newest was damaged, the run went on from the one before, and was stopped at once."""
    words = flags(tiny_model, train_file, max_steps=3000, save_steps=2, save_total_limit=2)
    (process,) = scripts.start("train.py", *words, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("checkpoint-1?")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process, signal.SIGTERM)
    assert scripts.finish().code == 143
    newest = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (newest / "model.safetensors").write_bytes(b"torn")
    (process,) = scripts.start("train.py", *words, "--resume_from_checkpoint=latest", cwd=tmp_path)
    while "resuming from" not in scripts.files["stdout"].read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process, signal.SIGTERM)
    stopped = scripts.finish()
    if stopped.code == 143 and "and saved " in stopped.out:
        saved = stopped.out.split("and saved ")[1].split(";")[0]
        assert (tmp_path / saved).is_dir(), stopped.out
