"""GPT-2 and its tokenizer: from the Hub, from a folder, or fresh."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
)

from emoft.config import TrainConfig
from emoft.data import hub
from emoft.data.template import TextFormat
from emoft.errors import UserError, warn
from emoft.model.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

# Vocabularies are sometimes rounded up to a multiple of 64 or 128 for speed: a model may have this many ids to spare.
SPARE_IDS = 1024


@dataclass(frozen=True)
class TextModel:
    """A GPT-2, its tokenizer, and the format of the texts that it was trained on: what always travels together."""

    model: GPT2LMHeadModel
    tokenizer: GPT2Tokenizer
    text_format: TextFormat


def load_model(name: str, revision: str = "main", flag: str = "model_name_or_path") -> GPT2LMHeadModel:
    """Load a GPT-2 from a folder or the Hub, in float32. Its settings of generation are not taken: ours are flags.

    Args:
        name: of the folder or repository.
        revision: of the repository.
        flag: that names it, for messages, without dashes.

    Raises:
        UserError: there is none, it is not a GPT-2, or its weights cannot be read, or are not those of a whole GPT-2.
    """
    folder = hub.model_folder(name, flag, revision)
    if not (folder / "config.json").is_file():
        raise UserError(f"--{flag} {name} has no config.json: name a folder that save_pretrained or train.py wrote")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"--{flag} {name} holds no weights as .safetensors, and others, as .bin, may run code when they are loaded:"
            f" where you trust them, GPT2LMHeadModel.from_pretrained({name!r}).save_pretrained('FOLDER') converts them"
        )
    try:
        # Code that a repository brings along is never run, and nobody is asked whether it may.
        model_type = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if model_type != "gpt2":
            raise UserError(f"--{flag} {name} is a {model_type} model: emoft trains GPT-2")
        # Half-precision weights are widened: AdamW's small updates would be lost in them.
        loaded: Any = GPT2LMHeadModel.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            generation_config=GenerationConfig(),  # what the folder says of it is not even read
            ignore_mismatched_sizes=True,  # below they are refused, by their names
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:  # the libraries raise dozens of types for what is one case to the user
        raise UserError(f"--{flag} {name} cannot be loaded ({error}): name another folder, or save it again") from None
    model: GPT2LMHeadModel = loaded[0]
    _check_weights(f"--{flag} {name}", loaded[1])
    # Transformers 4 reads the word of the configuration, 5 the weights: where the file has a head of its own, both are
    # told so.
    model.config.tie_word_embeddings = model.lm_head.weight is model.transformer.wte.weight
    return model


def _check_weights(what: str, found: dict[str, Any]) -> None:
    """See that a file held all weights of the model, which draws at random what it does not find.

    Args:
        what: was loaded, for the message.
        found: what `from_pretrained` says of it.

    Raises:
        UserError: one is missing, or has another shape.
    """
    missing, others = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    shapes = sorted(str(each[0] if isinstance(each, tuple) else each) for each in found["mismatched_keys"])
    if shapes:
        raise UserError(
            f"{what}: {_few(shapes)} have other shapes than its config.json says: they do not belong together"
        )
    if missing:
        cause = "a part of the model was saved, or another one: save all of it by save_pretrained"
        for prefix, reason in (
            (
                "_orig_mod.",
                "it was saved from a model that torch.compile had wrapped: save the model inside, ._orig_mod",
            ),
            (
                "module.",
                "it was saved from a model that DataParallel or DDP had wrapped: save the model inside, .module",
            ),
        ):
            if any(name.startswith(prefix) for name in others):
                cause = reason
        beside = f", and has {_few(others)} instead" if others else ""
        raise UserError(f"{what} lacks the weights {_few(missing)}{beside}: {cause}")
    if others := [name for name in others if not name.endswith((".attn.bias", ".attn.masked_bias"))]:
        warn(f"{what} also holds {_few(others)}, which GPT-2 has no place for: they are left out")


def _few(names: list[str]) -> str:
    more = len(names) - 2
    return ", ".join(names[:2]) + (f" and {more} more" if more > 0 else "")


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
        tokenizer = load_tokenizer(config.model_name_or_path, revision=config.model_revision)
    if fresh:
        model = fresh_model(config.config_overrides, tokenizer)
    else:
        model = load_model(config.model_name_or_path, config.model_revision)

    check_fit(model, tokenizer)
    positions = model.config.n_positions
    if config.max_length > positions:
        raise UserError(f"--max_length {config.max_length} is above the model's {positions} positions: lower it")
    tokenizer.model_max_length = positions
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = settings.eos_token_id = settings.pad_token_id = tokenizer.eos_token_id
    _try_to_save(model, tokenizer, config.model_name_or_path)
    return model, tokenizer


def check_fit(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer) -> None:
    """See that a model has a row for each token, and not many more.

    Raises:
        UserError: it has not.
    """
    ids, rows = max(tokenizer.get_vocab().values()) + 1, model.config.vocab_size
    if not ids <= rows <= ids + SPARE_IDS:
        raise UserError(
            f"the tokenizer has {ids} tokens and the model {rows}: they do not belong together, check"
            " --tokenizer_name and --model_name_or_path"
        )


def _try_to_save(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, name: str) -> None:
    """See that what stands beside the weights can be saved, since a run that cannot be saved should not begin.

    Raises:
        UserError: it cannot.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            for part in (model.config, model.generation_config):
                part.save_pretrained(folder)
            save_tokenizer(tokenizer, Path(folder))
    except OSError:
        return  # no room for a trial says nothing of the output folder
    except Exception as error:  # the libraries raise dozens of types for what is one case to the user
        raise UserError(
            f"what --model_name_or_path {name} holds beside its weights could not be saved again ({error}): mend its"
            " config.json or tokenizer_config.json"
        ) from None


def save_model(folder: Path, text_model: TextModel, weights: dict[str, Tensor]) -> None:
    """Write a folder that `from_pretrained` and `pipeline` read, and the text format beside it.

    Args:
        folder: is there.
        text_model: tells the configuration, the tokens and the format.
        weights: of the model, whole.
    """
    text_model.model.save_pretrained(folder, state_dict=weights)
    save_tokenizer(text_model.tokenizer, folder)
    text_model.text_format.save(folder)
