"""The command `python -m emoft.compare MODEL_A MODEL_B`: which of two models is better, and how sure that is."""

import json
import sys

from emoft import start
from emoft.compare.config import CompareConfig
from emoft.data.sources import check_file, is_folder
from emoft.errors import UserError, run
from emoft.files import finite


def check(config: CompareConfig) -> None:
    """See what can be told at once of the flags.

    Raises:
        UserError: a side has no model, or a folder or file is missing.
    """
    if not all(config.groups()):
        raise UserError(f"name two models, or two groups of them, as in {next(iter(config.command.examples))}")
    for name in sum(config.groups(), []):
        try:
            is_folder(name, "model with a tokenizer", "models")
        except UserError as error:  # models are named without a flag
            raise UserError(str(error).removeprefix("--models ")) from None
    if config.test_file:
        check_file("--test_file", config.test_file)


def main(config: CompareConfig) -> int:
    """Compare, and print what was found."""
    # Here, since it takes seconds to import.
    from emoft.compare.report import as_json, compare_models, describe

    start.libraries_are_loaded()
    found = compare_models(config)
    if config.json:
        print(json.dumps(finite(as_json(found)), ensure_ascii=False))
    else:
        print(describe(found, config.models_a, config.models_b))
    return 0


flags = start.read_flags(CompareConfig, check)
start.loading(sys.stderr)
run(lambda: main(flags))
