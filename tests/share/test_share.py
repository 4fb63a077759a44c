"""A model to share: its card, and the upload, against a Hub on loopback."""

import functools
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from conftest import ROOT, Result, run_fresh
from huggingface_hub import ModelCard

from emoft.config import TrainConfig
from emoft.data.template import TextFormat
from emoft.errors import UserError
from emoft.share.card import MARK, build_card, write_card
from emoft.share.upload import upload

sys.path.append(str(Path(__file__).parent))
from upload_server import UploadServer  # noqa: E402

TOKEN = "hf_secretsecretsecret"
FORMAT = TextFormat("{label}: {text}", labels=["fear", "joy"])
RESULTS = {
    "train_runtime": 61.2,
    "eval_loss": 3.9,
    "eval_loss_interval": [3.8, 4.0],
    "perplexity": 49.4,
    "perplexity_interval": [44.7, 54.6],
    "eval_emotion_accuracy": 0.91,
    "eval_emotion_accuracy_interval": [0.87, 0.94],
    "test_loss": 4.0,
}


def hub_of(server: UploadServer) -> dict[str, str]:
    return {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


@pytest.fixture
def flags(tiny_model: Path, train_file: Path) -> list[str]:
    words = f"--model_name_or_path {tiny_model} --train_file {train_file} --validation_file {train_file} --max_steps 2"
    return [*words.split(), "--output_dir=out"]


class TestTheCard:
    def test_it_is_valid_and_holds_the_figures(self) -> None:
        config = TrainConfig(output_dir="some/joyful", model_name_or_path="gpt2", seed=7, learning_rate=1e-3)
        card = ModelCard(str(build_card(config, FORMAT, RESULTS, "2 threads on a CPU")))
        assert card.data.base_model == "gpt2" and card.data.license == "mit"
        assert card.data.datasets == ["dair-ai/emotion"] and card.data.model_name == "joyful"
        found = {(each.dataset_split, each.metric_type): each.metric_value for each in card.data.eval_results}
        assert found == {
            ("validation", "loss"): 3.9, ("validation", "perplexity"): 49.4, ("validation", "accuracy"): 0.91,
            ("test", "loss"): 4.0,
        }  # fmt: skip
        assert "| loss, in nats a token | validation | 3.9000 | [3.8000, 4.0000] |" in card.text
        assert (
            "--learning_rate 0.001 --seed 7" in card.text and "seed 7; 61 seconds of training on 2 threads" in card.text
        )
        assert "generator('fear:'" in card.text and "`{label}: {text}`" in card.text

    def test_it_names_no_path_of_the_machine(self, tmp_path: Path) -> None:
        (tmp_path / "mine.csv").write_text("text\n")
        config = TrainConfig(output_dir=str(tmp_path), train_file=str(tmp_path / "mine.csv"), model_name_or_path="")
        text = str(build_card(config, FORMAT, {}, "a CPU"))
        assert str(tmp_path) not in text and "`mine.csv`" in text and "It was not evaluated" in text

    def test_a_run_writes_it_and_leaves_anothers_alone(self, run: Callable[..., Result], tmp_path: Path, flags) -> None:
        assert run("train.py", *flags).code == 0
        card = tmp_path / "out" / "README.md"
        first = card.read_text()
        assert MARK in first and ModelCard(first).data.eval_results
        card.write_text(first.replace(MARK, "") + "\nby hand\n")
        write_card(card.parent, TrainConfig(output_dir="out"), FORMAT, RESULTS, "a CPU")
        assert card.read_text().endswith("by hand\n")


class TestTheUpload:
    def test_a_run_ends_with_it(self, tmp_path: Path, flags: list[str]) -> None:
        with UploadServer({}) as server:
            result = run_fresh("train.py", *flags, "--push_to_hub=me/model", cwd=tmp_path, **hub_of(server))
            assert result.code == 0, result.err
            assert f"uploaded to {server.url}/me/model" in result.out
            assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(server.files)
            assert not any("checkpoint" in name or "runs" in name or "trainer_state" in name for name in server.files)
            assert server.files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
            assert server.tokens == {f"Bearer {TOKEN}"}
        assert TOKEN not in result.out + result.err
        assert all(TOKEN.encode() not in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())

    def test_so_does_the_command(self, tmp_path: Path, tiny_model: Path) -> None:
        def share(server: UploadServer) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "emoft.share", str(tiny_model), "me/model", "--private"]
            environment = {**os.environ, **hub_of(server), "PYTHONPATH": str(ROOT)}
            return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

        with UploadServer({"/api/": 403}) as server:
            refused = share(server)
            assert refused.returncode == 2 and TOKEN not in refused.stderr
            (line,) = [line for line in refused.stderr.splitlines() if "error" in line]
            assert "this token may not write there" in line and "nothing is lost" in line
            server.fails = {}
            done = share(server)
            assert done.returncode == 0, done.stderr
            assert "model.safetensors" in server.files and server.visibility == "private"

    @pytest.mark.parametrize(
        ("fails", "told"),
        [
            ({"/api/": 401}, "the Hub knows no such token"),
            ({"/api/": 403}, "this token may not write there"),
            ({"/api/": 404}, "there is no such owner"),
            ({"/commit/": 409}, "somebody changed it meanwhile"),
            ({"/commit/": 500}, "the Hub answers with status 500"),
            ({"/commit/": 0}, "the connection broke"),
            ({"/put/": 0}, "uploaded to me/model"),
        ],
        ids=["no token", "not allowed", "no owner", "changed", "broken", "cut", "cut in a large file"],
    )
    def test_a_failed_one_loses_nothing(
        self, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, fails: dict[str, int], told: str
    ) -> None:
        def content() -> dict[str, str]:
            return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tiny_model.iterdir()}

        before = content()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its tries
        with UploadServer(fails) as server:
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
            api = functools.partial(huggingface_hub.HfApi, endpoint=server.url, token=TOKEN)
            monkeypatch.setattr(huggingface_hub, "HfApi", api)
            with pytest.raises(UserError) as failed:
                upload(tiny_model, "me/model")
            line = str(failed.value)
            assert told in line and f"emoft.share {tiny_model} me/model" in line and TOKEN not in line
            assert not server.files and content() == before
            server.fails = {}
            assert upload(tiny_model, "me/model") == f"{server.url}/me/model"
            assert set(server.files) <= set(before) and server.visibility == "public"

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            ([], "name a folder and OWNER/NAME"),
            (["nowhere", "me/model"], "holds no model.safetensors"),
            (["{model}", "model"], "write OWNER/NAME"),
        ],
    )
    def test_mistakes_are_told_at_once(
        self, run: Callable[..., Result], tiny_model: Path, words: list[str], told: str
    ) -> None:
        result = run("-m", "emoft.share", *(word.format(model=tiny_model) for word in words))
        assert result.code == 2 and told in result.err

    def test_a_run_is_not_begun_for_a_name_that_is_none(self, run: Callable[..., Result]) -> None:
        result = run("train.py", "--config=demo", "--push_to_hub=nobody")
        assert result.code == 2 and "write OWNER/NAME" in result.err
