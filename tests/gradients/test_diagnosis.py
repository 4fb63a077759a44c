"""What `python -m emoft.gradients` says of faults planted in runs of the real train.py, and of curves made by hand."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Result
from faults import FAULTS, Planter, healthy, judge

from emoft.gradients.causes import EXPLAINS, ORDER
from emoft.gradients.curves import Curve
from emoft.gradients.diagnosis import CHECKS, Diagnosis, diagnose
from emoft.gradients.finding import Finding
from emoft.gradients.model_checks import depth_trend
from emoft.gradients.record import Record
from emoft.gradients.step_checks import describe_batch

# The short form of faults.py, which plants all of them, with three seeds each.
PLANTED = (
    "learning rate 30 times too high",
    "learning rate 1,000 times lower from step 60 on",
    "all matrices 100 times too small",
    "one layer 100 times too large: mlp.c_fc",
    "labels shifted twice, in the call of the loss",
    "one number of a block's output grows without end",
    "one text 600 times",
    "a NaN in a weight",
    "a NaN of the loop's own lines",
)
SOUND = ("2 blocks of 64", "padded, accumulated")


class TestPlantedFaults:
    @pytest.fixture(scope="class")
    @classmethod
    def planter(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planter]:
        planter = Planter(tmp_path_factory.mktemp("planted"), tuning=False)
        yield planter
        planter.scripts.close()

    @pytest.mark.parametrize("name", PLANTED)
    def test_a_fault_is_named_first(self, planter: Planter, name: str) -> None:
        (fault,) = [fault for fault in FAULTS if fault.name == name]
        run = planter.train(name, 1, fault.flags, fault)
        found = planter.diagnose(run)
        assert judge(fault, found) == (True, True, True), found["findings"]
        if name != PLANTED[2]:  # of one it is enough to see that the words say the same
            return
        printed = planter.scripts("-m", "emoft.gradients", str(run), cwd=planter.folder)
        assert printed.code == 0
        lines = [line for line in printed.out.splitlines() if line.startswith("- ")]
        assert lines[0] == f"- {found['findings'][0]['text']}", "the cause stands on top"
        for finding, line in zip(found["findings"], lines, strict=True):
            because = f"[follows from {finding['because_of']}] " if finding["because_of"] else ""
            assert line == f"- {because}{finding['text']}"
        assert printed.out.splitlines()[-1] == found["verdict"]

    @pytest.mark.parametrize("name", SOUND)
    def test_nothing_is_said_of_a_healthy_run(self, planter: Planter, name: str) -> None:
        found = planter.diagnose(planter.train(f"healthy {name}", 1, healthy()[name]))
        assert found["findings"] == []
        assert found["verdict"].startswith("nothing is wrong")
        assert len(found["fine"]) + len(found["could_not_check"]) == len(CHECKS)


def diagnose_run(folder: Path, *flags: str) -> Result:
    done = subprocess.run(
        [sys.executable, "-m", "emoft.gradients", str(folder), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    return Result(done.returncode, done.stdout, done.stderr)


# ---- The rules by themselves, on curves made by hand ---------------------------------------------------------------


def falling(entries: int = 60, first: float = 6.0, last: float = 3.0) -> Curve:
    return {step + 1: first + (last - first) * step / (entries - 1) for step in range(entries)}


def losses(curve: Curve, **others: Curve) -> dict[str, Curve]:
    """The curves that belong to a loss, of which word frequencies alone reach 3.5 nats."""
    return {"train/loss": curve, "train/unigram_entropy": {1: 3.5}, **others}


def of(curves: dict[str, Curve], **flags: object) -> Diagnosis:
    return diagnose(Record(curves, flags))


def names(curves: dict[str, Curve], **flags: object) -> set[str]:
    return {finding.name for finding in of(curves, **flags).findings}


def test_what_could_not_be_checked_is_said() -> None:
    empty = of({})
    assert empty.findings == empty.fine == [] or set(empty.fine) == {"fp16 drops few steps"}
    assert "could not be made" in empty.verdict
    eight = of(losses(falling(8)))
    assert eight.unchecked["the loss falls below that of word frequencies"].startswith("8 log entries, 10 needed")
    assert "nothing is wrong as far as could be checked" in eight.verdict
    assert len(eight.fine) + len(eight.unchecked) == len(CHECKS)


def test_every_finding_has_a_place_in_the_order_and_explains_what_exists() -> None:
    assert len(set(ORDER)) == len(ORDER)
    assert set(EXPLAINS) <= set(ORDER)
    assert set().union(*EXPLAINS.values()) <= set(ORDER)


def test_causes_come_first_and_their_consequences_say_so() -> None:
    from emoft.gradients.causes import by_cause

    found = [
        Finding(name, "", "") for name in ("context_not_used", "clipped_too_often", "layer_scale", "texts_repeated")
    ]
    ordered, because = by_cause(found)
    assert [each.name for each in ordered] == [
        "layer_scale",
        "texts_repeated",
        "clipped_too_often",
        "context_not_used",
    ]
    assert because == {"context_not_used": "layer_scale", "clipped_too_often": "layer_scale"}


def in_two_blocks(**curves: Curve) -> dict[str, Curve]:
    """Figures of a block that is h01, beside a sound h00, measured at five steps."""
    steps = range(10, 60, 10)
    found = {f"gradient_norm/{name}": dict.fromkeys(steps, 1.0) for name in ("h00", "h01")}
    for kind, sound in (("attention_logit", 5.0), ("attention_entropy", 0.8), ("kurtosis", 3.0), ("distance", 0.1)):
        found |= {f"{kind}/{name}": dict.fromkeys(steps, sound) for name in ("h00", "h01")}
    return {**found, "model/width": {0: 64.0}, **{f"{kind}/h01": curve for kind, curve in curves.items()}}


def test_attention_that_looks_at_single_tokens() -> None:
    steps = range(10, 60, 10)
    stuck = in_two_blocks(attention_logit=dict.fromkeys(steps, 900.0), attention_entropy=dict.fromkeys(steps, 0.001))
    (finding,) = [each for each in of(stuck).findings if each.name == "attention_stuck"]
    assert (finding.tag, finding.steps) == ("attention_logit/h01", [10])
    assert "attention_stuck" not in names(in_two_blocks(attention_logit=dict.fromkeys(steps, 900.0))), "still wide"
    assert names(in_two_blocks()) == set()


def test_a_number_that_holds_a_whole_activation() -> None:
    rising = in_two_blocks(kurtosis={10: 3.0, 20: 5.0, 30: 50.0, 40: 60.0, 50: 60.0})
    (finding,) = [each for each in of(rising).findings if each.name == "outlier_features"]
    assert (finding.tag, finding.steps) == ("kurtosis/h01", [30])
    as_it_came = in_two_blocks(kurtosis=dict.fromkeys(range(10, 60, 10), 50.0))
    assert "outlier_features" not in names(as_it_came), "a pretrained model has such numbers"


def test_pretrained_weights_that_are_lost() -> None:
    far = in_two_blocks(distance={10: 0.2, 20: 0.9, 30: 1.4, 40: 2.0, 50: 2.0})
    (finding,) = [each for each in of(far, model_name_or_path="gpt2").findings if each.name == "pretraining_lost"]
    assert (finding.tag, finding.steps) == ("distance/h01", [30])
    assert "pretraining_lost" not in names(far, model_name_or_path=""), "random weights may go anywhere"


def test_the_size_of_a_batch() -> None:
    def noise(scatter: float, common: float, size: float) -> dict[str, Curve]:
        steps = range(10, 70, 10)
        return {
            "gradient_noise/scatter": dict.fromkeys(steps, scatter),
            "gradient_noise/common": dict.fromkeys(steps, common),
            "train/examples_per_step": {0: size},
        }

    assert "batch_too_large" in names(noise(2.0, 1.0, 256.0))
    assert "batch_too_large" not in names(noise(100.0, 1.0, 256.0))
    assert "batch_too_large" not in names(noise(2.0, -1.0, 256.0)), "nothing in common"
    assert "a batch of about 100 texts would use the data as well (it has 8)" in describe_batch(
        Record(noise(100.0, 1.0, 8.0))
    )
    assert "nothing in common" in describe_batch(Record(noise(2.0, -1.0, 8.0)))
    assert describe_batch(Record({})) == ""


def test_loss_spikes_are_named_by_step() -> None:
    curve = falling()
    curve[30], curve[45] = 9.0, 8.0
    (finding,) = of(losses(curve)).findings
    assert (finding.name, finding.steps) == ("loss_spikes", [30, 45])
    assert names(losses(falling())) == set()
    # Entries that are not finite stand before it: steps and losses still belong together.
    curve[20] = curve[21] = curve[22] = math.nan
    (finding,) = of(losses(curve)).findings
    assert finding.steps == [30, 45]


def test_a_loss_that_does_not_fall() -> None:
    assert "loss_does_not_fall" in names(losses(falling(last=5.95)))
    settled = {step: max(4.8, loss) for step, loss in falling().items()}
    assert names(losses(settled)) == {"context_not_used"}
    still_falling = of(losses(falling(last=4.0)))
    assert still_falling.findings == []
    assert "train longer" in still_falling.unchecked["the loss falls below that of word frequencies"]


def test_a_loss_that_rises() -> None:
    curve = {step: 6.0 + min(step, 60 - step) / 10 for step in range(1, 61)}
    (finding, *_) = of(losses(curve)).findings
    assert finding.name == "learning_rate_too_high"
    assert finding.steps[0] < 29


def test_overfitting() -> None:
    curves = losses(falling(), **{"eval/loss": {20: 5.0, 40: 4.0, 60: 4.5}})
    (finding,) = of(curves).findings
    assert (finding.name, finding.steps) == ("overfitting", [40, 60])
    assert names({**curves, "eval/loss": {20: 5.0, 40: 4.0, 60: 4.01}}) == set()


@pytest.mark.parametrize(("ratio", "expected"), [(1e-3, {"vanishing"}), (0.1, set()), (1e3, {"exploding"}), (5, set())])
def test_the_trend_by_depth(ratio: float, expected: set[str]) -> None:
    curves = {
        f"gradient_norm/h{block:02}": dict.fromkeys((10, 20, 30), ratio ** (1 - block / 11)) for block in range(12)
    }
    assert names(curves) == expected
    assert depth_trend(Record(curves)) == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("level", "expected"), [(-3.0, set()), (-6.0, {"learning_rate_too_low"}), (-0.5, {"learning_rate_too_high"})]
)
def test_the_size_of_updates(level: float, expected: set[str]) -> None:
    curves = losses(falling()) | {f"gradient_norm/h{block:02}": {10: 1.0} for block in range(3)}
    curves |= {f"update_ratio/h{block:02}": {10: level, 20: -12.0} for block in range(3)}
    assert names(curves) == expected


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_schedule_that_the_flags_ask_for(schedule: str) -> None:
    from emoft.training.schedule import schedule_factor

    flags = {"learning_rate": 0.01, "lr_scheduler_type": schedule, "warmup_steps": 10, "max_steps": 100}
    right = {step: 0.01 * schedule_factor(schedule, step - 1, 10, 100) for step in range(5, 101, 5)}
    epochs = {step: step / 50 for step in right}
    curves = {"train/learning_rate": right, "train/epoch": epochs}
    assert names(curves, **flags) == set()
    by_epochs = {**flags, "max_steps": -1, "num_train_epochs": 2.0}
    assert names(curves, **by_epochs) == set()
    doubled = {step: rate * (2 if step > 50 else 1) for step, rate in right.items()}
    (finding,) = of({**curves, "train/learning_rate": doubled}, **flags).findings
    assert (finding.name, finding.steps[0]) == ("learning_rate_jumps", 55)
    held = {**curves, "train/learning_rate": dict.fromkeys(right, 0.003)}
    assert names(held, **flags) == {"schedule_not_followed"}
    # Three steps of fp16 that were dropped hold the schedule back.
    late = {step: 0.01 * schedule_factor(schedule, max(0, step - 4), 10, 100) for step in right}
    curves |= {"train/learning_rate": late, "train/skipped_steps": {2: 3.0, 100: 3.0}}
    assert names(curves, **flags) == set()
    # Eight more that were dropped before the first entries, where nobody knows at which steps they were.
    late = {step: 0.01 * schedule_factor(schedule, max(0, step - 9), 10, 100) for step in right}
    dropped = {5: 5.0, **{step: 8.0 for step in right if step > 5}}
    curves |= {"train/learning_rate": late, "train/skipped_steps": dropped}
    assert names(curves, **flags) - {"skipped_too_often"} == set()
    wrong = {"schedule_not_followed", "learning_rate_jumps"}
    assert names({**curves, "train/learning_rate": right}, **flags) & wrong


def test_texts_that_are_cut() -> None:
    assert names({"data/cut_texts": {5: 0.6}}) == {"texts_cut"}
    assert names({"data/cut_texts": {5: 0.5}}) == set()


def test_a_decay_that_the_learning_rate_makes_large_is_no_cause() -> None:
    curves = {"train/loss": dict.fromkeys(range(1, 4), 5.0)}
    assert "weights_decay" in names(curves, learning_rate=0.01, weight_decay=1.0)
    assert "weights_decay" not in names(curves, learning_rate=0.4, weight_decay=0.1)


def test_clipping_saturation_and_skipping() -> None:
    clipped = {"train/clipped_share": {5: 1.0, 10: 0.95}, "train/grad_norm": {5: 4.0}, "train/max_grad_norm": {5: 1.0}}
    assert names(clipped) == {"clipped_too_often"}
    assert names({**clipped, "train/grad_norm": {5: 2.0}}) == set()
    assert names({**clipped, "train/clipped_share": {5: 1.0, 10: 0.5}}) == set()
    curves = {"gradient_norm/h00": {5: 1.0}, "activation_saturation/h00": {5: 0.97}}
    assert names(curves) == {"dead_units"}
    assert names({"train/skipped_steps": {50: 2.0, 100: 9.0}}) == {"skipped_too_often"}
    assert names({"train/skipped_steps": {50: 2.0, 100: 2.0}}) == set()


@pytest.mark.parametrize("content", [None, b"", b"not an event file at all" * 50])
def test_a_folder_without_a_run(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "events.out.tfevents.1.x").write_bytes(content)
    result = diagnose_run(tmp_path)
    if content is None:
        assert result.code == 2
        assert len(result.error_lines) == 1
        assert str(tmp_path) in result.err
    else:
        assert "Traceback" not in result.err
        assert result.code in (0, 2)
