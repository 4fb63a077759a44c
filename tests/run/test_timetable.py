"""What comes after a step, and how often: the numbers of a plan are those of a run."""

from types import SimpleNamespace

import pytest

from emoft.config import TrainConfig
from emoft.run.timetable import Timetable


def timetable(steps: int, per_epoch: int, validates: bool = True, **flags: object) -> Timetable:
    loader = SimpleNamespace(total_steps=steps, steps_per_epoch=per_epoch)
    splits = ("train", "validation") if validates else ("train",)
    return Timetable(SimpleNamespace(config=TrainConfig(**flags), loader=loader, splits=splits))


def test_the_last_step_is_logged_and_evaluated() -> None:
    flags = {"logging_steps": 3, "eval_steps": 0, "save_steps": 5, "sample_every": 4}
    found = timetable(10, 4, **flags)
    steps = range(1, 11)
    assert [step for step in steps if found.logs(step)] == [3, 6, 9, 10]
    assert [step for step in steps if found.evaluates(step)] == [4, 8, 10]  # each epoch
    assert [step for step in steps if found.saves(step)] == [5, 10]
    assert [step for step in steps if found.samples(step)] == [4, 8]
    alone = timetable(10, 4, validates=False, **flags)
    assert not any(alone.evaluates(step) for step in steps) and alone.evaluations(0) == 0


def test_what_is_switched_off_never_comes() -> None:
    found = timetable(10, 4, save_steps=0, sample_every=0, log_gradients_every=0)
    assert not any(found.saves(step) or found.samples(step) for step in range(1, 11))
    assert (found.looks_at_gradients(0), found.rounds_of_samples(0)) == (0, 1)


@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize("every", [1, 3, 5, 12])
@pytest.mark.parametrize("done", [0, 1, 6, 11, 12])
def test_how_often_is_what_the_steps_say(every: int, done: int, best: bool) -> None:
    flags = {"eval_steps": every, "save_steps": every, "log_gradients_every": every, "load_best_model_at_end": best}
    flags["sample_every"] = every
    found = timetable(12, 5, **flags)
    left = range(done + 1, 13)
    evaluations = sum(found.evaluates(step) for step in left)
    assert found.evaluations(done) == evaluations + (done == 0)
    assert found.checkpoints(done) == sum(found.saves(step) for step in left) + best * evaluations
    assert found.rounds_of_samples(done) == 1 + sum(found.samples(step) for step in left)
    assert found.looks_at_gradients(done) == sum(step % every == 0 for step in left)
