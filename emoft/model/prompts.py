"""What a model is asked to continue."""

import sys
from pathlib import Path

from emoft.config import GenerateConfig
from emoft.data.sources import is_folder
from emoft.data.template import TextFormat
from emoft.errors import UserError
from emoft.hints import python

TUTORIAL_PROMPT = "Emotion: i didnt feel well"


def read_prompts(config: GenerateConfig) -> list[str]:
    """Return the prompts that the flags ask for; without any, the tutorial's.

    Raises:
        UserError: flags that contradict each other, a file that cannot be read, an emotion the model does not know.
    """
    name = config.model_name_or_path
    if name == GenerateConfig.model_name_or_path and not Path(name).is_dir():
        raise UserError(
            f"no folder {name} here: train first with {python()} train.py, or name a model by --model_name_or_path"
        )
    sources = {
        "--prompt": config.prompt,
        "--emotion": config.emotion,
        "--prompts_file": config.prompts_file,
        "--interactive": config.interactive,
    }
    given = [flag for flag, value in sources.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each say what to continue: give one of them")
    if config.interactive and (config.json or config.num_return_sequences > 1):
        raise UserError("--interactive prints one text at a time: drop --json and --num_return_sequences")
    if config.num_return_sequences > 1 and not config.do_sample:
        raise UserError(f"--num_return_sequences {config.num_return_sequences} would be the same text: add --do_sample")
    if config.text and not config.emotion:
        raise UserError("--text goes with --emotion: add one, or give the whole prompt by --prompt")
    if config.emotion:
        text_format = read_text_format(config)
        mixture = text_format.mixture(config.emotion)
        # Of a mixture the emotion of the largest share stands in the prompt that is shown.
        return [text_format.prompt(max(mixture, key=lambda label: mixture[label]), config.text)]
    if config.prompts_file:
        return _lines(config.prompts_file)
    return config.prompt or [TUTORIAL_PROMPT]


def read_text_format(config: GenerateConfig) -> TextFormat:
    """Return the format saved with the model.

    Raises:
        UserError: there is none.
    """
    name = config.model_name_or_path
    folder = Path(name)
    if not is_folder(name, "model", "model_name_or_path"):
        from emoft.data import hub  # here, since of a folder the first second tells which emotions it knows

        folder = hub.model_folder(name, "model_name_or_path", config.model_revision)
    return TextFormat.load(folder, name)


def _lines(name: str) -> list[str]:
    """Return the lines of a file, or of standard input, that are not blank."""
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        # Not splitlines, which takes some characters of a text for ends of lines too.
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        prompts = [line for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"--prompts_file {name} line {line} is not UTF-8: save the file in the encoding UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"--prompts_file {name}: {error.strerror}, check the path") from None
    if not prompts:
        raise UserError(f"--prompts_file {name} holds no prompt: write one a line")
    return prompts
