"""The first second of a script: flags are read and checked before the libraries are imported, which takes longer."""

import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TextIO, TypeVar

from emoft.errors import UserError, guarded, program

STARTED = time.perf_counter()  # the scripts import this module first
COMMANDS = ("evaluate", "gradients", "step", "compare", "share", "export", "benchmark")
SCRIPTS = ("train.py", "generate.py", *(f"emoft.{name}" for name in COMMANDS))


def is_speaker() -> bool:
    """Whether this process speaks for its host: under torchrun one does."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    """End the process from whatever library it is importing: some of them take an exception for something else."""
    if is_speaker():
        fresh_line = "\n" if sys.stderr.isatty() else ""  # behind the terminal's ^C
        print(f"{fresh_line}{program()}: stopped by Ctrl-C before it began", file=sys.stderr, flush=True)
    os._exit(128 + number)


if program() in SCRIPTS:
    # From the first moment on, and until `libraries_are_loaded`.
    signal.signal(signal.SIGINT, _leave_at_once)

from emoft.checkpoints.search import refuse_another_run
from emoft.command_line import HasFlags, parse_config
from emoft.config import INPUT_FILES, TrainConfig
from emoft.data.sources import check_file, is_folder
from emoft.data.template import TextFormat

TO_GENERATE = {"torch": "PyTorch", "transformers": "transformers"}  # which reads no data set
LIBRARIES = {**TO_GENERATE, "datasets": "datasets"}
PATIENCE_SECONDS = 2.5  # between two signs of life

Config = TypeVar("Config", bound=HasFlags)


def read_flags(config_class: type[Config], check: Callable[[Config], object] = lambda config: None) -> Config:
    """Return the flags of a script, or end it if one of them is wrong.

    Args:
        config_class: a dataclass of flags.
        check: what can be told at once of their values; raises UserError.
    """

    def read() -> Config:
        config = parse_config(config_class)
        check(config)
        return config

    if is_speaker():
        return guarded(read)
    try:
        return read()
    except UserError:
        sys.exit(2)  # the same mistake on all ranks of a host is told by one of them


def check_training(config: TrainConfig) -> None:
    """See what can be told at once of a training: its files and folders, and flags that exclude each other.

    Raises:
        UserError: one is missing, or the output folder holds another run, or two flags do not go together.
    """
    if config.torch_compile and config.parallel == "fsdp":
        # Its hooks, which gather weights, stand inside a block, and would cut the compiled code into pieces.
        raise UserError("--torch_compile does not go with --parallel fsdp: drop one of them")
    check_inputs(config)
    if config.push_to_hub:
        check_repository("--push_to_hub", config.push_to_hub)
    if not config.resume_from_checkpoint and "LOCAL_RANK" not in os.environ:  # torchrun may have restarted a run
        refuse_another_run(config)


def check_repository(flag: str, name: str) -> None:
    """See that a name is one of a repository on the Hub.

    Raises:
        UserError: it is not.
    """
    if name.count("/") != 1 or not all(part.strip() for part in name.split("/")):
        raise UserError(f"{flag} {name!r} is no repository on the Hub: write OWNER/NAME")


def check_inputs(config: TrainConfig) -> None:
    """See what can be told at once of what a training reads.

    Raises:
        UserError: a file or folder is missing, or the template is wrong.
    """
    for name in INPUT_FILES:
        if value := getattr(config, name):
            check_file(f"--{name}", value)
    if config.model_name_or_path:
        is_folder(config.model_name_or_path, "model with a tokenizer", "model_name_or_path")
    if config.tokenizer_name:
        is_folder(config.tokenizer_name, "tokenizer", "tokenizer_name")
    TextFormat(config.template)


_is_loaded = threading.Event()


def loading(stream: TextIO, libraries: Mapping[str, str] = LIBRARIES) -> None:
    """Name the libraries that are about to be imported, and again while it takes long; until `libraries_are_loaded`.

    Args:
        stream: standard output, or standard error where standard output is for results alone.
        libraries: names by modules.
    """
    # What is imported stays. To look through all of it for garbage again and again takes an eighth of the time.
    gc.disable()
    missing = [name for module, name in libraries.items() if module not in sys.modules]
    if not missing or os.environ.get("RANK", "0") != "0":
        return
    print(f"loading {', '.join(missing)} ...", file=stream, flush=True)

    def wait() -> None:
        seconds = 0.0
        while not _is_loaded.wait(PATIENCE_SECONDS):
            seconds += PATIENCE_SECONDS
            left = [name for module, name in libraries.items() if module not in sys.modules]
            print(f"still loading {', '.join(left) or 'the rest'} ({seconds:.0f} s) ...", file=stream, flush=True)

    threading.Thread(target=wait, daemon=True).start()


def libraries_are_loaded() -> None:
    """Leave Ctrl-C to the script from here on, and keep the libraries from speaking: what matters, emoft says."""
    # Here, since this module is there to be read before them.
    import huggingface_hub
    import transformers

    _is_loaded.set()
    gc.freeze()
    gc.enable()
    if signal.getsignal(signal.SIGINT) is _leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading and saving, which take a moment
    if datasets := sys.modules.get("datasets"):  # not loaded by all of the scripts
        datasets.logging.set_verbosity(logging.CRITICAL)  # its errors are told by our own
    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
