"""GPT-2 and its tokenizer: from the Hub, from a folder, or fresh."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from emoft.config import TrainConfig
from emoft.data import hub
from emoft.data.template import TextFormat
from emoft.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# Vocabularies are sometimes rounded up to a multiple of 64 or 128 for speed: a model may have this many ids to spare.
SPARE_IDS = 1024


@dataclass(frozen=True)
class TextModel:
    """A GPT-2, its tokenizer, and the format of the texts that it was trained on: what always travels together."""

    model: GPT2LMHeadModel
    tokenizer: GPT2Tokenizer
    text_format: TextFormat


def load_model(name: str) -> GPT2LMHeadModel:
    """Load a GPT-2 from a folder or the Hub, in float32.

    Raises:
        UserError: there is none, it is not a GPT-2, or its weights cannot be read.
    """
    flag = "model_name_or_path"
    is_local = hub.is_local(name, "model", flag)
    if is_local and not (Path(name) / "config.json").is_file():
        raise UserError(f"--{flag} {name} has no config.json: name a folder that save_pretrained or train.py wrote")
    if is_local and not any(Path(name).glob("*.safetensors")) and any(Path(name).glob("*.bin")):
        raise UserError(
            f"--{flag} {name} holds its weights as .bin, which may run code when it is loaded: convert it where you"
            " trust it, by GPT2LMHeadModel.from_pretrained(folder).save_pretrained(folder), which writes .safetensors"
        )
    try:
        model_type = AutoConfig.from_pretrained(name).model_type
        if model_type != "gpt2":
            raise UserError(f"--{flag} {name} is a {model_type} model: emoft trains GPT-2")
        # Half-precision weights are widened: AdamW's small updates would be lost in them.
        model = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except UserError:
        raise
    except Exception as error:  # the libraries raise dozens of types for what is one case to the user
        if is_local:
            raise UserError(
                f"--{flag} {name} cannot be loaded ({error}): name another folder, or save it again"
            ) from None
        raise hub.not_found(name, "model", flag, error) from None
    return model


def fresh_model(config_overrides: str, tokenizer: GPT2Tokenizer) -> GPT2LMHeadModel:
    """Return a GPT-2 with random weights (of torch's global generator).

    Args:
        config_overrides: values of `GPT2Config`, such as "n_layer=4,n_embd=256,n_head=4".
        tokenizer: tells the size of the vocabulary and the special tokens.

    Raises:
        UserError: unknown or impossible values.
    """
    config = GPT2Config(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    try:
        if config_overrides:
            config.update_from_string(config_overrides.replace(" ", ""))
        return GPT2LMHeadModel(config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(
            f"--config_overrides {config_overrides!r}: {error}; write values as in n_layer=4,n_embd=256,n_head=4"
        ) from None


def load_model_and_tokenizer(config: TrainConfig, texts: Iterable[str]) -> tuple[GPT2LMHeadModel, GPT2Tokenizer]:
    """Return the model and tokenizer that a training run starts from.

    Args:
        config: names them.
        texts: the filled templates of the train split, for a tokenizer trained on them.

    Raises:
        UserError: they cannot be had, or do not fit each other or `max_length`.
    """
    fresh = not config.model_name_or_path
    if config.config_overrides and not fresh:
        raise UserError(
            "--config_overrides shapes a fresh model, and --model_name_or_path names a ready one:"
            ' drop the first, or set --model_name_or_path ""'
        )
    if config.tokenizer_name:
        tokenizer = load_tokenizer(config.tokenizer_name, "tokenizer_name")
    elif fresh:
        tokenizer = train_tokenizer(texts, config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.model_name_or_path)
    model = fresh_model(config.config_overrides, tokenizer) if fresh else load_model(config.model_name_or_path)

    ids, rows, positions = len(tokenizer), model.config.vocab_size, model.config.n_positions
    if not ids <= rows <= ids + SPARE_IDS:
        raise UserError(
            f"the tokenizer has {ids} tokens and the model {rows}: they do not belong together, check"
            " --tokenizer_name and --model_name_or_path"
        )
    if config.max_length > positions:
        raise UserError(f"--max_length {config.max_length} is above the model's {positions} positions: lower it")
    tokenizer.model_max_length = positions
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = settings.eos_token_id = settings.pad_token_id = tokenizer.eos_token_id
    return model, tokenizer


def save_model(folder: Path, text_model: TextModel, weights: dict[str, Tensor]) -> None:
    """Write a folder that `from_pretrained` and `pipeline` read, and the text format beside it.

    Args:
        folder: is there.
        text_model: tells the configuration, the tokens and the format.
        weights: of the model, whole.
    """
    text_model.model.save_pretrained(folder, state_dict=weights)
    text_model.tokenizer.save_pretrained(folder)
    text_model.text_format.save(folder)


def load_tokenizer(name: str, flag: str = "model_name_or_path") -> GPT2Tokenizer:
    """Load a tokenizer; pad becomes end-of-text, since GPT-2 has no token for padding.

    Raises:
        UserError: there is none, or it is an empty shell, which `from_pretrained` returns when it finds no files.
    """
    what = "tokenizer" if flag == "tokenizer_name" else "model with a tokenizer"
    is_local = hub.is_local(name, what, flag)
    try:
        tokenizer = GPT2Tokenizer.from_pretrained(name)
        if len(tokenizer) < 257:  # not even the 256 bytes: the library found no files and made an empty tokenizer
            raise FileNotFoundError("no vocab.json and merges.txt, nor tokenizer.json")
    except Exception as error:  # the libraries raise dozens of types for what is one case to the user
        if is_local:
            raise UserError(f"--{flag} {name} holds no tokenizer ({error}): add the files, or name another") from None
        raise hub.not_found(name, what, flag, error) from None
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


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
