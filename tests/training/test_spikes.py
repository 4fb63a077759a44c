"""A finite loss that stands out: found, told with its row, and left out if asked."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SENTENCES, WarmScripts, read_scalars
from safetensors.torch import load_file

from emoft.data.steps import Step
from emoft.tracking.run_state import RunState
from emoft.training.spikes import LEAST, MOST_IN_A_ROW, WINDOW, Spike, SpikeWatch, describe

ROW = 333  # of the text that is unlike the others
OUTLIER = "\u2603 zq vxk jjq wwx qqz kxj \u2620 ZZQ XJ vvq"


def losses_to_steps(watch: SpikeWatch, losses: list[float], first: int = 1) -> list[int]:
    for number, loss in enumerate(losses, start=first):
        watch.note(Step(number, [], [], []), torch.tensor(loss))
    return [spike.step for _, spike in watch.look()]


class TestSpikeWatch:
    usual = [5.0, 5.1, 4.9, 5.05, 4.95] * 8

    def test_finds_what_stands_out_and_nothing_else(self) -> None:
        state = RunState()
        watch = SpikeWatch(state)
        assert losses_to_steps(watch, self.usual) == []
        assert losses_to_steps(watch, [5.3, 5.8, 5.0], first=41) == [42]
        assert len(state.recent_losses) == 42 and 5.8 not in state.recent_losses, (
            "a spike tells nothing of what is usual"
        )

    def test_says_nothing_before_it_knows_what_is_usual(self) -> None:
        assert losses_to_steps(SpikeWatch(RunState()), [5.0] * (LEAST - 1) + [50.0]) == []

    def test_a_falling_loss_and_a_small_rise_are_no_spikes(self) -> None:
        assert losses_to_steps(SpikeWatch(RunState()), [10 * 0.99**n for n in range(300)]) == []
        assert losses_to_steps(SpikeWatch(RunState()), [5.0] * 50 + [5.5]) == [], "of no deviation, a tenth"

    def test_what_lasts_is_no_spike(self) -> None:
        found = losses_to_steps(SpikeWatch(RunState()), [*self.usual, *[9.0] * 100])
        assert found == list(range(41, 41 + MOST_IN_A_ROW))

    def test_goes_on_from_what_a_checkpoint_kept(self) -> None:
        """The losses before, and how many steps in a row stand out already."""
        state = RunState()
        losses_to_steps(SpikeWatch(state), [*self.usual * 4, *[9.0] * 6])
        assert len(state.recent_losses) == WINDOW
        resumed = RunState(**asdict(state))
        assert losses_to_steps(SpikeWatch(resumed), [9.0] * 50, first=1) == list(range(1, MOST_IN_A_ROW - 6 + 1))

    def test_says_no_row_where_texts_cannot_be_measured(self) -> None:
        line = describe(Spike(7, 9.0, 5.0, 0.1, 5.6), [3, 4], ["a", "b"], [], True, "spike-7.json")
        assert line == "step 7: the loss is 9.00 nats, where up to 5.60 is usual; all in spike-7.json"

    def test_forgets_steps_that_were_not_applied(self) -> None:
        watch = SpikeWatch(RunState())
        losses_to_steps(watch, self.usual)
        watch.note(Step(41, [], [], []), torch.tensor(9.0))
        watch.forget()
        assert watch.look() == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 texts that are alike, and one that is not."""
    path = tmp_path_factory.mktemp("spikes") / "train.csv"
    texts = [SENTENCES[number % 3][0] for number in range(400)]
    texts[ROW] = OUTLIER
    path.write_text("text\n" + "".join(f'"{text}"\n' for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def words(data: Path, still_model: Path) -> list[str]:
    flags = {"train_file": data, "model_name_or_path": still_model, "learning_rate": 3e-3, "output_dir": "run"}
    flags |= {"per_device_train_batch_size": 2, "num_train_epochs": 1, "mixed_precision": "no", "logging_steps": 5}
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.mark.parametrize("on_spike", ["warn", "skip"])
def test_a_spike_names_its_row(scripts: WarmScripts, words: list[str], tmp_path: Path, on_spike: str) -> None:
    done = scripts("train.py", *words, f"--on_spike={on_spike}", cwd=tmp_path)
    assert done.code == 0, done.err
    found = [json.loads(path.read_text()) for path in (tmp_path / "run").glob("spike-*.json")]
    (report,) = [each for each in found if ROW in each["examples"]]
    hardest = report["losses"].index(max(report["losses"]))
    assert report["examples"][hardest] == ROW
    assert report["loss"] > report["threshold"] > report["median"] > 0
    assert report["applied"] == (on_spike == "warn")
    assert OUTLIER in report["texts"][hardest]
    assert report["losses"][hardest] > report["threshold"]
    (line,) = [line for line in done.err.splitlines() if f"row {ROW} of train" in line]
    assert line.startswith(f"warning: step {report['step']}: the loss is ")
    assert ("nothing of it was applied" in line) == (on_spike == "skip")
    assert max(read_scalars(tmp_path / "run")["train/spikes"].values()) == len(found)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 200, "a step that is left out counts"
    asked = scripts("-m", "emoft.gradients", "run", cwd=tmp_path)
    if on_spike == "warn" and "the loss jumps" in asked.out:
        assert f"row {ROW} of train" in asked.out


def test_a_step_that_is_left_out_changes_nothing(scripts: WarmScripts, words: list[str], tmp_path: Path) -> None:
    """The weights before and after it, in checkpoints, are the same; with `warn` they are not."""
    first = scripts("train.py", *words, "--on_spike=skip", cwd=tmp_path)
    assert first.code == 0
    (step,) = [
        report["step"]
        for path in (tmp_path / "run").glob("spike-*.json")
        if ROW in (report := json.loads(path.read_text()))["examples"]
    ]
    for on_spike in ("skip", "warn"):
        more = [f"--on_spike={on_spike}", "--save_steps=1", "--save_total_limit=0", f"--output_dir={on_spike}"]
        assert scripts("train.py", *words, *more, f"--max_steps={step}", "--num_train_epochs=1", cwd=tmp_path).code == 0
        before, after = (
            load_file(tmp_path / on_spike / f"checkpoint-{number}" / "model.safetensors") for number in (step - 1, step)
        )
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (on_spike == "skip")


def test_a_resumed_run_judges_by_the_same_losses(scripts: WarmScripts, words: list[str], tmp_path: Path) -> None:
    words = [*words, "--on_spike=skip", "--save_steps=40", "--save_total_limit=0"]
    assert scripts("train.py", *words, cwd=tmp_path).code == 0
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert scripts("train.py", *words, "--resume_from_checkpoint=run/checkpoint-80", cwd=tmp_path).code == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole


# The script as it is, but the loss of the 60th step is 30 times what it is, and that of the next one NaN, also when
# it is repeated.
PLANT = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from emoft.training import loss
compute, steps = loss.cross_entropy, []
def planted(*arguments):
    if torch.is_grad_enabled():
        steps.append(0)
    factor = 30 if len(steps) == 60 else float("nan") if len(steps) in (61, 62, 63) else 1
    return compute(*arguments) * (factor if torch.is_grad_enabled() else 1)
loss.cross_entropy = planted
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


def test_a_step_that_is_left_out_before_one_that_is_not_finite(
    scripts: WarmScripts, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "planted.py").write_text(PLANT)
    more = ["--on_spike=skip", "--on_nonfinite=skip", "--max_steps=80", "--max_train_samples=300"]
    done = scripts(str(tmp_path / "planted.py"), *words, *more, cwd=tmp_path)
    assert done.code == 0, done.err
    assert {path.name for path in (tmp_path / "run").glob("*-*.json")} == {"spike-60.json", "nonfinite-61.json"}
    curves = read_scalars(tmp_path / "run")
    assert max(curves["train/loss"]) == 80 and list(curves["train/nonfinite_steps"].values())[-1] == 1
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 80
