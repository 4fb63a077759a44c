"""The recipe `conditional` from its plan to its card, without the pretrained weights:
`python tests/conditional_recipe.py --data FOLDER --tokenizer FOLDER`.

A stand-in for the Hub serves a GPT-2 small of random weights, whose files are laid out as those of the real one, with
the tokenizer of one folder and the `text;label` lines of the other, as dair-ai/emotion holds them. Each command runs in
a process of its own, as a user would type it; the training is short, and stopped and resumed on the way. What
is checked is that every step works and fits with the others. The figures say nothing about the real weights.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import ROOT
from hub_server import LABELS, HubServer, free_port, write_emotion
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

# What the README says that a run leaves, but for what went wrong.
FILES = (
    "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "merges.txt", "README.md", "emoft.json", "train_config.yaml", "trainer_state.json",
    "all_results.json", "runs",
)  # fmt: skip
FIGURES = {  # of the card's table, and their names in all_results.json
    "loss, in nats a token": "eval_loss",
    "perplexity": "perplexity",
    "bits per byte": "bits_per_byte",
    "emotion accuracy": "emotion_accuracy",
    "macro F1 of emotions": "macro_f1",
}


@dataclass
class Done:
    """A command that ended."""

    name: str
    code: int
    out: str
    err: str
    seconds: float
    cpu_seconds: float  # of all its threads
    memory: int  # bytes, at most

    def row(self) -> str:
        gib = self.memory / 2**30
        return f"| {self.name} | {self.code} | {self.seconds:.0f} | {self.cpu_seconds:.0f} | {gib:.2f} |"


class User:
    """Types commands in a folder, with a fresh cache and the stand-in for a Hub."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.done = folder, list[Done]()
        away = {"HF_HUB_OFFLINE": "0", "HF_UPDATE_DOWNLOAD_COUNTS": "0", "no_proxy": "*", "PYTHONPATH": str(ROOT)}
        self.environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_ENDPOINT": url, **away}

    def types(self, name: str, *words: object, stop_at: Path | None = None, code: int = 0) -> Done:
        """Run a command to its end; send it SIGTERM as soon as a path is there, if told."""
        streams = self.folder / "stdout", self.folder / "stderr"
        with streams[0].open("wb") as out, streams[1].open("wb") as err:
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *map(str, words)], cwd=self.folder, env=self.environment, stdout=out, stderr=err
            )
            ended, status, used = 0, 0, None
            while not ended:
                if stop_at and stop_at.exists():
                    process.send_signal(signal.SIGTERM)
                    stop_at = None
                time.sleep(0.1)
                ended, status, used = os.wait4(process.pid, os.WNOHANG)
            seconds = time.perf_counter() - started
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in streams)
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu_seconds, memory = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
        self.done.append(Done(name, process.returncode, out, err, seconds, cpu_seconds, memory))
        print(f"---- {name}\n{out}{err}", flush=True)
        assert process.returncode == code, name
        assert "Traceback" not in err, name
        return self.done[-1]


def read_rows(path: Path) -> list[tuple[str, str]]:
    """Return text and label of each line."""
    rows = [line.rpartition(";") for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [(text, label) for text, _, label in rows]


def write_model(folder: Path, tokenizer: Path, model: GPT2LMHeadModel) -> None:
    """Write a model as the Hub holds GPT-2: without `transformer.` and the head, and with the masks of old programs."""
    folder.mkdir(parents=True)
    weights = {name: value.contiguous() for name, value in model.transformer.state_dict().items()}
    length = model.config.n_positions
    for block in range(model.config.n_layer):
        weights[f"h.{block}.attn.bias"] = torch.ones(length, length).tril().view(1, 1, length, length)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer / name, folder)
    backend = ByteLevelBPETokenizer.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}', encoding="utf-8")


def write_hub(folder: Path, data: Path, tokenizer: Path) -> None:
    """Write the repositories that the recipe asks for."""
    torch.manual_seed(0)
    write_model(folder / "models" / "openai-community" / "gpt2", tokenizer, GPT2LMHeadModel(GPT2Config()))
    train, validation = (read_rows(data / f"{split}.txt") for split in ("train", "validation"))
    test = read_rows(data / "test.txt") if (data / "test.txt").exists() else validation  # as many, for the time
    splits = {"train": train, "validation": validation, "test": test}
    write_emotion(folder, {**{f"split/{name}": rows for name, rows in splits.items()}, "unsplit/train": train})


def check_run(run: Path) -> None:
    """See that a run of `conditional` left all files, and a card that tells what it was made of and how good it is."""
    assert [name for name in FILES if not (run / name).exists()] == []
    text_format = json.loads((run / "emoft.json").read_text())
    assert (text_format["template"], text_format["labels"]) == ("{label}: {text}", LABELS)
    card, results = (run / "README.md").read_text(), json.loads((run / "all_results.json").read_text())
    for words in (
        "base_model: gpt2",
        "license: mit",
        "made from [gpt2](https://huggingface.co/gpt2), fine-tuned",
        "[dair-ai/emotion](https://huggingface.co/datasets/dair-ai/emotion)",
        "`{label}: {text}`",
        "--label_contrast 0.2",
    ):
        assert words in card, words
    for told, name in FIGURES.items():
        assert f"| {told} | validation | {results[name]:.4f} | [" in card, told


def figures_of(run: Path) -> list[dict[str, object]]:
    """Return the log of a run without what the clock told."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    clock = re.compile(r"runtime|per_second|share_of_peak|memory|^total_flos$")
    return [{name: value for name, value in entry.items() if not clock.search(name)} for entry in log]


def check_same(run: Path, other: Path) -> None:
    """See that two runs ended with the same weights and the same log."""
    ours, theirs = (path / "model.safetensors" for path in (run, other))
    assert ours.read_bytes() == theirs.read_bytes(), "other weights"
    assert figures_of(run) == figures_of(other)


def follow(user: User, steps: int, texts: int) -> None:
    """Go through the recipe: plan, train, stop, resume, evaluate, generate."""
    recipe = [ROOT / "train.py", "--config", "conditional"]
    plan = user.types("--plan of the whole recipe", *recipe, "--plan")
    assert "This fits" in plan.out

    # With a fixed number of threads, and all flags alike: the two runs below have to end with the same bits.
    brief = ["--max_steps", steps, "--max_eval_samples", texts, "--save_steps", max(1, steps // 2)]
    brief += ["--logging_steps", 1, "--num_threads", 2]
    user.types(f"{steps} steps", *recipe, *brief, "--output_dir", "whole")
    run = user.folder / "stopped"
    brief += ["--output_dir", run.name]
    first = run / f"checkpoint-{max(1, steps // 2)}"
    user.types("the same, stopped by SIGTERM", *recipe, *brief, stop_at=first, code=128 + signal.SIGTERM)
    assert not (run / "model.safetensors").exists()
    resumed = user.types("resumed", *recipe, *brief, "--resume_from_checkpoint", "latest")
    assert "resuming from" in resumed.out
    check_run(run)
    check_same(run, user.folder / "whole")

    judge = ["-m", "emoft.evaluate", "--model_name_or_path", run.name, "--max_eval_samples", texts]
    judged = user.types("evaluate --generate 2", *judge, "--generate", 2)
    assert "accuracy" in judged.out and "perplexity" in judged.out
    write = [ROOT / "generate.py", "--model_name_or_path", run.name, "--emotion", "joy", "--do_sample"]
    for words in ([], ["--strength", 1], ["--quantize", "int8"]):
        said = user.types(" ".join(map(str, ["generate", *words])), *write, *words)
        assert said.out.startswith("joy:"), said.out


def main() -> None:
    """Follow the recipe and print what each command took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of train.txt and validation.txt, text;label")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of GPT-2's vocab.json and merges.txt")
    parser.add_argument("--max_steps", type=int, default=3, help="of the short training, 3 or more")
    parser.add_argument("--max_eval_samples", type=int, default=32, help="texts that each split is cut to")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_hub(folder / "hub", flags.data, flags.tokenizer)
        port = free_port()
        user = User(folder, f"http://127.0.0.1:{port}")
        try:
            with HubServer(folder / "hub", port):
                follow(user, flags.max_steps, flags.max_eval_samples)
        finally:
            print("\n| command | exit code | seconds | seconds of all cores | GiB at most |\n|" + " --- |" * 5)
            print("\n".join(done.row() for done in user.done))


if __name__ == "__main__":
    main()
