"""The command `python -m emoft.share DIR OWNER/NAME`: upload a trained model to the Hugging Face Hub."""

import sys
from pathlib import Path

from emoft import start
from emoft.errors import UserError, run
from emoft.files import WEIGHTS_FILE
from emoft.share.config import ShareConfig


def check(config: ShareConfig) -> None:
    """See what can be told at once of the flags.

    Raises:
        UserError: there is no model in the folder, or no name on the Hub.
    """
    if not config.model_dir or not config.repository:
        raise UserError(f"name a folder and OWNER/NAME, as in {next(iter(config.command.examples))}")
    if not (Path(config.model_dir) / WEIGHTS_FILE).is_file():
        raise UserError(f"{config.model_dir} holds no {WEIGHTS_FILE}: name the output folder of a finished training")
    start.check_repository("REPOSITORY", config.repository)


def main(config: ShareConfig) -> int:
    """Upload."""
    start.loading(sys.stderr)
    from emoft.share.upload import upload  # here, since it takes seconds to import

    start.libraries_are_loaded()
    print(f"uploaded to {upload(Path(config.model_dir), config.repository, config.private)}")
    return 0


flags = start.read_flags(ShareConfig, check)
run(lambda: main(flags))
