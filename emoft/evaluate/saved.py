"""A saved model as it is evaluated: its weights, its tokenizer, and the format of its texts."""

from dataclasses import replace
from pathlib import Path

import torch

from emoft.config import EvaluateConfig
from emoft.data import hub
from emoft.data.template import TextFormat
from emoft.errors import UserError
from emoft.files import FORMAT_FILE
from emoft.hints import python
from emoft.model.attention import use_packed_attention
from emoft.model.kernels import use_fast_kernels
from emoft.model.loading import TextModel, check_fit, load_model
from emoft.model.tokenizer import load_tokenizer


def read_format(config: EvaluateConfig) -> TextFormat:
    """Return the format that the model was trained with, with what the flags change of it.

    Raises:
        UserError: there is none, and no flag gives one.
    """
    name = config.model_name_or_path
    if name == EvaluateConfig.model_name_or_path and not Path(name).is_dir():
        raise UserError(
            f"no folder {name} here: train first with {python()} train.py, or name a model by --model_name_or_path"
        )
    folder = hub.model_folder(name, "model_name_or_path", config.model_revision)
    if (folder / FORMAT_FILE).exists():
        text_format = TextFormat.load(folder)
    elif config.template:
        text_format = TextFormat(config.template)
    else:
        raise UserError(
            f"--model_name_or_path {name} has no {FORMAT_FILE}, which holds its template: give --template, such as"
            " '{text}' or '{label}: {text}'"
        )
    if config.template and config.template != text_format.template:
        text_format = replace(text_format, template=config.template, labels=[])
    if config.max_length:
        text_format = replace(text_format, max_length=config.max_length)
    if config.append_eos is not None:
        text_format = replace(text_format, append_eos=config.append_eos)
    return text_format


def load_text_model(
    name: str, revision: str, text_format: TextFormat, device: torch.device, flag: str = "model_name_or_path"
) -> TextModel:
    """Return a saved model, ready to be evaluated.

    Args:
        name: of its folder, or on the Hub.
        revision: on the Hub.
        text_format: of its texts.
        device: that it shall compute on.
        flag: that names it, for messages, without dashes.

    Raises:
        UserError: it cannot be had, or has fewer positions than a text may be long.
    """
    tokenizer = load_tokenizer(name, flag, revision)
    model = load_model(name, revision, flag)
    check_fit(model, tokenizer)
    if text_format.max_length > model.config.n_positions:
        raise UserError(
            f"--max_length {text_format.max_length} is above the model's {model.config.n_positions} positions: lower it"
        )
    model.to(device)  # type: ignore[arg-type]  # a fault of the library's types
    use_packed_attention(model)
    use_fast_kernels(model)
    model.eval()
    return TextModel(model, tokenizer, text_format)
