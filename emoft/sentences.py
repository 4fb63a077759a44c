"""The sentences of a command in several languages: a file of `emoft/languages/` for each, the same keys in all."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "languages"
FALLBACK = "en"


@cache
def read_sentences(language: str) -> dict[str, str]:
    """Return all sentences of a language by their keys, such as "step.shift.title"."""
    text = (FOLDER / f"{language}.yaml").read_text(encoding="utf-8")
    return _flat(yaml.load(text, Loader=yaml.BaseLoader))  # text only: YAML's own types make a false of the key "off"


def _flat(content: dict[str, Any], before: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in content.items():
        key = f"{before}{name}"
        found |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value.strip()}
    return found


class Sentences:
    """Says things in a language; what is missing there, in English."""

    def __init__(self, language: str) -> None:
        self.language = language
        self._found = {**read_sentences(FALLBACK), **read_sentences(language)}

    def __call__(self, key: str, **values: object) -> str:
        """Return a sentence with its `{fields}` filled.

        Raises:
            KeyError: no language has it, or a field of it is not given; a fault of ours.
        """
        return self._found[key].format(**values)
