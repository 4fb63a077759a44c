"""The flags of the export."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from emoft.flags import Command, File, NameOrFolder, option

PACKAGES = {"onnx": ("onnx", "onnxscript"), "gguf": ("gguf",)}  # that a format needs besides emoft's own


@dataclass
class ExportConfig:
    """The flags of `python -m emoft.export`."""

    command: ClassVar[Command] = Command(
        "emoft.export",
        "Write a model as one file for other programs: .onnx for ONNX Runtime, without its tokenizer, or .gguf for"
        " llama.cpp and what is built on it, with its tokenizer. Weights stay in float32. The packages for it are"
        " optional: pip install onnx onnxscript, or pip install gguf.",
        {
            "python -m emoft.export emoft-demo --output emoft-demo.gguf": "for llama.cpp",
            "python -m emoft.export emoft-demo --output emoft-demo.onnx": "for ONNX Runtime",
        },
    )

    model: NameOrFolder = option("", "a folder that train.py wrote, or a GPT-2 of the Hub", positional=True)
    output: File = option("", "the file to write")
    format: Literal["auto", "onnx", "gguf"] = option("auto", "its format; auto: as the ending of output says")
    overwrite_output: bool = option(False, "replace the file if it is there")

    @property
    def chosen_format(self) -> str:
        """The format by its flag, or by the ending of the file; empty if neither says it."""
        if self.format != "auto":
            return self.format
        ending = Path(self.output).suffix.lower().removeprefix(".")
        return ending if ending in PACKAGES else ""
