"""Steps are added up, and those that were not applied are taken back."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from emoft.data.steps import Step
from emoft.tracking.counts import Counts
from emoft.tracking.run_state import RunState

SHAPE = GPT2Config(n_layer=2, n_embd=8, n_head=1, vocab_size=10)


def add(counts: Counts, loss: float, norm: float = 0.5, texts: int = 2, skipped: bool = False) -> None:
    step = Step(counts.run.step + 1, list(range(texts)), np.full(texts, 6), [])  # five targets each
    counts.add(step, torch.tensor(loss), torch.tensor(norm), skipped)


@pytest.fixture
def counts() -> Counts:
    return Counts(RunState(), SHAPE, max_grad_norm=1.0, device=torch.device("cpu"))


def test_what_is_not_finite_counts_for_no_mean(counts: Counts) -> None:
    for loss, norm in ((2.0, 0.5), (math.nan, 0.5), (3.0, math.inf), (4.0, 2.0)):
        add(counts, loss, norm)
    counts.read()
    run = counts.run
    assert (run.step, run.samples, run.tokens) == (4, 8, 40)
    assert (run.loss_sum, run.loss_tokens, run.clipped_steps) == (60.0, 20, 1)


def test_steps_are_taken_back_and_their_seconds_are_not(counts: Counts) -> None:
    add(counts, 2.0)
    counts.read()
    before, moment = asdict(counts.run), counts.remember()
    add(counts, math.nan, skipped=True)
    add(counts, 5.0, norm=3.0)
    counts.run.recent_losses.append(5.0)
    counts.run.depth_norms.append([1.0])
    counts.run.depth_others.setdefault("update_ratio", []).append([-3.0])
    counts.run.train_seconds = 7.0
    counts.return_to(moment)
    counts.read()
    assert asdict(counts.run) == before | {"train_seconds": 7.0}


def test_a_limit_of_0_clips_nothing() -> None:
    counts = Counts(RunState(), SHAPE, max_grad_norm=0.0, device=torch.device("cpu"))
    add(counts, 2.0, norm=100.0)
    counts.read()
    assert counts.run.clipped_steps == 0
