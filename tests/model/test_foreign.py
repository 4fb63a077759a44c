"""Models and tokenizers as other programs leave them: taken as what they are, or refused in a line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result
from safetensors.torch import load_file, save_file
from test_train import flags
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from emoft.data.template import TextFormat
from emoft.data.tokens import byte_lengths, decode, encode, make_tokens
from emoft.errors import UserError
from emoft.model.generation import encode_prompt
from emoft.model.loading import check_fit, load_model
from emoft.model.tokenizer import load_tokenizer


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def edit_json(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def refusal(load: Callable[[str], object], folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestWeights:
    @pytest.mark.parametrize(
        ("prefix", "cause"), [("_orig_mod.", "torch.compile"), ("module.", "DDP"), ("model.", "a part of the model")]
    )
    def test_wrapped_ones_are_refused_with_the_cause(self, folder: Path, prefix: str, cause: str) -> None:
        change_weights(folder, lambda weights: {f"{prefix}{name}": value for name, value in weights.items()})
        said = refusal(load_model, folder)
        assert f"and has {prefix}transformer.h.0." in said
        assert cause in said

    @pytest.mark.parametrize("lost", ["transformer.h.1.", "transformer.wpe", "transformer.h.0.attn.c_attn.bias"])
    def test_missing_ones_are_never_drawn_at_random(self, folder: Path, lost: str) -> None:
        change_weights(folder, lambda weights: {n: v for n, v in weights.items() if not n.startswith(lost)})
        assert re.search(rf"lacks the weights {re.escape(lost)}", refusal(load_model, folder))

    def test_another_shape(self, folder: Path) -> None:
        edit_json(folder / "config.json", n_positions=64)
        assert "wpe" in refusal(load_model, folder)

    def test_what_gpt2_has_no_place_for_is_told(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        change_weights(folder, lambda weights: {**weights, "score.weight": torch.zeros(2, 32)})
        load_model(str(folder))
        assert "also holds score.weight" in capsys.readouterr().err

    @pytest.mark.parametrize("said", [True, False])
    def test_a_head_of_its_own_is_the_same_to_everybody_who_reads_it(
        self, folder: Path, tmp_path: Path, said: bool
    ) -> None:
        head = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
        change_weights(folder, lambda weights: {**weights, "lm_head.weight": head})
        edit_json(folder / "config.json", tie_word_embeddings=said)
        model = load_model(str(folder))
        assert torch.equal(model.lm_head.weight, head)
        model.save_pretrained(tmp_path / "saved")
        assert json.loads((tmp_path / "saved/config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(load_file(tmp_path / "saved/model.safetensors")["lm_head.weight"], head)
        assert torch.equal(GPT2LMHeadModel.from_pretrained(tmp_path / "saved").lm_head.weight, head)

    def test_a_tied_one_stays_tied(self, folder: Path) -> None:
        model = load_model(str(folder))
        assert model.config.tie_word_embeddings is True
        assert model.lm_head.weight is model.transformer.wte.weight

    def test_code_of_a_repository_is_never_run(self, run: Callable[..., Result], folder: Path, tmp_path: Path) -> None:
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass C: pass\n")
        edit_json(
            folder / "config.json",
            model_type="evil",
            auto_map=dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.C"),
        )
        (tmp_path / "train.txt").write_text("i feel fine\n" * 8)
        for script, words in (
            ("train.py", flags(folder, tmp_path / "train.txt", max_steps=1, delimiter="")),
            ("generate.py", ["--model_name_or_path", folder, "--prompt", "i"]),
        ):
            result = run(script, *words, stdin="y\ny\ny\n")
            assert result.code == 2
            assert len(result.error_lines) == 1
            assert not (tmp_path / "marker").exists()


class TestGenerationConfig:
    @pytest.mark.parametrize(
        "settings",
        [
            {"temperature": 0.3},  # without do_sample: the library refuses to save it
            {"num_beams": 3, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_length": 40},
            {"suppress_tokens": list(range(300)), "forced_eos_token_id": 5, "max_length": 3},
            {"do_sample": True, "top_k": 1, "num_return_sequences": 4},
            {"early_stopping": "no such thing", "temperature": "warm"},
            None,
        ],
    )
    def test_our_flags_alone_decide_and_the_run_can_be_saved(
        self, run: Callable[..., Result], folder: Path, tiny_model: Path, train_file: Path, tmp_path: Path, settings
    ) -> None:
        path = folder / "generation_config.json"
        path.write_text("{ no json" if settings is None else json.dumps(settings))
        words = ["--prompt", "i feel", "--max_new_tokens", "12"]
        ours, plain = (run("generate.py", "--model_name_or_path", name, *words) for name in (folder, tiny_model))
        assert ours.code == 0, ours.err
        assert ours.out == plain.out
        trained = run("train.py", *flags(folder, train_file, max_steps=1, save_steps=1))
        assert trained.code == 0, trained.err
        saved = json.loads((tmp_path / "run/generation_config.json").read_text())
        assert set(saved) <= {
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "transformers_version",
            "_from_model_config",
        }

    def test_settings_inside_an_old_config(self, run: Callable[..., Result], folder: Path, train_file: Path) -> None:
        edit_json(folder / "config.json", temperature=0.3, num_beams=2, task_specific_params={"a": {"max_length": 5}})
        trained = run("train.py", *flags(folder, train_file, max_steps=1, save_steps=1))
        assert trained.code in (0, 2), trained.err
        assert "Traceback" not in trained.err


class TestTokenizers:
    @pytest.fixture
    def with_words(self, folder: Path) -> PreTrainedTokenizerFast:
        """Words are added, as for a script that the vocabulary spells in many tokens."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["café", "សប្បាយ"])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|joy|>", "<|sadness|>"]})
        tokenizer.save_pretrained(folder)
        return load_tokenizer(str(folder))

    @pytest.mark.parametrize("text", ["un café noir", "ខ្ញុំសប្បាយចិត្ត", "cafécafé", "é café", "a\ncafé b"])
    def test_added_words_are_their_own_text(self, with_words: PreTrainedTokenizerFast, text: str) -> None:
        ((ids, ends),) = make_tokens(with_words, [text])
        assert decode(with_words, ids) == text
        assert byte_lengths(with_words, len(with_words))[ids].sum() == len(text.encode())
        assert ends[-1] == len(text)

    def test_special_tokens_of_a_template_are_the_same_everywhere(self, with_words: PreTrainedTokenizerFast) -> None:
        text_format = TextFormat("<|{label}|> {text}", labels=["joy", "sadness"])
        joy, sadness = (with_words.convert_tokens_to_ids(f"<|{label}|>") for label in text_format.labels)
        (row,) = encode(with_words, [text_format.fill("i feel it", "sadness")], text_format)
        assert row[0] == sadness
        assert encode_prompt(with_words, text_format.prompt("sadness")) == [sadness]
        begun = encode_prompt(with_words, text_format.prompt("sadness", "i feel"))
        assert row[: len(begun)] == begun
        assert encode_prompt(with_words, text_format.prompt("joy", "i feel")) == [joy, *begun[1:]]
        (text,) = encode(with_words, ["an <|endoftext|> in a text"], text_format)
        assert text.count(with_words.eos_token_id) == 1, "only at the end"

    def test_a_text_is_trained_as_it_is_prompted(self, folder: Path) -> None:
        """A post-processor that puts a token before everything: neither gets it."""
        exact = Tokenizer.from_file(str(folder / "tokenizer.json"))
        exact.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", exact.token_to_id("<|endoftext|>"))]
        )
        exact.save(str(folder / "tokenizer.json"))
        tokenizer = load_tokenizer(str(folder))
        (row,) = encode(tokenizer, ["i feel fine"], TextFormat("{text}", append_eos=False))
        assert encode_prompt(tokenizer, "i feel fine") == row
        assert tokenizer.eos_token_id not in row

    @pytest.mark.parametrize("kind", ["metaspace", "words"])
    def test_what_cannot_be_turned_back_into_bytes_is_refused(self, folder: Path, kind: str) -> None:
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        model = models.BPE(vocab=vocabulary, merges=[]) if kind == "metaspace" else models.WordLevel(vocabulary, "Ġ")
        foreign = Tokenizer(model)
        foreign.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "metaspace" else pre_tokenizers.Whitespace()
        foreign.save(str(folder / "tokenizer.json"))
        assert "not byte-level BPE" in refusal(load_tokenizer, folder)

    def test_another_pre_tokenizer_is_kept(self, folder: Path) -> None:
        """Digits one by one, and a blank before the text: byte-level still, but not GPT-2's."""
        exact = Tokenizer.from_file(str(folder / "tokenizer.json"))
        exact.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
        )
        exact.save(str(folder / "tokenizer.json"))
        ((ids, _),) = make_tokens(load_tokenizer(str(folder)), ["in 1984"])
        assert ids == exact.encode("in 1984", add_special_tokens=False).ids

    def test_another_end_of_text(
        self, run: Callable[..., Result], folder: Path, train_file: Path, tmp_path: Path
    ) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = folder / name
            path.write_text(path.read_text().replace("<|endoftext|>", "</s>"))
        tokenizer = load_tokenizer(str(folder))
        assert (tokenizer.eos_token, len(tokenizer)) == ("</s>", 400), "no token is invented"
        trained = run("train.py", *flags(folder, train_file, max_steps=1))
        assert trained.code == 0, trained.err
        assert load_tokenizer(str(tmp_path / "run")).eos_token == "</s>"
        written = run("generate.py", "--model_name_or_path", "run", "--prompt", "i feel", "--max_new_tokens", "3")
        assert written.code == 0, written.err

    def test_no_end_of_text(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<x>"))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        assert "names no end-of-text" in refusal(load_tokenizer, folder)

    def test_more_tokens_than_the_model_has_rows(
        self, run: Callable[..., Result], folder: Path, train_file: Path, tmp_path: Path
    ) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["nobody has this"])
        tokenizer.save_pretrained(folder)
        (folder / "emoft.json").write_text(json.dumps({"template": "{text}"}))
        with pytest.raises(UserError, match="has 401 tokens and the model 400"):
            check_fit(load_model(str(folder)), load_tokenizer(str(folder)))
        for script, words in (
            ("train.py", flags(folder, train_file, max_steps=1)),
            ("generate.py", ["--model_name_or_path", folder, "--prompt", "nobody has this"]),
            ("-m", ["emoft.evaluate", "--model_name_or_path", folder, "--test_file", train_file]),
        ):
            result = run(script, *words)
            assert result.code == 2
            assert "401 tokens and the model 400" in result.error_lines[-1]
