"""Emotion by degrees, against the formula computed row by row without any cache."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from emoft.data.template import TextFormat
from emoft.data.tokens import decode
from emoft.errors import UserError
from emoft.model.decoding import Decoder
from emoft.model.generation import encode_prompt, generate_all, generate_batch
from emoft.model.steering import Steering, build_steering, evidence_of, steer
from emoft.model.tokenizer import train_tokenizer
from emoft.training.precision import Precision

LABELS = ["anger", "joy", "surprise"]
FORMAT = TextFormat("{label}: {text}", labels=LABELS)


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return train_tokenizer([f"{label}: i feel so good today and then bad" for label in LABELS] * 9, 300)


@pytest.fixture(scope="module")
def model(tokenizer: GPT2Tokenizer) -> GPT2LMHeadModel:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=48, n_embd=24, n_layer=2, n_head=2, initializer_range=0.5,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def decoder_of(model: GPT2LMHeadModel) -> Decoder:
    return Decoder(model, Precision("no", torch.device("cpu")))


def by_formula(
    model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, label: str, text: str, strength: float, count: int
) -> list[int]:
    """The likeliest tokens by Bayes' rule, each from whole forward passes over the text under every label."""
    prefixes = {each: encode_prompt(tokenizer, FORMAT.prompt(each)) for each in LABELS}
    whole = encode_prompt(tokenizer, FORMAT.prompt(label, text))
    tokens, new = whole[len(prefixes[label]) :], []
    for _ in range(count):
        logs, evidence = {}, {}
        for each, prefix in prefixes.items():
            with torch.no_grad():
                all_logs = model(torch.tensor([prefix + tokens])).logits[0].double().log_softmax(-1)
            logs[each] = all_logs[-1]
            places = range(len(prefix) - 1, len(prefix) - 1 + len(tokens))
            evidence[each] = sum(float(all_logs[place, token]) for place, token in zip(places, tokens, strict=True))
        joint = torch.stack([evidence[each] + logs[each] for each in LABELS])
        posterior = joint[LABELS.index(label)] - joint.logsumexp(0)
        token = int((logs[label] + strength * posterior).argmax())
        tokens, new = [*tokens, token], [*new, token]
        if token == tokenizer.eos_token_id:
            break
    return new


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
def test_each_token_is_the_one_of_the_formula(
    model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, strength: float
) -> None:
    prompts = [("joy", ""), ("anger", "i feel"), ("surprise", "then so")]
    steering = build_steering(tokenizer, FORMAT, strength)
    texts = [FORMAT.prompt(*each) for each in prompts]
    results = generate_batch(decoder_of(model), tokenizer, texts, max_new_tokens=8, steering=steering)
    for (label, text), result in zip(prompts, results, strict=True):
        expected = by_formula(model, tokenizer, label, text, strength, 8)
        expected = expected[:-1] if expected[-1] == tokenizer.eos_token_id else expected
        assert result.text == FORMAT.prompt(label, text) + decode(tokenizer, expected)


def test_without_strength_it_is_what_the_prompt_alone_makes(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer) -> None:
    texts = [FORMAT.prompt(label, "i feel") for label in LABELS]
    plain = generate_batch(decoder_of(model), tokenizer, texts, max_new_tokens=12, no_repeat_ngram_size=2)
    steering = build_steering(tokenizer, FORMAT, 0.0)
    steered = generate_batch(
        decoder_of(model), tokenizer, texts, max_new_tokens=12, no_repeat_ngram_size=2, steering=steering
    )
    assert steered == plain


def test_draws_follow_the_steered_chances(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer) -> None:
    steering = build_steering(tokenizer, FORMAT, 1.0)
    prompt = FORMAT.prompt("joy")
    torch.manual_seed(0)
    results = generate_batch(
        decoder_of(model),
        tokenizer,
        [prompt] * 3000,
        max_new_tokens=1,
        steering=steering,
        do_sample=True,
        top_k=5,
        temperature=0.9,
    )
    rows = steering.rows(encode_prompt(tokenizer, prompt))
    with torch.no_grad():
        logs = torch.stack([model(torch.tensor([row])).logits[0, -1].log_softmax(-1) for row in rows])[None]
    steered = steer(logs, torch.zeros(1, 3), torch.tensor([[0.0, 1.0, 0.0]]), 1.0)[0] / 0.9
    best = steered.topk(5)
    chances = best.values.softmax(-1)
    expected: Counter[str] = Counter()  # two tokens may be the same text
    for token, chance in zip(best.indices.tolist(), chances.tolist(), strict=True):
        expected[prompt + ("" if token == tokenizer.eos_token_id else decode(tokenizer, [token]))] += chance
    found = Counter(result.text for result in results)
    assert set(found) <= set(expected)
    for text, chance in expected.items():
        assert found[text] / len(results) == pytest.approx(chance, abs=4 * (0.25 / len(results)) ** 0.5)


def test_it_raises_the_chance_of_the_emotion(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer) -> None:
    def share(strength: float) -> float:
        steering = build_steering(tokenizer, FORMAT, strength)
        torch.manual_seed(1)
        prompts = [FORMAT.prompt(label) for label in LABELS] * 20
        results = generate_all(
            decoder_of(model), tokenizer, prompts, 30, max_new_tokens=10, do_sample=True, steering=steering
        )
        texts = [encode_prompt(tokenizer, result.text) for (result,) in results]
        evidence = evidence_of(model, tokenizer.eos_token_id, steering, texts)
        own = torch.tensor([steering.own(text) for text in texts])
        return float((evidence.argmax(1) == own).float().mean())

    assert share(2.0) > share(0.0)


def test_a_mixture_is_between_its_emotions() -> None:
    torch.manual_seed(0)
    logs, evidence = torch.randn(1, 3, 50).log_softmax(-1), torch.randn(1, 3)
    one, two = (steer(logs, evidence, torch.tensor([shares]), 0.7) for shares in ([1.0, 0, 0], [0, 0, 1.0]))
    both = steer(logs, evidence, torch.tensor([[0.25, 0, 0.75]]), 0.7)
    assert torch.allclose(both, 0.25 * one + 0.75 * two, atol=1e-5)


@pytest.mark.parametrize(
    ("emotion", "shares"),
    [("joy", {"joy": 1.0}), (" joy ", {"joy": 1.0}), ("joy:3, anger:1", {"joy": 0.75, "anger": 0.25})],
)
def test_mixtures_are_read(emotion: str, shares: dict[str, float]) -> None:
    assert FORMAT.mixture(emotion) == pytest.approx(shares)


@pytest.mark.parametrize("emotion", ["joy:0.7,joy:0.3", "joy:x", "joy:0,anger:1", "joy,anger", ":1", "joy:-1,anger:2"])
def test_other_mixtures_are_refused(emotion: str) -> None:
    with pytest.raises(UserError, match="is no mixture"):
        FORMAT.mixture(emotion)


def test_a_label_may_hold_a_colon() -> None:
    assert TextFormat("{label}: {text}", labels=["a:1", "b"]).mixture("a:1") == {"a:1": 1.0}


@pytest.mark.parametrize("template", ["Emotion: {text}", "{text} ({label})"])
def test_models_that_cannot_be_steered_are_refused(tokenizer: GPT2Tokenizer, template: str) -> None:
    with pytest.raises(UserError, match="--strength needs a model that writes for several emotions"):
        build_steering(tokenizer, TextFormat(template, labels=LABELS if "label" in template else []), 1.0)


def test_the_longest_label_is_taken() -> None:
    steering = Steering([[5], [5, 6]], ["so", "so good"], 1.0)
    assert steering.own([5, 6, 7]) == 1 and steering.own([5, 7]) == 0
    assert steering.rows([5, 7]) == [[5, 7], [5, 6, 7]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: GPT2Tokenizer) -> Path:
    path = tmp_path_factory.mktemp("steered")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    FORMAT.save(path)
    return path


def test_the_command_takes_it_in_every_way(run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
    words = ["--model_name_or_path", folder, "--max_new_tokens=6", "--strength=2"]
    lone = run("generate.py", *words, "--emotion=joy", "--text=i feel")
    assert lone.code == 0, lone.err
    (tmp_path / "prompts.txt").write_text("joy: i feel\nanger: so\n")
    several = run("generate.py", *words, "--prompts_file=prompts.txt")
    assert several.code == 0, several.err
    assert several.out.splitlines()[0] == lone.out.strip()
    spoken = run("generate.py", *words, "--interactive", stdin="joy: i feel\nno emotion\n\n")
    assert spoken.code == 0, spoken.err
    assert lone.out.strip() in spoken.out and "a prompt names none of them" in spoken.out
    drawn = [run("generate.py", *words, "--emotion=joy:0.5,anger:0.5", "--do_sample") for _ in range(2)]
    assert drawn[0].code == 0 and drawn[0].out == drawn[1].out


def test_the_command_refuses_what_names_no_emotion(run: Callable[..., Result], folder: Path) -> None:
    result = run("generate.py", "--model_name_or_path", folder, "--prompt=hello", "--strength=1")
    assert result.code == 2 and "begin each prompt with one of anger, joy, surprise" in result.err
    (line,) = [line for line in result.error_lines if "error" in line]
    assert line.startswith("generate.py: error: --strength")
