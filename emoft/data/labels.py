"""What a label is: one spelling for each emotion, whatever the file, its format or the keyboard made of it."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

WHOLE_NUMBER = re.compile(r"([+-]?\d+)\.0*")  # what other programs make of 3 in a column that also has gaps
# They have no width and come along unseen when a text is copied.
UNSEEN = dict.fromkeys(map(ord, "\ufeff\u200b\u2060"))


def label_name(value: Any, names: Sequence[str] = ()) -> str | None:
    """Return the emotion that a value stands for; None if it stands for none.

    Args:
        value: a string, an integer, a boolean, or a float that is a whole number; missing are None, NaN, a blank string
            and, of a `ClassLabel`, -1.
        names: of the `ClassLabel` that the value is an id of; none otherwise.

    Raises:
        ValueError: it is anything else; the message says what it is.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if names:
        if not isinstance(value, int):
            raise ValueError(f"the label {value!r} is no number of a class")
        if value == -1:
            return None
        if not 0 <= value < len(names):
            raise ValueError(f"the label {value} is beyond the {len(names)} names of its classes ({', '.join(names)})")
        return clean_label(names[value])
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str):
        return clean_label(value) or None
    kind = {"list": "a list", "dict": "an object", "float": "a fraction"}.get(type(value).__name__)
    raise ValueError(
        f"the label {str(value)[:40]!r} is {kind or f'of type {type(value).__name__}'}, not the name of one emotion"
    )


def clean_label(label: str) -> str:
    """Return a label as it is compared: composed (NFC), with single blanks inside, none around, and nothing unseen."""
    label = " ".join(unicodedata.normalize("NFC", label.translate(UNSEEN)).split())
    number = WHOLE_NUMBER.fullmatch(label)
    return number[1] if number else label


def differ_in_case_only(labels: Sequence[str]) -> list[str]:
    """Return labels, in the given order, that another one equals but for upper and lower case."""
    folded = [label.casefold() for label in labels]
    return [label for label, fold in zip(labels, folded, strict=True) if folded.count(fold) > 1]
