"""GPT-2's tokenizer, byte-level BPE: from the Hub, from a folder, or trained on the texts of a run."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from emoft.data import hub
from emoft.errors import UserError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"


def load_tokenizer(name: str, flag: str = "model_name_or_path", revision: str = "main") -> GPT2Tokenizer:
    """Load the tokenizer of a folder or the Hub as it is; pad becomes end-of-text, since GPT-2 has none of its own.

    Args:
        name: of the folder or repository.
        flag: that names it, for the message, without dashes.
        revision: of the repository.

    Raises:
        UserError: there is none, or one whose tokens are no bytes, or without an end-of-text.
    """
    folder = hub.model_folder(name, flag, revision)
    try:
        tokenizer = _read_tokenizer(folder)
        if len(tokenizer) < 257:  # not even the 256 bytes: the library found no files and made an empty tokenizer
            raise FileNotFoundError("no vocab.json and merges.txt, nor tokenizer.json")
    except UserError as error:
        raise UserError(f"--{flag} {name}: {error}") from None
    except Exception as error:  # the libraries raise dozens of types for what is one case to the user
        raise UserError(f"--{flag} {name} holds no tokenizer ({error}): add the files, or name another") from None
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _read_tokenizer(folder: Path) -> GPT2Tokenizer:
    """Return GPT-2's tokenizer where it makes the same tokens as tokenizer.json says, else what that file says.

    The library builds GPT-2's class anew from the vocabulary alone, whatever else tokenizer.json holds.

    Raises:
        UserError: its tokens do not stand for bytes, or none of them is an end of text.
    """
    rebuilt = GPT2Tokenizer.from_pretrained(folder, trust_remote_code=False)
    try:
        exact = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # there is no tokenizer.json, only the vocabulary and the merges, of which GPT-2's class is made
        return rebuilt
    if _pipeline(exact) == _pipeline(rebuilt):
        return rebuilt
    pipeline = _pipeline(exact)
    if pipeline["model"] != "BPE" or "ByteLevel" not in str(pipeline["decoder"]):
        raise UserError(
            f"its tokenizer is {pipeline['model']} and not byte-level BPE, as GPT-2's: its tokens cannot be turned back"
            " into bytes. Name another by --tokenizer_name, or leave --model_name_or_path empty to train one"
        )
    if exact.eos_token is None and END_OF_TEXT in exact.get_vocab():
        exact.eos_token = END_OF_TEXT
    if exact.eos_token is None:
        raise UserError("its tokenizer names no end-of-text: add eos_token to its tokenizer_config.json")
    return exact


def _pipeline(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return all that decides which tokens a text becomes, but for the merges, which both classes read."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    added = sorted((token["content"], token["id"], token["special"]) for token in content["added_tokens"])
    steps = {step: content[step] for step in ("normalizer", "pre_tokenizer", "decoder")}
    return {"model": content["model"]["type"], "tokens": len(tokenizer), "added": added, **steps}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> GPT2Tokenizer:
    """Train a byte-level BPE (Radford et al., 2019) on texts and wrap it as a GPT-2 tokenizer."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that any text can be written
            show_progress=False,
        ),
    )
    return GPT2Tokenizer(tokenizer_object=backend, pad_token=END_OF_TEXT)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the files of a tokenizer, so that transformers 4 and other programs read them too.

    A tokenizer of GPT-2's own kind also gets vocab.json and merges.txt. From these two, transformers 4 makes its
    GPT2Tokenizer, whatever tokenizer.json says: of another kind they would give other tokens there, without a word.

    Args:
        tokenizer: of `load_tokenizer` or `train_tokenizer`.
        folder: is there.
    """
    tokenizer.save_pretrained(folder)
    if isinstance(tokenizer, GPT2Tokenizer):
        tokenizer.backend_tokenizer.model.save(str(folder))
    # Two words of transformers 5 that 4 cannot read, though 5 still reads those of 4.
    path = folder / TOKENIZER_CONFIG_FILE
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
