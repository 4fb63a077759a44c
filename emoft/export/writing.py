"""From the name of a model to a file of it, which is there whole or not at all."""

from collections.abc import Callable
from pathlib import Path

from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from emoft.errors import UserError
from emoft.export.to_gguf import write_gguf
from emoft.export.to_onnx import write_onnx
from emoft.files import write_whole
from emoft.model.loading import check_fit, load_model
from emoft.model.tokenizer import load_tokenizer
from emoft.terminal import Bar

WRITERS: dict[str, Callable[[GPT2LMHeadModel, PreTrainedTokenizerFast, Path], None]] = {
    "onnx": write_onnx,
    "gguf": write_gguf,
}


def export(name: str, output: Path, file_format: str) -> int:
    """Write a model into a file and return its bytes.

    Args:
        name: of a folder or a repository on the Hub.
        output: the file, replaced if it is there.
        file_format: "onnx" or "gguf".

    Raises:
        UserError: the model cannot be loaded, or the format cannot hold it, or the file cannot be written.
    """
    try:
        model, tokenizer = load_model(name), load_tokenizer(name)
        check_fit(model, tokenizer)
    except UserError as error:  # the model is named without a flag
        raise UserError(str(error).replace("--model_name_or_path ", "")) from None
    try:
        with Bar(f"Writing {output}"):
            write_whole(output, lambda path: WRITERS[file_format](model.eval(), tokenizer, path))
        return output.stat().st_size
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written ({error.strerror}): make room, or name another file"
        ) from None
