from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer, SuppressTokensLogitsProcessor

from emoft.data.template import TextFormat
from emoft.device import half_precision
from emoft.errors import UserError
from emoft.model.decoding import Decoder, Rows
from emoft.model.generation import (
    TerminalStream,
    check_prompts,
    choose_generation_precision,
    encode_prompt,
    generate_all,
    generate_batch,
    sample_texts,
)
from emoft.model.loading import TextModel
from emoft.training.precision import Precision

CPU = torch.device("cpu")
Parts = tuple[Decoder, GPT2Tokenizer]


def decoder_of(model: GPT2LMHeadModel) -> Decoder:
    return Decoder(model, Precision("no", CPU))


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> Parts:
    tokenizer = GPT2Tokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    return decoder_of(GPT2LMHeadModel.from_pretrained(tiny_model).eval()), tokenizer


def test_an_empty_prompt_starts_from_end_of_text(parts: Parts) -> None:
    assert encode_prompt(parts[1], "") == [parts[1].eos_token_id]


def test_each_prompt_has_its_own_limit(parts: Parts) -> None:
    prompts = ["i", "i feel happy because my friends"]
    lengths = [len(encode_prompt(parts[1], prompt)) for prompt in prompts]
    results = generate_batch(*parts, prompts, max_length=30)
    assert [len(parts[1](result.text)["input_ids"]) <= 30 for result in results] == [True, True]
    assert [result.new_tokens for result in results] == [30 - length for length in lengths]
    results = generate_batch(*parts, prompts, max_new_tokens=4)
    assert [result.new_tokens for result in results] == [4, 4]


def test_prompts_of_different_lengths_stay_within_the_positions(parts: Parts) -> None:
    """Beside a short prompt, which has more room, a long one must not grow beyond the model's 128 positions."""
    prompts = ["i", "i feel happy because my friends " * 6, "i was so sad", "i"]
    results = generate_batch(*parts, prompts, max_length=128)
    assert [result.finished or len(parts[1](result.text)["input_ids"]) <= 128 for result in results] == [True] * 4
    for repeat in (0, 3):
        for prompt, result in zip(prompts, generate_batch(*parts, prompts, 128, 0, repeat), strict=True):
            assert result.text == generate_batch(*parts, [prompt], 128, 0, repeat)[0].text
    for prompt, result in zip(prompts, results, strict=True):
        assert result.prompt == prompt
        assert result.text == generate_batch(*parts, [prompt], max_length=128)[0].text


def test_a_model_that_holds_nan_ends_nothing(parts: Parts) -> None:
    model = GPT2LMHeadModel(parts[0].model.config).eval()
    with torch.no_grad():
        model.transformer.h[0].ln_1.weight[0] = float("nan")
    results = generate_batch(decoder_of(model), parts[1], ["i feel"], max_new_tokens=5, do_sample=True)
    assert len(results) == 1


def test_finished_means_that_the_model_ended_the_text(parts: Parts) -> None:
    decoder, tokenizer = parts
    eager = GPT2LMHeadModel(decoder.model.config).eval()
    with torch.no_grad():  # whatever it reads, it ends: all logits but that of end-of-text are zero
        for parameter in eager.parameters():
            parameter.zero_()
        eager.transformer.ln_f.bias.fill_(1)
        eager.transformer.wte.weight[tokenizer.eos_token_id] = 1
    (result,) = generate_batch(decoder_of(eager), tokenizer, ["i feel"])
    assert (result.text, result.new_tokens, result.finished) == ("i feel", 0, True)
    (result,) = generate_batch(decoder, tokenizer, ["i feel"], max_new_tokens=1)
    assert (result.new_tokens, result.finished) == (1, False)


def test_a_prompt_without_room_is_named_by_its_number(parts: Parts) -> None:
    check_prompts(parts[0].model, parts[1], ["i", "we"], max_length=20)
    with pytest.raises(UserError, match="prompt 2 has"):
        check_prompts(parts[0].model, parts[1], ["i", "we " * 40], max_length=20)
    with pytest.raises(UserError, match="--max_new_tokens 128 asks for 129 in all"):
        check_prompts(parts[0].model, parts[1], ["i"], max_length=20, max_new_tokens=128)
    with pytest.raises(UserError, match="shorten it"):
        check_prompts(parts[0].model, parts[1], ["we " * 200], max_length=20)


def test_a_training_is_left_as_it_was(parts: Parts) -> None:
    model, tokenizer = parts[0].model, parts[1]
    model.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    text_model = TextModel(model, tokenizer, TextFormat("{label}: {text}", max_length=20, labels=["joy", "fear"]))
    texts = sample_texts(text_model, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert list(texts) == [text.split(":")[0] for text in texts.values()] == ["joy", "fear"]
    assert texts == sample_texts(text_model, seed=1)
    assert texts != sample_texts(text_model, seed=2)
    model.eval()


def test_a_stream_shows_each_character_when_its_last_byte_is_there(
    parts: Parts, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = parts[1]
    stream = TerminalStream(tokenizer)
    shown = []
    ids = tokenizer("aខ")["input_ids"]
    assert len(ids) == 4, "the character was meant to take three tokens"
    for token in ids:
        stream(token)
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "", "ខ"]
    stream(ids[1])
    stream.end()
    assert capsys.readouterr().out == "\n"


@pytest.fixture(scope="module")
def ending_model(parts: Parts) -> GPT2LMHeadModel:
    """A random model that writes widely, ends some texts early and others late or never."""
    torch.manual_seed(3)
    model = GPT2LMHeadModel(parts[0].model.config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1)
    return model


PROMPTS = [
    "",
    "i",
    "today i feel",
    "we laughed all evening and then",
    "i miss my old dog more than i can say and",
    "<|endoftext|>",
    "i feel<|endoftext|>so sad",
    "<|endoftext|><|endoftext|>my heart",
    "ខ្ញុំ",
    "a b c d e f g h",
]


@pytest.mark.parametrize("no_repeat_ngram_size", [0, 1, 2, 3])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_each_prompt_gets_together_what_it_gets_alone(
    parts: Parts, ending_model: GPT2LMHeadModel, batch_size: int, no_repeat_ngram_size: int
) -> None:
    """Prompts of mixed lengths, with and without end-of-text in them, of texts that end at different places."""
    tokenizer = parts[1]
    prompts = [*PROMPTS, *(f"{prompt} {number}" for prompt in PROMPTS for number in range(4))]
    options = {"max_length": 60, "no_repeat_ngram_size": no_repeat_ngram_size}
    together = [
        result for (result,) in generate_all(decoder_of(ending_model), tokenizer, prompts, batch_size, **options)
    ]
    alone = [generate_batch(decoder_of(ending_model), tokenizer, [prompt], **options)[0] for prompt in prompts]
    assert together == alone
    assert any(result.finished for result in alone) and not all(result.finished for result in alone)
    assert len({result.new_tokens for result in alone}) > 5


def test_a_cpu_computes_few_texts_in_float32() -> None:
    assert choose_generation_precision("auto", CPU, 15).name == "no"
    assert choose_generation_precision("auto", CPU, 16).name == half_precision(CPU)
    assert choose_generation_precision("bf16", CPU, 1).name == "bf16"


def test_prompts_that_do_not_fit_in_memory_together_are_continued_in_halves(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, fits = ["i", "i feel happy because", "the dark", "we", "my heart is"], 2
    together = generate_batch(*parts, prompts, max_new_tokens=8)
    read = Decoder.read

    def limited(decoder: Decoder, tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
        if len(tokens) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return read(decoder, tokens, rows)

    monkeypatch.setattr(Decoder, "read", limited)
    assert generate_batch(*parts, prompts, max_new_tokens=8) == together
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        generate_batch(*parts, prompts, max_new_tokens=8)


def test_the_librarys_rules_are_usable(parts: Parts) -> None:
    """Of transformers' processors, here the one that allows nothing but a few tokens."""
    allowed = [5, 9, 13]
    rules = [SuppressTokensLogitsProcessor([n for n in range(len(parts[1])) if n not in allowed])]
    (result,) = generate_batch(*parts, ["i feel"], max_new_tokens=6, rules=rules)
    assert result.new_tokens == 6
    assert set(parts[1](result.text)["input_ids"][-6:]) <= set(allowed)
