import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from emoft.config import TrainConfig
from emoft.data.batching import Batch, pack
from emoft.data.steps import Step
from emoft.distributed.world import World
from emoft.evaluate.scoring import Evaluation
from emoft.files import write_json
from emoft.tracking.run_state import RunState
from emoft.tracking.tracker import Tracker
from emoft.training.loss import shift_labels

CPU = torch.device("cpu")
NORM = torch.tensor(0.5)  # of a gradient, too small to be clipped
SHAPE = GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=10)


def tracker_of(config: TrainConfig, total_steps: int, steps_per_epoch: int) -> Tracker:
    return Tracker(config, RunState(), total_steps, steps_per_epoch, SHAPE, 5.0, 1e6, CPU, World())


def batch_of(targets: int, examples: int) -> Batch:
    """A batch of so many targets: one example has all of them, the others are of a single token."""
    rows = [{"input_ids": [1] * (targets + 1)}] + [{"input_ids": [1]}] * (examples - 1)
    return pack(rows, pad_id=0)


def count_step(tracker: Tracker, loss: torch.Tensor, norm: torch.Tensor, *batches: Batch, skipped=False) -> None:
    lengths = np.array([length for batch in batches for length in batch.lengths])
    step = Step(tracker.run.step + 1, list(range(len(lengths))), lengths, list(batches))
    shifted = [(shift_labels(batch.labels).flatten(), batch.predicting) for batch in batches]
    step.targets = [(targets[places], places, torch.zeros(len(places))) for targets, places in shifted]
    tracker.count_step(step, loss, norm, skipped)


def evaluation_of(loss: float) -> Evaluation:
    return Evaluation(loss, (loss - 0.1, loss + 0.1), loss / 3, (loss / 4, loss / 2), 1, 1, 1)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(output_dir=str(tmp_path))


def test_the_logged_loss_is_the_mean_over_tokens_since_the_last_entry(config: TrainConfig) -> None:
    with tracker_of(config, 5, 2) as tracker:
        count_step(tracker, torch.tensor(1.0), NORM, batch_of(10, 2))
        count_step(tracker, torch.tensor(4.0), NORM, batch_of(30, 2))
        tracker.log_step(torch.tensor(0.5), learning_rate=0.1)
        count_step(tracker, torch.tensor(1.0), torch.tensor(math.inf), batch_of(30, 2), skipped=True)
        count_step(tracker, torch.tensor(math.nan), NORM, batch_of(30, 2))
        count_step(tracker, torch.tensor(2.0), NORM, batch_of(5, 1))
        tracker.log_step(torch.tensor(0.5), learning_rate=0.1)
    first, second = tracker.run.log_history
    assert first["loss"] == (10 * 1 + 30 * 4) / 40
    assert (first["step"], first["epoch"]) == (2, 1.0)
    assert second["loss"] == 2.0
    assert second["perplexity"] == math.exp(2.0)
    assert tracker.run.skipped_steps == 1
    assert tracker.results(0)["train_loss"] == (130 + 10) / 45


def test_the_share_of_clipped_steps_is_since_the_last_entry(config: TrainConfig) -> None:
    with tracker_of(config, 6, 6) as tracker:
        for step, norm in enumerate([0.5, 2.0, 3.0, 0.9, 1.1, math.nan], start=1):
            count_step(tracker, torch.tensor(1.0), torch.tensor(norm), batch_of(3, 1))
            if step % 3 == 0:
                tracker.log_step(torch.tensor(norm))
    assert [entry["clipped_share"] for entry in tracker.run.log_history] == [2 / 3, 1 / 3]


def test_speed_is_of_what_the_mathematics_needs(config: TrainConfig) -> None:
    with tracker_of(config, 4, 2) as tracker:
        count_step(tracker, torch.tensor(1.0), NORM, batch_of(10, 2), batch_of(4, 1))
        tracker.log_step(torch.tensor(0.5))
    results = tracker.results(0)
    # By hand: 2 blocks of 12 x 8 x 8 weights, a head of 8 x 10; 17 tokens, 14 targets; texts of 11, 1 and 5 tokens.
    operations = 6 * (2 * 12 * 64 * 17 + 80 * 14) + 12 * 8 * 2 * (66 + 1 + 15)
    assert tracker.run.operations == operations
    seconds = results["train_runtime"]
    assert results["train_share_of_peak"] == pytest.approx(operations / seconds / 1e6)
    assert results["train_samples_per_second"] == pytest.approx(3 / seconds)


def test_the_clock_stops(config: TrainConfig) -> None:
    import time

    with tracker_of(config, 1, 1) as tracker:
        with tracker.clock_stopped():
            time.sleep(0.5)
        count_step(tracker, torch.tensor(1.0), NORM, batch_of(10, 2))
        tracker.log_step(torch.tensor(1.0))
    assert tracker.run.train_seconds < 0.4


def test_evaluations_without_a_new_best_are_counted(config: TrainConfig) -> None:
    with tracker_of(config, 9, 9) as tracker:
        best = []
        for loss in (3.0, 2.0, 2.0, 2.5, 1.0):
            tracker.run.step += 1
            best.append(tracker.log_evaluation(evaluation_of(loss)))
            if tracker.run.step == 4:
                assert tracker.run.evaluations_since_best == 2
    assert best == [True, True, False, False, True]
    assert (tracker.run.best_loss, tracker.run.best_step, tracker.run.evaluations_since_best) == (1.0, 5, 0)


@pytest.mark.parametrize(("keeps_best", "shown"), [(True, 2.0), (False, 2.5)])
def test_the_results_tell_of_before_and_after(config: TrainConfig, keeps_best: bool, shown: float) -> None:
    config.load_best_model_at_end = keeps_best
    with tracker_of(config, 9, 9) as tracker:
        assert not tracker.log_evaluation(evaluation_of(1.5)), "it is none of those that compete"
        for loss in (2.0, 2.5):
            tracker.run.step += 1
            tracker.log_evaluation(evaluation_of(loss))
    resumed = Tracker(config, RunState(**tracker.state_for_checkpoint()), 9, 9, SHAPE, 5.0, 1e6, CPU, World())
    results = resumed.results(resumed.run.best_step if keeps_best else resumed.run.step)
    assert (results["eval_loss_before"], results["eval_loss"]) == (1.5, shown)
    assert results["perplexity_before"] == math.exp(1.5)
    assert results["bits_per_byte_interval"] == [shown / 4, shown / 2]
    assert results["perplexity_before_interval"] == pytest.approx([math.exp(1.4), math.exp(1.6)])
    assert tracker.run.evaluations_since_best == 1


def test_json_has_no_word_for_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [math.nan, math.inf, 1.5], "b": "ភាសា"})
    content = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(content, parse_constant=pytest.fail) == {"a": [None, None, 1.5], "b": "ភាសា"}
    assert "ភាសា" in content
