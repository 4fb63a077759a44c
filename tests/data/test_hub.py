"""The Hub in reach, out of reach in every way a network has, and without what it was asked for."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
from conditional_recipe import check_run
from conftest import ROOT, SENTENCES, Result, WarmScripts, environment, run_fresh
from datasets import Dataset
from hub_server import LABELS, HubServer, free_port, write_emotion
from safetensors.torch import load_file

from emoft.data.hub import PROBE_SECONDS

UNKNOWN_HOST = "http://no-such-host.invalid"
# In a fresh process the imports come on top: six seconds on a quiet machine, and no matter of the Hub.
START_SECONDS = 10  # for a process with its imports behind it, from noticing how things stand to the end of a tiny run


class Hub(WarmScripts):
    """An address for a Hub, and scripts whose libraries were imported with that address in HF_ENDPOINT."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories = folder / "repositories"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "warm_start.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **online(folder, self.url)},
        )

    def __call__(self, script: str, *args: object, cwd: Path, stdin: str = "", **env: str) -> Result:
        (process,) = self.start(script, *args, cwd=cwd, stdin=stdin, **env)
        timer = threading.Timer(60, os.kill, (process, signal.SIGKILL))  # not to wait for a network for ever
        timer.start()
        try:
            return self.finish()
        finally:
            timer.cancel()

    def up(self) -> HubServer:
        return HubServer(self.repositories, self.port)

    def down(self) -> HubServer:
        """A Hub that has only errors to offer."""
        return HubServer(self.repositories, self.port, status=503)

    def busy(self) -> HubServer:
        """A Hub that is asked too often."""
        return HubServer(self.repositories, self.port, status=429)

    def sign_in(self) -> HubServer:
        """A network that answers for everybody."""
        return HubServer(self.repositories, self.port, status=200, page=b"<html>Welcome! Please sign in.</html>")

    def refusing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def silent(self) -> AbstractContextManager[object]:
        """Accepts connections and never answers."""
        return socket.create_server(("127.0.0.1", self.port))


def online(folder: Path, url: str) -> dict[str, str]:
    """The environment of a process with a private cache and the Hub at an address of ours."""
    names = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "HF_UPDATE_DOWNLOAD_COUNTS": "0", "no_proxy": "*"}
    return environment(folder, **names)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def messages(result: Result) -> list[str]:
    return [line for line in result.error_lines if line.replace("\x1b[A", "").strip()]


def assert_only_warning(result: Result, url: str) -> None:
    assert result.code == 0, result.err
    assert "saved the model" in result.out
    (warning,) = messages(result)
    assert warning.startswith(f"warning: {url} is out of reach (")
    assert warning.endswith("): using the cache")


def assert_error(result: Result, *words: str) -> None:
    """One line of error and at most one of warning, with exit code 2."""
    *warnings, error = messages(result)
    assert result.code == 2, result.err
    assert len(warnings) <= 1
    assert all(line.startswith("warning: ") for line in warnings)
    assert error.startswith("train.py: error: --")
    assert [word for word in words if word not in error] == [], error


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Hub]:
    """An address where no Hub is yet, and its repositories: gpt2, a model without a tokenizer, dair-ai/emotion."""
    hub = Hub(tmp_path_factory.mktemp("hub"))
    gpt2 = hub.repositories / "models" / "openai-community" / "gpt2"
    bare = hub.repositories / "models" / "someone" / "no-tokenizer"
    for folder in (gpt2, bare):
        folder.mkdir(parents=True)
    for file in tiny_model.iterdir():
        (gpt2 / file.name).write_bytes(file.read_bytes())
        if "token" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    (gpt2 / "pytorch_model.bin").write_bytes(b"the same, for older programs")
    shutil.copytree(gpt2, bare.parent / "bin-only", ignore=shutil.ignore_patterns("*.safetensors"))
    (bare.parent / "bin-only" / "pytorch_model.bin").write_bytes(b"weights")
    files = ("split/train", "split/validation", "split/test", "unsplit/train")
    write_emotion(hub.repositories, dict.fromkeys(files, SENTENCES))
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def first_run(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[str], Path]:
    """`python train.py` with the Hub in reach, what the Hub was asked for, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("first-run")
    with hub.up() as server:
        result = hub("train.py", cwd=folder)
    return result, server.requests, folder


@pytest.fixture
def cached(hub: Hub, first_run: object) -> Hub:
    """The Hub after the run that put everything into the cache."""
    return hub


def test_downloads_what_it_needs_and_trains(first_run: tuple[Result, list[str], Path], tiny_model: Path) -> None:
    result, requests, folder = first_run
    assert result.code == 0, result.err
    assert messages(result) == []
    files = {re.sub(".*/resolve/[^/]+/| bytes=.*", "", line) for line in requests if line.startswith("GET")}
    assert {"model.safetensors", "tokenizer.json", "split/train-00000-of-00001.parquet"} <= files
    assert not {"unsplit/train-00000-of-00001.parquet", "pytorch_model.bin"} & files
    model = folder / "gpt2-emotion-finetuned"
    trained, given = (load_file(path / "model.safetensors") for path in (model, tiny_model))
    name = "transformer.wte.weight"
    assert 0 < (trained[name] - given[name]).abs().max() < 0.01  # 6 steps away from the downloaded weights
    state = json.loads((model / "trainer_state.json").read_text())
    assert state["global_step"] == 6  # 3 epochs of 8 rows, 4 at a time
    assert "eval_loss" in json.loads((model / "all_results.json").read_text())


@pytest.mark.parametrize("outage", ["refusing", "silent", "down", "busy", "sign_in"])
def test_starts_from_the_cache(cached: Hub, tmp_path: Path, outage: str) -> None:
    with getattr(cached, outage)(), within(PROBE_SECONDS + START_SECONDS):
        result = cached("train.py", cwd=tmp_path)
    assert_only_warning(result, cached.url)


def test_starts_from_the_cache_in_a_fresh_process(cached: Hub, tmp_path: Path) -> None:
    result = run_fresh("train.py", cwd=tmp_path, timeout=60, **online(cached.folder, UNKNOWN_HOST))
    assert_only_warning(result, UNKNOWN_HOST)


def test_keeps_the_labels_in_the_cache(cached: Hub, tmp_path: Path) -> None:
    result = cached("train.py", "--template", "{label}: {text}", "--max_steps", 1, cwd=tmp_path)
    assert_only_warning(result, cached.url)
    assert json.loads((tmp_path / "gpt2-emotion-finetuned" / "emoft.json").read_text())["labels"] == LABELS


@pytest.mark.parametrize(("flag", "name"), [("dataset_name", "someone/uncached"), ("model_name_or_path", "uncached")])
def test_out_of_reach_and_not_in_the_cache(cached: Hub, tmp_path: Path, flag: str, name: str) -> None:
    with within(START_SECONDS):
        result = cached("train.py", f"--{flag}", name, cwd=tmp_path)
    assert_error(result, f"--{flag} {name}", "not in the cache", "refused", "local folder", "--config demo")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("outage", ["silent", "unknown host", "HF_HUB_OFFLINE"])
def test_out_of_reach_and_nothing_in_the_cache(hub: Hub, tmp_path: Path, train_file: Path, outage: str) -> None:
    """Each in a fresh process, the one that waits longest with the data missing, the others with the model missing."""
    env = online(tmp_path, hub.url if outage == "silent" else UNKNOWN_HOST)
    if outage == "HF_HUB_OFFLINE":
        env["HF_HUB_OFFLINE"] = "1"
    data = [] if outage == "silent" else ["--train_file", train_file, "--delimiter", ";"]
    with hub.silent():
        result = run_fresh("train.py", *data, cwd=tmp_path, timeout=60, **env)
    what = "--model_name_or_path gpt2" if data else "--dataset_name dair-ai/emotion"
    reason = "HF_HUB_OFFLINE" if outage == "HF_HUB_OFFLINE" else "the Hub is out of reach ("
    assert_error(result, what, "not in the cache", reason, "local folder", "--config demo")
    assert len(messages(result)) == (1 if outage == "HF_HUB_OFFLINE" else 2)
    assert not (tmp_path / "gpt2-emotion-finetuned").exists()


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("model_name_or_path", "someone/nothing", ["to be had from the Hub", "spelling"]),
        ("model_name_or_path", "someone/nothing", ["HF_TOKEN"]),
        ("dataset_name", "someone/nothing", ["HF_TOKEN"]),
        ("model_name_or_path", "someone/no-tokenizer", ["no vocab.json", "another"]),
        ("model_name_or_path", "someone/bin-only", [".bin", "may run code"]),
        ("model_revision", "v7", ["gpt2", "branch"]),
        ("dataset_revision", "v7", ["dair-ai/emotion", "branch"]),
        ("dataset_name", "someone/nothing", ["no data set to be had from the Hub", "spelling"]),
        ("dataset_config_name", "spilt", ["dair-ai/emotion", "'split', 'unsplit'"]),
    ],
)
def test_not_on_the_hub(cached: Hub, tmp_path: Path, flag: str, value: str, words: list[str]) -> None:
    with cached.up(), within(START_SECONDS):
        result = cached("train.py", f"--{flag}", value, cwd=tmp_path)
    assert_error(result, f"--{flag} {value}", *words)
    assert len(messages(result)) == 1


def test_folder_without_tokenizer(cached: Hub, tmp_path: Path) -> None:
    folder = cached.repositories / "models" / "someone" / "no-tokenizer"
    result = cached("train.py", "--model_name_or_path", folder, cwd=tmp_path)
    assert_error(result, f"--model_name_or_path {folder}", "no tokenizer")


@pytest.mark.parametrize("status", [401, 403])
def test_not_shown_to_everybody(cached: Hub, tmp_path: Path, status: int) -> None:
    with HubServer(cached.repositories, cached.port, status=status), within(START_SECONDS):
        result = cached("train.py", cwd=tmp_path)
    assert_error(result, "--dataset_name dair-ai/emotion", "HF_TOKEN")


def test_a_revision(cached: Hub, tmp_path: Path) -> None:
    """Of a model, whose weights another one lack, and of data; both are kept with the run."""
    models, data = (cached.repositories / kind for kind in ("models", "datasets"))
    shutil.copytree(models / "openai-community" / "gpt2", models / "openai-community" / "gpt2@old")
    shutil.copytree(data / "dair-ai" / "emotion", data / "dair-ai" / "emotion@old")
    rows = Dataset.from_dict({"text": ["an old text"] * 2, "label": ["joy", "love"]})
    rows.to_parquet(data / "dair-ai" / "emotion@old" / "split" / "train-00000-of-00001.parquet")
    model = models / "openai-community" / "gpt2@old"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attn_pdrop": 0.25}))
    words = ["--model_revision=old", "--dataset_revision=old", "--max_steps=1", "--template={label}: {text}"]
    with cached.up():
        result = cached("train.py", *words, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "2 examples" in result.out
    run = tmp_path / "gpt2-emotion-finetuned"
    assert json.loads((run / "config.json").read_text())["attn_pdrop"] == 0.25
    settings = (run / "train_config.yaml").read_text()
    assert "model_revision: old" in settings and "dataset_revision: old" in settings
    # Without the Hub the model's cache tells revisions apart, that of the data does not, and says so.
    offline = cached("train.py", *words, "--output_dir=again", cwd=tmp_path)
    assert_error(offline, "--dataset_revision old", "out of reach")
    data_file = tmp_path / "train.csv"
    data_file.write_text("text,label\na text,joy\nanother,love\n")
    offline = cached("train.py", *words[:1], f"--train_file={data_file}", "--output_dir=again", cwd=tmp_path)
    assert_only_warning(offline, cached.url)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["attn_pdrop"] == 0.25


def test_a_model_of_ours_is_used_as_a_folder_of_ours(cached: Hub, tmp_path: Path, train_file: Path) -> None:
    """The text format is read from the Hub too: --emotion, the evaluation and a further training know it."""
    words = ["--template={label}: {text}", f"--train_file={train_file}", "--delimiter=;", "--max_steps=1"]
    assert cached("train.py", *words, cwd=tmp_path).code == 0
    ours = cached.repositories / "models" / "someone" / "ours"
    shutil.copytree(tmp_path / "gpt2-emotion-finetuned", ours, ignore=shutil.ignore_patterns("runs"))
    with cached.up():
        said = cached("generate.py", "--model_name_or_path=someone/ours", "--emotion=joy", cwd=tmp_path)
        wrong = cached("generate.py", "--model_name_or_path=someone/ours", "--emotion=joi", cwd=tmp_path)
        words = ["--model_name_or_path=someone/ours", f"--test_file={train_file}", "--delimiter=;"]
        figures = cached("-m", "emoft.evaluate", *words, cwd=tmp_path)
    assert said.code == 0 and said.out.startswith("joy:"), said.err
    assert wrong.code == 2 and "did you mean joy?" in wrong.err
    assert figures.code == 0 and "accuracy" in figures.out, figures.err
    assert cached("generate.py", "--model_name_or_path=someone/ours", "--emotion=joy", cwd=tmp_path).out == said.out


def test_the_recipe_of_the_pretrained_model(cached: Hub, tmp_path: Path) -> None:
    """The short form of conditional_recipe.py, which takes a model of GPT-2's size and stops and resumes as well."""
    with cached.up():
        done = cached("train.py", "--config=conditional", "--max_steps=2", cwd=tmp_path)
        assert done.code == 0, done.err
        model = "--model_name_or_path=gpt2-emotion-conditional"
        check_run(tmp_path / "gpt2-emotion-conditional")
        judged = cached("-m", "emoft.evaluate", model, "--generate=1", cwd=tmp_path)
        words = ["generate.py", model, "--emotion=joy", "--do_sample", "--strength=1", "--quantize=int8"]
        said = cached(*words, cwd=tmp_path)
    assert judged.code == 0 and "accuracy" in judged.out, judged.err
    assert said.code == 0 and said.out.startswith("joy:"), said.err


def test_a_download_that_cannot_be_finished(hub: Hub, tmp_path: Path, train_file: Path) -> None:
    """There is no room for it, or the line breaks again and again: one line says so, and later it is whole."""
    env = {**online(tmp_path, hub.url), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    words = ["--train_file", train_file, "--delimiter=;", "--max_steps=1"]
    size = (hub.repositories / "models" / "openai-community" / "gpt2" / "model.safetensors").stat().st_size
    limited = ["bash", "-c", 'ulimit -f $0; exec "$@"', str(size // 1024 // 2), sys.executable, ROOT / "train.py"]
    with hub.up():
        command = list(map(str, [*limited, *words]))
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True)
    full = Result(done.returncode, done.stdout, done.stderr)
    assert_error(full, "--model_name_or_path gpt2", "cannot be kept in the cache", "File too large", "HF_HOME")
    with HubServer(hub.repositories, hub.port, cuts=size // 3):
        broken = run_fresh("train.py", *words, cwd=tmp_path, timeout=100, **env)
    assert_error(broken, "--model_name_or_path gpt2", "broke off", "again")
    with hub.up():
        done = run_fresh("train.py", *words, cwd=tmp_path, timeout=100, **env)
    assert done.code == 0, done.err
