"""The flags of the upload."""

from dataclasses import dataclass
from typing import ClassVar

from emoft.flags import Command, Folder, Name, option


@dataclass
class ShareConfig:
    """The flags of `python -m emoft.share`."""

    command: ClassVar[Command] = Command(
        "emoft.share",
        "Upload a model that train.py wrote to the Hugging Face Hub, with its tokenizer, its card and emoft.json. Log"
        " in once by `hf auth login`, or set HF_TOKEN.",
        {"python -m emoft.share emoft-demo me/emoft-demo": "the demo's model, under your name"},
    )

    model_dir: Folder = option("", "an output folder of train.py", positional=True)
    repository: Name = option("", "OWNER/NAME on the Hub; it is made if it is not there", positional=True)
    private: bool = option(False, "make a new one visible to its owner alone")
