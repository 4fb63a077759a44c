"""The loop in train.py, against transformers.Trainer and by its own promises."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Result, WarmScripts, environment, run_fresh
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from emoft.data.batching import epoch_batches

STEPS = 50
TOLERANCE = 1e-5  # relative
SETTINGS = {"learning_rate": 1e-3, "warmup_steps": 5, "max_grad_norm": 1.0, "max_steps": STEPS, "logging_steps": 1}


def train_losses(output_dir: Path) -> list[float]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference = tensor - theirs[name]
        if name.endswith("c_attn.bias"):
            # The bias of the keys adds the same to all scores of a query, which softmax does not see: its gradient is
            # nothing but rounding, and AdamW makes full steps of it. Such steps are below 1e-5 by themselves.
            assert difference.abs().max() <= TOLERANCE
            difference = torch.cat([difference.chunk(3)[0], difference.chunk(3)[2]])
        assert difference.norm() <= TOLERANCE * theirs[name].norm(), name


@pytest.fixture(scope="module")
def trainer(
    tmp_path_factory: pytest.TempPathFactory, still_model: Path, train_file: Path
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of the tutorial's own way: Trainer, its collator, text padded to 64 tokens."""
    tokenizer = GPT2Tokenizer.from_pretrained(still_model)
    tokenizer.pad_token = tokenizer.eos_token
    texts = [line.rsplit(";", 1)[0] for line in train_file.read_text().splitlines()]
    order = [i for epoch in range(5) for batch in epoch_batches(len(texts), 4, 42, epoch) for i in batch]
    rows = tokenizer([f"Emotion: {texts[i]}" for i in order], truncation=True, padding="max_length", max_length=64)

    class InOurOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    model = GPT2LMHeadModel.from_pretrained(still_model)
    # Trainer (5.23) knows by this name that the loss shifts its labels. GPT2LMHeadModel does not set it, and then
    # the summed loss is divided by a token a row too many, the first one, which is no target.
    model.loss_type = "ForCausalLM"
    trainer = InOurOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path_factory.mktemp("trainer")),
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **SETTINGS,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False),
        train_dataset=Dataset.from_dict(dict(rows)),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    folder = tmp_path_factory.mktemp("trained")
    trainer.model.save_pretrained(folder)
    return losses, weights(folder)


class TestParity:
    """The same order of the data, initial weights and settings give the Trainer's losses and weights."""

    SHAPES = [(4, 1), (2, 2), (1, 4)]  # examples in a micro-batch x micro-batches in a step

    def flags(
        self, model: Path, train_file: Path, batch_size: int, accumulation: int, batching: str = "packed"
    ) -> list[object]:
        settings = {
            **SETTINGS,
            "model_name_or_path": model,
            "train_file": train_file,
            "delimiter": ";",
            "append_eos": "false",
            "mixed_precision": "no",
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
            "batching": batching,
            "save_steps": 0,
            "output_dir": "run",
        }
        return [f"--{name}={value}" for name, value in settings.items()]

    @pytest.mark.parametrize("batching", ["packed", "padded"])
    @pytest.mark.parametrize(("batch_size", "accumulation"), SHAPES)
    def test_losses_and_weights_are_the_trainers(
        self, trainer, run: Callable[..., Result], still_model, train_file, tmp_path, batch_size, accumulation, batching
    ) -> None:
        result = run("train.py", *self.flags(still_model, train_file, batch_size, accumulation, batching))
        assert result.code == 0, result.err
        losses, final = trainer
        assert len(losses) == STEPS
        assert train_losses(tmp_path / "run") == pytest.approx(losses, rel=TOLERANCE)
        assert_same_weights(weights(tmp_path / "run"), final)

    def test_a_mean_of_means_is_noticed(
        self, trainer, run: Callable[..., Result], still_model, train_file, tmp_path
    ) -> None:
        """The comparison above must fail for the usual mistake: each micro-batch divided by its own tokens."""
        source = (ROOT / "train.py").read_text()
        right = "losses.sum() / step.tokens"
        assert source.count(right) == 1
        wrong = "losses.sum() / batch.target_tokens / len(step.micro_batches)"
        (tmp_path / "train.py").write_text(source.replace(right, wrong))
        (tmp_path / "emoft").symlink_to(ROOT / "emoft")
        result = run(tmp_path / "train.py", *self.flags(still_model, train_file, 1, 4))
        assert result.code == 0, result.err
        assert train_losses(tmp_path / "run") != pytest.approx(trainer[0], rel=100 * TOLERANCE)


def flags(model: Path, train_file: Path, output_dir: str = "run", **settings: object) -> list[str]:
    """A short run in float32 over the 48 messages: 12 steps an epoch at batch size 4."""
    values = {
        "model_name_or_path": model,
        "train_file": train_file,
        "delimiter": ";",
        "mixed_precision": "no",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 0,
        "output_dir": output_dir,
        **settings,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def history(output_dir: Path) -> list[dict[str, float]]:
    return [e for e in json.loads((output_dir / "trainer_state.json").read_text())["log_history"] if "step" in e]


class TestCompiled:
    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
    def test_computes_the_same_and_compiles_once(self, run, tmp_path, still_model, train_file, validation_file) -> None:
        words = flags(
            still_model,
            train_file,
            validation_file=validation_file,
            max_steps=30,
            log_gradients_every=10,
            per_device_train_batch_size=3,
        )
        plain = run("train.py", *words, "--output_dir", "plain")
        assert plain.code == 0, plain.err
        compiled = run_fresh(
            "train.py", *words, "--torch_compile", cwd=tmp_path, TORCH_LOGS="recompiles", **environment(tmp_path)
        )
        assert compiled.code == 0, compiled.err
        assert "recompile" not in compiled.err.lower()
        assert train_losses(tmp_path / "run") == pytest.approx(train_losses(tmp_path / "plain"), rel=1e-5)
        assert weights(tmp_path / "run").keys() == weights(tmp_path / "plain").keys()

    @pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
    def test_a_step_that_is_not_finite_is_traced_into_its_blocks(self, tmp_path, still_model, train_file) -> None:
        model = GPT2LMHeadModel.from_pretrained(still_model)
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
        shutil.copytree(still_model, tmp_path / "spoilt")
        model.save_pretrained(tmp_path / "spoilt")
        words = flags(tmp_path / "spoilt", train_file, max_steps=2)
        result = run_fresh("train.py", *words, "--torch_compile", cwd=tmp_path, **environment(tmp_path))
        assert result.code == 2, result.err
        assert "values of the output of transformer.h.1.mlp.c_fc are not finite" in result.out + result.err

    def test_without_a_compiler(self, run: Callable[..., Result], tmp_path, still_model, train_file) -> None:
        (tmp_path / "nothing").mkdir()
        result = run(
            "train.py",
            *flags(still_model, train_file, max_steps=1),
            "--torch_compile",
            PATH=str(tmp_path / "nothing"),
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
            CXX="",
        )
        assert result.code == 2
        assert len(result.error_lines) == 1
        assert "--torch_compile" in result.error_lines[0]
        assert "g++" in result.error_lines[0]


class TestOutputs:
    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, scripts: WarmScripts, tmp_path_factory, tiny_model, train_file, validation_file) -> tuple:
        folder = tmp_path_factory.mktemp("finished")
        words = flags(tiny_model, train_file, validation_file=validation_file, num_train_epochs=3, save_total_limit=2)
        return folder / "run", scripts("train.py", *words, "--test_file", validation_file, cwd=folder)

    def test_holds_what_the_design_lists(self, finished) -> None:
        folder, result = finished
        assert result.code == 0, result.err
        names = {path.name for path in folder.iterdir()}
        assert names >= {
            "config.json",
            "model.safetensors",
            "generation_config.json",
            "tokenizer.json",
            "vocab.json",
            "merges.txt",
            "emoft.json",
            "train_config.yaml",
            "trainer_state.json",
            "all_results.json",
            "runs",
        }
        checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
        assert checkpoints == ["checkpoint-24", "checkpoint-36"]  # the loss falls, so each epoch's is the best so far
        assert not list(folder.glob(".*")), "no staging folder is left"

    def test_trainer_state_is_the_trainers_own(self, finished) -> None:
        folder, _ = finished
        for place in (folder, folder / "checkpoint-24"):
            state = TrainerState.load_from_json(str(place / "trainer_state.json"))
            assert state.max_steps == 36
            assert state.global_step == (36 if place == folder else 24)
            assert state.best_metric == min(e["eval_loss"] for e in state.log_history if "eval_loss" in e)

    def test_results_agree_with_the_history(self, finished) -> None:
        folder = finished[0]
        results = json.loads((folder / "all_results.json").read_text())
        best = min(entry["eval_loss"] for entry in history(folder) if "eval_loss" in entry)
        assert results["eval_loss"] == best
        assert results["test_loss"] == pytest.approx(best, rel=1e-6)  # the same file, by the model that was kept
        assert results["perplexity"] == pytest.approx(torch.tensor(best).exp().item(), rel=1e-5)
        assert results["epoch"] == 3
        before = history(folder)[0]
        assert before["step"] == 0
        for name in ("eval_loss", "perplexity", "bits_per_byte"):
            low, high = results[f"{name}_interval"]
            assert low < results[name] < high
            assert results[f"{name}_before"] == before[f"eval_{name.removeprefix('eval_')}"] > results[name]
            assert f"{name}_before" in finished[1].out
        assert results["test_bits_per_byte_interval"] == pytest.approx(results["bits_per_byte_interval"], rel=1e-5)
        assert results["train_samples_per_second"] == pytest.approx(3 * 48 / results["train_runtime"])

    def test_tensorboard_has_the_same_figures(self, finished) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folder, _ = finished
        events = EventAccumulator(str(folder / "runs"))
        events.Reload()
        for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss"), ("train/learning_rate", "learning_rate")):
            shown = [(event.step, event.value) for event in events.Scalars(tag)]
            logged = [
                (entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in history(folder) if name in entry
            ]
            assert shown == logged

    def test_its_configuration_gives_the_same_run_again(self, finished, run: Callable[..., Result], tmp_path) -> None:
        folder, _ = finished
        result = run("train.py", "--config", folder / "train_config.yaml", "--output_dir", tmp_path / "again")
        assert result.code == 0, result.err
        assert history(tmp_path / "again") == history(folder)
        assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    def test_overwrite_deletes_the_run_and_nothing_else(
        self, run: Callable[..., Result], tiny_model, train_file, tmp_path
    ) -> None:
        words = flags(tiny_model, train_file, max_steps=2, save_steps=1)
        assert run("train.py", *words).code == 0
        (tmp_path / "run" / "notes.txt").write_text("mine")
        words = flags(tiny_model, train_file, max_steps=1)
        assert run("train.py", *words, "--overwrite_output_dir").code == 0
        assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
        assert not list((tmp_path / "run").glob("checkpoint-*"))
        assert len(list((tmp_path / "run" / "runs").iterdir())) == 1


class TestBestModel:
    def test_is_kept_and_taken_at_the_end(
        self, run: Callable[..., Result], tiny_model, train_file, validation_file, tmp_path
    ) -> None:
        """A learning rate that rises until it wrecks the model: an early evaluation stays the best."""
        words = flags(
            tiny_model,
            train_file,
            validation_file=validation_file,
            learning_rate=3,
            warmup_steps=8,
            max_steps=8,
            eval_steps=2,
            save_steps=1,
            save_total_limit=2,
        )
        result = run("train.py", *words)
        assert result.code == 0, result.err
        losses = {
            entry["step"]: entry["eval_loss"]
            for entry in history(tmp_path / "run")
            if "eval_loss" in entry and entry["step"] > 0
        }
        best = min(losses, key=losses.__getitem__)
        assert best < 8, "the learning rate was meant to be harmful"
        kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
        assert kept == [f"checkpoint-{best}", "checkpoint-8"]
        final = (tmp_path / "run/model.safetensors").read_bytes()
        assert final == (tmp_path / f"run/checkpoint-{best}/model.safetensors").read_bytes()
        assert json.loads((tmp_path / "run/all_results.json").read_text())["eval_loss"] == losses[best]

    def test_early_stopping(
        self, run: Callable[..., Result], tiny_model, train_file, validation_file, tmp_path
    ) -> None:
        words = flags(
            tiny_model,
            train_file,
            validation_file=validation_file,
            learning_rate=1e-30,
            max_steps=12,
            eval_steps=2,
            early_stopping_patience=2,
        )
        result = run("train.py", *words)
        assert result.code == 0, result.err
        assert history(tmp_path / "run")[-1]["step"] == 6  # best at 2, nothing better at 4 and 6
        assert "stopped early" in result.out


# The script as it is, but slow in its second step, so that a signal surely comes in a step.
SLOW = f"""
import pathlib, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
from emoft.tracking.tracker import Tracker
count_step = Tracker.count_step
def slow(self, *arguments, **keywords):
    count_step(self, *arguments, **keywords)
    if self.run.step == 2:
        pathlib.Path("reached").touch()
        time.sleep(1)
Tracker.count_step = slow
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


class TestResume:
    # Dropout on, in the second epoch and in its middle, under accumulation: 8 steps an epoch.
    SETTINGS = {"max_steps": 14, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "eval_steps": 5}

    @pytest.fixture(scope="class")
    @classmethod
    def undisturbed(cls, scripts: WarmScripts, tmp_path_factory, tiny_model, train_file, validation_file) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        words = flags(tiny_model, train_file, validation_file=validation_file, **cls.SETTINGS)
        assert scripts("train.py", *words, cwd=folder).code == 0
        return folder / "run"

    def assert_same_end(self, resumed: Path, undisturbed: Path) -> None:
        assert (resumed / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
        assert history(resumed) == history(undisturbed)

    @pytest.mark.parametrize("stop", [5, 11])
    def test_ends_like_an_undisturbed_run(
        self, run: Callable[..., Result], undisturbed, tiny_model, train_file, validation_file, tmp_path, stop
    ) -> None:
        words = flags(tiny_model, train_file, validation_file=validation_file, **self.SETTINGS)
        assert run("train.py", *words, f"--save_steps={stop}", "--save_total_limit=0").code == 0
        for path in [*(tmp_path / "run").iterdir()]:  # what a run killed after its checkpoint leaves
            if path.name not in (f"checkpoint-{stop}", "runs"):
                path.rename(tmp_path / path.name)
        result = run("train.py", *words, "--resume_from_checkpoint", "latest")
        assert result.code == 0, result.err
        assert f"checkpoint-{stop}" in result.out
        self.assert_same_end(tmp_path / "run", undisturbed)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_a_signal_saves_and_the_run_goes_on(
        self, scripts: WarmScripts, undisturbed, tiny_model, train_file, validation_file, tmp_path, number, code
    ) -> None:
        words = flags(tiny_model, train_file, validation_file=validation_file, **self.SETTINGS)
        (tmp_path / "slow.py").write_text(SLOW)
        (pid,) = scripts.start(str(tmp_path / "slow.py"), *words, cwd=tmp_path)
        while not (tmp_path / "reached").exists():
            time.sleep(0.01)
        os.kill(pid, number)
        result = scripts.finish()
        assert result.code == code, result.err
        assert "--resume_from_checkpoint latest" in result.out
        assert len(list(tmp_path.glob("run/checkpoint-*"))) >= 1
        resumed = scripts("train.py", *words, "--resume_from_checkpoint", "latest", cwd=tmp_path)
        assert resumed.code == 0, resumed.err
        self.assert_same_end(tmp_path / "run", undisturbed)

    def test_latest_without_a_checkpoint_starts(
        self, run: Callable[..., Result], tiny_model, train_file, tmp_path
    ) -> None:
        result = run("train.py", *flags(tiny_model, train_file, max_steps=1), "--resume_from_checkpoint=latest")
        assert result.code == 0, result.err
        assert "no checkpoint" in result.out

    def test_a_changed_computation_is_refused(
        self, run: Callable[..., Result], tiny_model, train_file, tmp_path
    ) -> None:
        assert run("train.py", *flags(tiny_model, train_file, max_steps=2, save_steps=1)).code == 0
        words = flags(tiny_model, train_file, max_steps=2, save_steps=1, seed=7)
        result = run("train.py", *words, "--resume_from_checkpoint=latest")
        assert result.code == 2
        assert "--seed 42, not 7" in result.err


class TestFaults:
    def test_fp16_overflow_skips_the_step_only(self, run: Callable[..., Result], tiny_model, tmp_path) -> None:
        """A text of two tokens is one target, so that its gradient times the first loss scale overflows fp16."""
        (tmp_path / "short.txt").write_text("zq\n" * 8)
        settings = {
            "template": "{text}",
            "append_eos": "false",
            "mixed_precision": "fp16",
            "per_device_train_batch_size": 1,
            "max_steps": 6,
            "save_steps": 1,
            "save_total_limit": 0,
            "load_best_model_at_end": "false",
        }
        words = flags(tiny_model, tmp_path / "short.txt", **settings)
        words.remove("--delimiter=;")
        result = run("train.py", *words)
        assert result.code == 0, result.err
        assert "warning" not in result.err.lower(), result.err
        entries = history(tmp_path / "run")
        skipped = [int(entry["skipped_steps"]) for entry in entries]
        assert skipped[0] == 1, "the first step was meant to overflow"
        assert skipped[-1] < 6, "training goes on"
        before = weights(tiny_model)
        for step, entry in enumerate(entries, start=1):
            assert entry["loss_scale"] == 65536 / 2 ** (skipped[step - 2] if step > 1 else 0)
            applied_before = step - 1 - (skipped[step - 2] if step > 1 else 0)
            assert entry["learning_rate"] == pytest.approx(1e-3 * (1 - applied_before / 6))
            after = weights(tmp_path / f"run/checkpoint-{step}")
            unchanged = all(torch.equal(after[name], tensor) for name, tensor in before.items())
            assert unchanged == (skipped[step - 1] > (skipped[step - 2] if step > 1 else 0))
            before = after

    def test_a_gradient_that_is_not_finite_ends_the_run_and_changes_nothing(
        self, run: Callable[..., Result], tiny_model, train_file, tmp_path
    ) -> None:
        broken = tmp_path / "broken"
        model = GPT2LMHeadModel.from_pretrained(tiny_model)
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
        model.save_pretrained(broken)
        GPT2Tokenizer.from_pretrained(tiny_model).save_pretrained(broken)
        result = run("train.py", *flags(broken, train_file, max_steps=3, save_steps=1))
        assert result.code == 2
        assert len(result.error_lines) == 1
        assert "step 1" in result.err
        assert not list((tmp_path / "run").glob("checkpoint-*"))
        assert not (tmp_path / "run" / "model.safetensors").exists()
