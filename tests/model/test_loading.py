import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from conftest import Result
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.data.tokens import decode, token_bytes
from emoft.model.loading import fresh_model
from emoft.model.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["i feel happy", "i feel sad", "ខ្ញុំសប្បាយចិត្ត"] * 5, 300)


class TestTokenizer:
    @given(st.text())
    def test_writes_any_text(self, text: str) -> None:
        ids = TOKENIZER(text, split_special_tokens=True)["input_ids"]
        assert decode(TOKENIZER, ids) == text
        assert max(ids, default=0) < len(TOKENIZER)

    @given(st.text(alphabet="ខ្ញុំ🙂é", min_size=1), st.integers(1, 30))
    def test_a_cut_character_is_left_out(self, text: str, keep: int) -> None:
        ids = TOKENIZER(text)["input_ids"][:keep]
        assert text.startswith(decode(TOKENIZER, ids))

    def test_a_replacement_character_in_the_text_is_text(self) -> None:
        assert decode(TOKENIZER, TOKENIZER("a\ufffdb")["input_ids"]) == "a\ufffdb"

    def test_special_tokens_stand_for_nothing(self) -> None:
        assert token_bytes(TOKENIZER, [TOKENIZER.eos_token_id, *TOKENIZER("a")["input_ids"]]) == b"a"

    def test_is_the_same_each_time(self) -> None:
        again = train_tokenizer(["i feel happy", "i feel sad", "ខ្ញុំសប្បាយចិត្ត"] * 5, 300)
        assert again.get_vocab() == TOKENIZER.get_vocab()
        assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id == TOKENIZER.bos_token_id


def test_a_fresh_model_follows_the_seed_and_the_overrides() -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(fresh_model("n_layer=2, n_embd=16, n_head=2, resid_pdrop=0.3", TOKENIZER))
    first, same, other = (model.transformer.wte.weight for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)
    config = models[0].config
    assert (config.n_layer, config.resid_pdrop, config.vocab_size) == (2, 0.3, len(TOKENIZER))
    assert config.eos_token_id == TOKENIZER.eos_token_id


# Run with -I, which leaves out the working directory and PYTHONPATH: nothing but installed packages.
PLAIN = """
import json, sys
sys.modules.pop("emoft", None)
try:
    import emoft
except ImportError:
    pass
else:
    sys.exit("emoft can be imported")
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, pipeline
folders = {}
for folder in sys.argv[1:]:
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Emotion: i feel", return_tensors="pt")
    with torch.no_grad():
        logits = model(**ids).logits
    text = pipeline("text-generation", model=folder)("Emotion: i feel", max_new_tokens=5, do_sample=False)
    folders[folder] = [ids["input_ids"].tolist(), logits.double().sum().item(), text[0]["generated_text"]]
print(json.dumps(folders))
"""


def test_every_saved_folder_loads_without_emoft(
    run: Callable[..., Result], tiny_model, train_file, validation_file, tmp_path
) -> None:
    result = run(
        "train.py",
        "--model_name_or_path",
        tiny_model,
        "--train_file",
        train_file,
        "--validation_file",
        validation_file,
        "--delimiter",
        ";",
        "--max_steps",
        4,
        "--save_steps",
        2,
        "--output_dir",
        "run",
    )
    assert result.code == 0, result.err
    folders = [tmp_path / "run", *sorted(tmp_path.glob("run/checkpoint-*"))]
    assert len(folders) == 3
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, *map(str, folders)], cwd="/", capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    tokenizer = GPT2Tokenizer.from_pretrained(folders[0])
    for folder in folders:
        ids, total, text = seen[str(folder)]
        assert ids == [tokenizer("Emotion: i feel")["input_ids"]]
        with torch.no_grad():
            logits = GPT2LMHeadModel.from_pretrained(folder)(torch.tensor(ids)).logits
        assert total == pytest.approx(logits.double().sum().item(), rel=1e-6)
        assert text.startswith("Emotion: i feel")
