import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from transformers import GPT2Config, GPT2LMHeadModel

from emoft.benchmark.lengths import draw_lengths
from emoft.benchmark.scaling import Gradients, efficiency, exchange_seconds, modelled_seconds
from emoft.benchmark.training import EMOFT, FLATTENED, TUNED, TUTORIAL


def test_drawn_lengths_are_those_of_the_real_messages() -> None:
    """Mean 23, 5th to 95th percentile 9 to 46, longest 89 tokens; end-of-text comes on top."""
    lengths = draw_lengths(16_000, 1000, seed=0) - 1
    assert lengths.mean() == pytest.approx(23, abs=0.4)
    assert np.percentile(lengths, [5, 95]).tolist() == pytest.approx([9, 46], abs=1)
    assert lengths.min() >= 5 and lengths.max() <= 89
    assert draw_lengths(16_000, 64, seed=0).max() == 64


def run(tmp_path: Path, *words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "emoft.benchmark", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # beside other tests, more threads would wait for each other
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_measures_all_contenders_side_by_side(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        tmp_path,
        "--model_name_or_path",
        tiny_model,
        "--batch_sizes",
        2,
        "--turns",
        2,
        "--steps",
        2,
        "--warmup_steps",
        1,
        "--output_dir",
        out,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "benchmark.json").read_text())
    rows = {row["contender"]: row for row in report["rows"]}
    assert list(rows)[:4] == [TUTORIAL, TUNED, FLATTENED, EMOFT]
    assert rows[TUTORIAL]["to_tutorial"] == rows[TUNED]["to_tuned"] == 1
    ours = rows[EMOFT]
    assert ours["to_tutorial"] == pytest.approx(ours["samples_per_second"] / rows[TUTORIAL]["samples_per_second"])
    assert 0 < ours["share_of_limit"] < 1
    assert ours["peak_memory_gib"] > 0.01
    assert report["flops"] > 0 and report["bandwidth"] > 0
    assert (out / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    for name in rows:
        assert f"| {name} |" in result.stdout


def test_what_measuring_gradients_costs(tiny_model: Path, tmp_path: Path) -> None:
    result = run(
        tmp_path,
        "--compare",
        "gradients",
        "--model_name_or_path",
        tiny_model,
        "--batch_sizes",
        2,
        "--turns",
        2,
        "--steps",
        3,
        "--warmup_steps",
        1,
        "--output_dir",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    (cost,) = json.loads((tmp_path / "benchmark.json").read_text())["costs"]
    assert cost["every_step"] > 0.05, "of so small a model it costs more than a step: else nothing was measured"
    assert cost["every_100_steps"] == pytest.approx(cost["every_step"] / 100)
    assert "at every 100th step |" in result.stdout


def test_generation_beside_others(tiny_model: Path, tmp_path: Path) -> None:
    words = ["--compare", "generation", "--model_name_or_path", tiny_model, "--prompts", 24, "--turns", 2]
    result = run(tmp_path, *words, "--max_new_tokens", 12, "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    rows = {row["contender"]: row for row in json.loads((tmp_path / "benchmark.json").read_text())["rows"]}
    ours, lone = rows["emoft"], rows["pipeline, by its defaults"]
    assert {"model.generate", "pipeline, all in a batch", "emoft, --quantize int8"} < set(rows)
    assert ours["to_emoft"] == 1
    assert lone["to_emoft"] == pytest.approx(lone["tokens_per_second"] / ours["tokens_per_second"])
    assert lone["to_emoft"] < 1 / 3, "24 prompts at once"
    for row in rows.values():
        assert 0 < row["first_token_seconds"] < 5 and row["tokens_per_second_of_one"] > 0
        assert row["share_of_bandwidth"] > 0
    assert "| emoft, --quantize int8 |" in result.stdout


def test_classification_beside_an_evaluation(tiny_model: Path, tmp_path: Path) -> None:
    result = run(
        tmp_path,
        "--compare",
        "classification",
        "--model_name_or_path",
        tiny_model,
        "--prompts",
        24,
        "--turns",
        3,
        "--output_dir",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    evaluation, classification = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert (evaluation["contender"], evaluation["to_evaluation"]) == ("evaluation of 144 texts", 1)
    assert classification["contender"] == "classification of 24 texts by 6 labels"
    assert 0 < classification["to_evaluation"] < 6, "6 would be an evaluation for each label"
    assert "| evaluation of 144 texts |" in result.stdout


def test_how_it_scales_beside_the_model(tiny_model: Path, tmp_path: Path) -> None:
    result = run(
        tmp_path,
        "--compare",
        "processes",
        "--model_name_or_path",
        tiny_model,
        "--batch_sizes",
        2,
        "--turns",
        2,
        "--steps",
        3,
        "--warmup_steps",
        1,
        "--output_dir",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "benchmark.json").read_text())
    (row,) = report["scaling"]
    assert (row["batch_size"], row["processes"]) == (2, 2)
    assert row["seconds_together"] > 0 and 0 < row["efficiency"] < 2
    model = GPT2LMHeadModel.from_pretrained(tiny_model)
    assert sum(report["gradient_bytes"].values()) == 4 * model.num_parameters()
    assert 0 < row["modelled_efficiency"] < 1, "on the CPU nothing of the exchange is hidden"
    assert report["exchange"] > 1e6, "bytes a second"
    assert "| 1 | 2 | 4 | 8 | 16 | 32 | 64 |" in result.stdout


def test_the_model_of_scaling_by_hand() -> None:
    """10 Gbit/s are 1.25e9 bytes a second: a ring of 4 sends 1.5 times 500 MB in 0.6 s, of which a step hides 2/3."""
    assert exchange_seconds(500e6, ranks=4, bandwidth=1.25e9) == pytest.approx(0.6)
    assert exchange_seconds(500e6, ranks=1, bandwidth=1.25e9) == 0
    early, both = Gradients(500_000_000, 0), Gradients(500_000_000, 250_000_000)
    for alone, gradients, hides, seconds in (
        (0.3, early, True, 0.3 + 0.6 - 0.2),
        (0.9, early, True, 0.9),  # all of it is hidden
        (0.9, both, True, 0.9 + 0.3),  # but for what is complete at the end of the backward pass
        (0.3, both, True, 0.3 + 0.6 - 0.2 + 0.3),
        (0.9, both, False, 0.9 + 0.6 + 0.3),  # on the cores that compute nothing is
    ):
        assert modelled_seconds(alone, gradients, 4, 1.25e9, hides) == pytest.approx(seconds)


def test_the_tied_embedding_is_complete_last() -> None:
    gradients = Gradients.of(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10, n_positions=6)))
    assert gradients.late == 4 * (10 + 6) * 8
    assert gradients.early == 4 * (12 * 8 * 8 + 13 * 8 + 2 * 8), "a block, and the last LayerNorm"


def test_efficiency_is_the_median_of_the_turns() -> None:
    row = efficiency(4, 2, alone=[1.0, 1.2, 5.0], together=[2.0, 1.5, 5.0])
    assert (row["seconds_alone"], row["seconds_together"]) == (1.2, 2.0)
    assert row["efficiency"] == pytest.approx(0.8)


def test_a_contender_that_fails_says_why(tiny_model: Path, tmp_path: Path) -> None:
    """A model that the emoft side refuses: its positions are fewer than the longest text."""
    short = tmp_path / "short"
    model = GPT2LMHeadModel.from_pretrained(tiny_model)
    model.config.n_positions = 16
    GPT2LMHeadModel(model.config).save_pretrained(short)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (short / name).write_bytes((tiny_model / name).read_bytes())
    words = ["--compare", "gradients", "--model_name_or_path", short, "--batch_sizes", 2]
    result = run(tmp_path, *words, "--output_dir", tmp_path / "out")
    assert result.returncode == 2
    assert "16 positions" in result.stderr.splitlines()[-1]


def test_batch_sizes_are_checked(tmp_path: Path) -> None:
    result = run(tmp_path, "--batch_sizes", 0, "--output_dir", tmp_path)
    assert result.returncode == 2
    assert "--batch_sizes" in result.stderr
