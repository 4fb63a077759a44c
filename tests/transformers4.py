"""Read saved models with transformers 4: `python tests/transformers4.py PYTHON`, PYTHON that of an environment with it.

Such an environment: `python3 -m venv old && old/bin/pip install torch 'transformers==4.57.*'`. Takes about a minute.
Prints a line for each folder and class, and ends with code 1 if a token or a logit differs.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast, logging

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, it finds the package beside its folder

from emoft.data.template import TextFormat  # noqa: E402
from emoft.files import VOCABULARY_FILES  # noqa: E402
from emoft.model.loading import TextModel, fresh_model, save_model  # noqa: E402
from emoft.model.tokenizer import load_tokenizer, train_tokenizer  # noqa: E402

TEXTS = [
    "joy: i feel fine, it's 12 o'clock   and i'll go on\n",
    "ខ្ញុំសប្បាយចិត្តណាស់ថ្ងៃនេះ។ ខ្ញុំ café មិនភ័យ",
    "😀👩‍👩‍👧 naïve <|endoftext|> <|joy|> \t日本 café",
]
READ = """
import json, sys, torch, transformers
from transformers import GPT2LMHeadModel
transformers.logging.set_verbosity_error()
folder, kinds, texts = json.loads(sys.stdin.read())
found = {"version": transformers.__version__}
for kind in kinds:
    if kind == "GPT2LMHeadModel":
        continue
    try:
        tokenizer = getattr(transformers, kind).from_pretrained(folder)
        found[kind] = [tokenizer(text)["input_ids"] for text in texts]
    except Exception as error:
        found[kind] = f"{type(error).__name__}: {error}".splitlines()[0]
if "GPT2LMHeadModel" in kinds:
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found["GPT2LMHeadModel"] = [model(torch.tensor([ids])).logits.tolist() for ids in found["AutoTokenizer"]]
print(json.dumps(found))
"""
TOKENIZERS = ("GPT2Tokenizer", "GPT2TokenizerFast", "AutoTokenizer")


def folders(root: Path) -> Iterator[tuple[str, Path, tuple[str, ...]]]:
    """Save models as a run does: what each is, its folder, and the classes that must read it."""
    plain = train_tokenizer(TEXTS, 350)

    def save(name: str, tokenizer: PreTrainedTokenizerFast) -> Path:
        torch.manual_seed(0)
        model = fresh_model("n_layer=2,n_embd=32,n_head=2,n_positions=256", tokenizer)
        (root / name).mkdir()
        save_model(root / name, TextModel(model, tokenizer, TextFormat("{text}")), model.state_dict())
        return root / name

    yield "GPT-2's kind of tokenizer", save("plain", plain), (*TOKENIZERS, "GPT2LMHeadModel")

    (root / "two").mkdir()
    for name in VOCABULARY_FILES:
        shutil.copy(root / "plain" / name, root / "two")
    yield "vocab.json and merges.txt alone", root / "two", TOKENIZERS[:2]

    words = AutoTokenizer.from_pretrained(root / "plain")
    words.add_tokens(["café", "សប្បាយ"])
    words.add_special_tokens({"additional_special_tokens": ["<|joy|>", "<|sadness|>"]})
    words.save_pretrained(root / "words")
    yield "with added tokens", save("added", load_tokenizer(str(root / "words"))), (*TOKENIZERS, "GPT2LMHeadModel")

    digits = AutoTokenizer.from_pretrained(root / "plain")
    digits.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    digits.save_pretrained(root / "digits")
    exact = load_tokenizer(str(root / "digits"))
    yield "another pre-tokenizer", save("exact", exact), (*TOKENIZERS[1:], "GPT2LMHeadModel")


def main(python: str) -> int:
    """Compare, and return the exit code."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    wrong = 0
    with tempfile.TemporaryDirectory() as root:
        for what, folder, kinds in folders(Path(root)):
            ours = load_tokenizer(str(folder))
            ids = [ours(text)["input_ids"] for text in TEXTS]
            told = subprocess.run(
                [python, "-c", READ],
                input=json.dumps([str(folder), kinds, TEXTS]),
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            theirs = json.loads(told)
            for kind in kinds:
                if kind != "GPT2LMHeadModel":
                    says = "equal tokens" if theirs[kind] == ids else f"NOT EQUAL: {str(theirs[kind])[:80]}"
                else:
                    model = GPT2LMHeadModel.from_pretrained(folder).eval()
                    with torch.no_grad():
                        pairs = [(model(torch.tensor([row])).logits, torch.tensor(logits))
                                 for row, logits in zip(ids, theirs[kind], strict=True)]  # fmt: skip
                    apart = max((ours - other).abs().max().item() for ours, other in pairs)
                    says = f"{'equal logits' if apart < 1e-5 else 'NOT EQUAL'} (at most {apart:.1g} apart)"
                wrong += "NOT EQUAL" in says
                print(f"transformers {theirs['version']}, {what}: {kind} reads {says}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
