"""The command `python -m emoft.export MODEL --output FILE`: write a model as one file of ONNX or GGUF."""

import sys
from importlib.util import find_spec
from pathlib import Path

from emoft import start
from emoft.data.sources import is_folder
from emoft.errors import UserError, run
from emoft.export.config import PACKAGES, ExportConfig


def check(config: ExportConfig) -> None:
    """See what can be told at once of the flags.

    Raises:
        UserError: a name is missing, the file is there or has no place, or a package is not installed.
    """
    if not config.model or not config.output:
        raise UserError(f"name a model and a file, as in {next(iter(config.command.examples))}")
    if not config.chosen_format:
        raise UserError(f"--output {config.output}: its ending tells no format, end it in .onnx or .gguf")
    try:
        is_folder(config.model, "model with a tokenizer", "model")
    except UserError as error:  # the model is named without a flag
        raise UserError(str(error).removeprefix("--model ")) from None
    output = Path(config.output)
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name a file in it, such as model.{config.chosen_format}")
    if not output.resolve().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.resolve().parent}, make it or name another")
    if output.exists() and not config.overwrite_output:
        raise UserError(f"--output {output} is there already: replace it by --overwrite_output, or name another file")
    packages = PACKAGES[config.chosen_format]
    if any(find_spec(name) is None for name in packages):
        raise UserError(
            f"a file of {config.chosen_format} is written by other packages: pip install {' '.join(packages)}"
        )


def main(config: ExportConfig) -> int:
    """Write the file."""
    start.loading(sys.stderr)
    from emoft.export.writing import export  # here, since it takes seconds to import

    start.libraries_are_loaded()
    size = export(config.model, Path(config.output), config.chosen_format)
    print(f"saved {config.output} ({size:,} bytes)")
    return 0


flags = start.read_flags(ExportConfig, check)
run(lambda: main(flags))
