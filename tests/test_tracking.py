import json
import math
from pathlib import Path

import pytest
import torch

from emoft.config import TrainConfig
from emoft.evaluate import Evaluation
from emoft.tracking import RunState, Tracker, write_json

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(output_dir=str(tmp_path))


def test_the_logged_loss_is_the_mean_over_tokens_since_the_last_entry(config: TrainConfig) -> None:
    with Tracker(config, RunState(), total_steps=4, steps_per_epoch=2, device=CPU) as tracker:
        tracker.count_step(torch.tensor(1.0), tokens=10, samples=2)
        tracker.count_step(torch.tensor(4.0), tokens=30, samples=2)
        tracker.log_step(torch.tensor(0.5), learning_rate=0.1)
        tracker.count_step(torch.tensor(math.inf), tokens=30, samples=2, skipped=True)
        tracker.count_step(torch.tensor(2.0), tokens=5, samples=1)
        tracker.log_step(torch.tensor(0.5), learning_rate=0.1)
    first, second = tracker.run.log_history
    assert first["loss"] == (10 * 1 + 30 * 4) / 40
    assert (first["step"], first["epoch"]) == (2, 1.0)
    assert second["loss"] == 2.0
    assert second["perplexity"] == math.exp(2.0)
    assert tracker.run.skipped_steps == 1
    assert tracker.results()["train_loss"] == (130 + 10) / 45


def test_the_clock_stops(config: TrainConfig) -> None:
    import time

    with Tracker(config, RunState(), total_steps=1, steps_per_epoch=1, device=CPU) as tracker:
        with tracker.clock_stopped():
            time.sleep(0.5)
        tracker.count_step(torch.tensor(1.0), tokens=10, samples=2)
        tracker.log_step(torch.tensor(1.0))
    assert tracker.run.train_seconds < 0.4


def test_evaluations_without_a_new_best_are_counted(config: TrainConfig) -> None:
    with Tracker(config, RunState(), total_steps=9, steps_per_epoch=9, device=CPU) as tracker:
        best = []
        for loss in (3.0, 2.0, 2.0, 2.5, 1.0):
            tracker.run.step += 1
            best.append(tracker.log_evaluation(Evaluation(loss, tokens=1)))
            if tracker.run.step == 4:
                assert tracker.run.evaluations_since_best == 2
    assert best == [True, True, False, False, True]
    assert (tracker.run.best_loss, tracker.run.best_step, tracker.run.evaluations_since_best) == (1.0, 5, 0)


def test_json_has_no_word_for_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [math.nan, math.inf, 1.5], "b": "ភាសា"})
    content = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(content, parse_constant=pytest.fail) == {"a": [None, None, 1.5], "b": "ភាសា"}
    assert "ភាសា" in content
