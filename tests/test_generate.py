"""generate.py in real processes: the tutorial's result, batches, files, streams, text in Khmer."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Result, environment
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.data.template import TextFormat

PROMPTS = [
    "i feel",
    "my heart is full of love for my little sister and for the old dog",
    "",
    "rain ខ្ញុំ",
    "i feel happy because",
]
KHMER = [
    "ខ្ញុំសប្បាយចិត្តណាស់ថ្ងៃនេះ ព្រោះមិត្តភក្តិមកលេងផ្ទះ",
    "ខ្ញុំសោកសៅពេលឆ្កែរបស់ខ្ញុំបាត់ពីផ្ទះ",
    "ខ្ញុំខឹងនឹងអ្នកជិតខាងដែលបើកតន្ត្រីខ្លាំងពេញមួយយប់",
    "ខ្ញុំភ័យពេលឮផ្គរលាន់នៅក្នុងយប់ងងឹត",
    "ខ្ញុំស្រលាញ់ម៉ាក់របស់ខ្ញុំច្រើនជាងអ្វីៗទាំងអស់",
    "ខ្ញុំភ្ញាក់ផ្អើលដែលបានជួបមិត្តចាស់នៅផ្សារ",
]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes long, in a folder as train.py leaves it, with a template that names the emotion."""
    folder = tmp_path_factory.mktemp("trained")
    GPT2LMHeadModel.from_pretrained(tiny_model).save_pretrained(folder)
    GPT2Tokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    TextFormat("{label}: {text}", labels=["joy", "fear"]).save(folder)
    return folder


@pytest.fixture
def generate(run: Callable[..., Result], folder: Path) -> Callable[..., Result]:
    def generate_with(*words: object, **env: str) -> Result:
        result = run("generate.py", "--model_name_or_path", folder, *words, **env)
        assert result.code == 0, result.err
        return result

    return generate_with


def test_the_default_is_the_tutorials_own_code(generate: Callable[..., Result], folder: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(folder)
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    input_ids = tokenizer.encode("Emotion: i didnt feel well", return_tensors="pt")
    output = model.generate(input_ids, max_length=100, num_return_sequences=1, no_repeat_ngram_size=2)
    expected = tokenizer.decode(output[0], skip_special_tokens=True).replace("\ufffd", "")
    assert len(output[0]) == 100
    assert generate().out == expected + "\n"


def test_a_batch_gives_each_prompt_what_it_gets_alone(generate: Callable[..., Result]) -> None:
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    together = generate(*words, "--json", "--batch_size", 3).out.splitlines()
    assert [json.loads(line)["prompt"] for line in together] == PROMPTS
    alone = [generate("--prompt", prompt, "--json").out.strip() for prompt in PROMPTS]
    assert together == alone
    assert len({json.loads(line)["new_tokens"] for line in alone}) > 1, "100 tokens together with the prompt"


def test_results_stand_in_the_order_asked(generate: Callable[..., Result], tmp_path: Path) -> None:
    """More prompts than are sorted together, each with several results."""
    prompts = [f"i feel {'very ' * (number * 7 % 5)}{number}" for number in range(40)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    words = ["--prompts_file", "prompts.txt", "--json", "--max_new_tokens", 3, "--do_sample"]
    out = generate(*words, "--num_return_sequences", 3, "--batch_size", 2).out
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == [prompt for prompt in prompts for _ in range(3)]
    assert [row["sequence"] for row in rows] == [1, 2, 3] * 40
    assert all(row["text"].startswith(row["prompt"]) for row in rows)


def test_in_half_precision_it_writes_too(generate: Callable[..., Result]) -> None:
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert len(generate(*words, "--mixed_precision=bf16", "--json").out.splitlines()) == len(PROMPTS)


def test_prompts_from_a_file_and_from_standard_input(generate: Callable[..., Result], tmp_path: Path) -> None:
    prompts = [prompt for prompt in PROMPTS if prompt]
    (tmp_path / "prompts.txt").write_bytes("\r\n\r\n".join(prompts).encode("utf-8-sig"))
    expected = generate(*[word for prompt in prompts for word in ("--prompt", prompt)]).out
    assert generate("--prompts_file", "prompts.txt").out == expected
    assert generate("--prompts_file", "-", stdin="\n".join(prompts)).out == expected


def test_a_prompt_is_a_line_and_stands_whole_before_its_continuation(generate, tmp_path: Path) -> None:
    prompts = ["i feel\u2028so", "the <|endoftext|> of it"]  # a line separator of Unicode ends no line of a file
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    out = generate("--prompts_file", "prompts.txt", "--json").out
    rows = [json.loads(line) for line in out.removesuffix("\n").split("\n")]
    assert [row["prompt"] for row in rows] == prompts
    assert all(row["text"].startswith(row["prompt"]) for row in rows)


def test_the_default_length_suits_a_small_model(run, tiny_model: Path, tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(tiny_model)
    model.config.n_positions = 32
    GPT2LMHeadModel(model.config).save_pretrained(tmp_path / "small")
    GPT2Tokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "small")
    result = run("generate.py", "--model_name_or_path=small", "--json")
    assert result.code == 0, result.err
    row = json.loads(result.out)
    prompt = GPT2Tokenizer.from_pretrained(tiny_model)(row["prompt"])["input_ids"]
    assert row["finished"] or row["new_tokens"] == 32 - len(prompt)
    asked = run("generate.py", "--model_name_or_path=small", "--max_length=40")
    assert asked.code == 2 and "32 positions" in asked.error_lines[-1]


def test_flags_that_have_no_effect_are_told(generate: Callable[..., Result]) -> None:
    result = generate("--prompt", "i feel", "--temperature", 0.5)
    assert result.err.startswith("warning: --temperature")
    assert "warning" not in generate("--prompt", "i feel", "--temperature", 0.5, "--do_sample").err


def test_sampling(generate: Callable[..., Result]) -> None:
    words = ["--prompt", "i feel", "--do_sample", "--num_return_sequences", 5, "--max_new_tokens", 8, "--json"]
    first = [json.loads(line) for line in generate(*words).out.splitlines()]
    assert [row["sequence"] for row in first] == [1, 2, 3, 4, 5]
    assert len({row["text"] for row in first}) == 5
    assert all(row["new_tokens"] <= 8 and row["text"].startswith("i feel") for row in first)
    assert [json.loads(line) for line in generate(*words).out.splitlines()] == first
    assert [json.loads(line) for line in generate(*words, "--seed", 7).out.splitlines()] != first
    likeliest = generate("--prompt", "i feel", "--do_sample", "--top_k", 1).out
    assert likeliest == generate("--prompt", "i feel").out


def test_an_emotion_goes_through_the_saved_template(generate: Callable[..., Result]) -> None:
    assert generate("--emotion", "joy").out == generate("--prompt", "joy:").out
    assert generate("--emotion", "fear", "--text", "i am").out == generate("--prompt", "fear: i am").out


class TestInteractive:
    def test_over_a_pipe_it_streams_what_a_batch_gives(self, generate: Callable[..., Result]) -> None:
        prompts = [prompt for prompt in PROMPTS if prompt]
        result = generate("--interactive", stdin="\n".join(prompts) + "\n")
        assert not result.error_lines, "how to leave is told to a person only"
        assert result.out == "".join(generate("--prompt", prompt).out for prompt in prompts)

    def test_over_a_terminal(self, folder: Path, generate: Callable[..., Result], tmp_path: Path) -> None:
        expected = generate("--prompt", "i feel").out.strip()
        terminal, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, ROOT / "generate.py", "--model_name_or_path", folder, "--interactive"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, **environment(tmp_path)},
        )
        os.close(theirs)
        os.write(terminal, b"i feel\n\x04")
        shown = b""
        while True:
            try:
                shown += os.read(terminal, 4096)
            except OSError:  # the other side has closed
                break
        assert process.wait(timeout=60) == 0
        text = shown.decode().replace("\r\n", "\n")
        assert expected in text
        assert "write a prompt and press Enter; an empty line or Ctrl-D leaves\n> " in text

    def test_a_prompt_that_is_too_long_does_not_end_it(self, generate: Callable[..., Result]) -> None:
        result = generate("--interactive", stdin="a b " * 100 + "\ni feel\n")
        first, _, rest = result.out.partition("\n")
        assert "--max_length 100" in first
        assert rest == generate("--prompt", "i feel").out


def test_a_reader_that_leaves_early_is_no_error(folder: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} {ROOT / 'generate.py'} --model_name_or_path {folder} --prompts_file - | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command],
        input="i feel\n" * 50,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment(tmp_path)},
    )
    assert done.stdout.startswith("i feel")
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


class TestKhmer:
    @pytest.fixture(scope="class")
    @classmethod
    def trained(cls, scripts, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Trained with a limit of 40 tokens, which cuts most texts within a character of three bytes."""
        folder = tmp_path_factory.mktemp("khmer")
        (folder / "khmer.txt").write_text("\n".join(KHMER * 8), encoding="utf-8")
        result = scripts(
            "train.py",
            "--train_file=khmer.txt",
            "--template={text}",
            "--model_name_or_path=",
            "--vocab_size=300",
            "--config_overrides=n_layer=2,n_embd=32,n_head=2,n_positions=128",
            "--max_length=40",
            "--learning_rate=0.01",
            "--output_dir=run",
            "--num_train_epochs=3",
            cwd=folder,
        )
        assert result.code == 0, result.err
        assert "\ufffd" not in result.out
        return folder / "run"

    def test_shows_no_broken_character(self, run: Callable[..., Result], trained: Path) -> None:
        tokenizer = GPT2Tokenizer.from_pretrained(trained)
        words = ["--model_name_or_path", trained, "--prompt", "ខ្ញុំ", "--do_sample", "--max_new_tokens", 25]
        result = run("generate.py", *words, "--num_return_sequences", 100, "--json", "--no_repeat_ngram_size", 0)
        texts = [json.loads(line)["text"] for line in result.out.splitlines()]
        assert len(texts) == 100
        assert "\ufffd" not in result.out
        assert all(text.startswith("ខ្ញុំ") for text in texts)
        assert sum(len(text) > 8 for text in texts) > 50, "it does write"
        # The library's own decoding of so many cut texts would show it.
        model = GPT2LMHeadModel.from_pretrained(trained)
        torch.manual_seed(0)
        ids = tokenizer(["ខ្ញុំ"] * 100, return_tensors="pt")
        cut = model.generate(**ids, do_sample=True, max_new_tokens=25, pad_token_id=tokenizer.eos_token_id)
        assert any("\ufffd" in text for text in tokenizer.batch_decode(cut, skip_special_tokens=True))

    def test_streams_no_broken_character(self, run: Callable[..., Result], trained: Path) -> None:
        words = ["--model_name_or_path", trained, "--interactive", "--do_sample", "--max_new_tokens", 25]
        result = run("generate.py", *words, stdin="ខ្ញុំ\n" * 30)
        assert result.code == 0, result.err
        assert len(result.out.splitlines()) == 30
        assert "\ufffd" not in result.out

    def test_is_printed_in_any_locale(self, run: Callable[..., Result], trained: Path, tmp_path: Path) -> None:
        words = ["--model_name_or_path", str(trained), "--prompt", "ខ្ញុំ"]
        env = {**os.environ, **environment(tmp_path), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = subprocess.run([sys.executable, ROOT / "generate.py", *words], capture_output=True, env=env, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode("utf-8") == run("generate.py", *words).out
