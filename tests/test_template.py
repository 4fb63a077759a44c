from pathlib import Path

import pytest

from emoft.errors import UserError
from emoft.template import TextFormat

CONDITIONAL = TextFormat("{label}: {text}", labels=["joy", "fear"])


def test_fill() -> None:
    assert TextFormat("Emotion: {text}").fill("i feel {fine}") == "Emotion: i feel {fine}"
    assert CONDITIONAL.fill("a", "joy") == "joy: a"
    assert TextFormat("{{{text}}}").fill("a") == "{a}"


def test_prompt_ends_where_the_words_begin() -> None:
    assert TextFormat("Emotion: {text}").prompt() == "Emotion:"
    assert CONDITIONAL.prompt("joy") == "joy:"
    assert CONDITIONAL.prompt("joy", "i feel") == "joy: i feel"
    assert TextFormat("{label}: {text}. The end", labels=["joy"]).prompt("joy", "i") == "joy: i"


@pytest.mark.parametrize(
    ("text_format", "label", "told"),
    [
        (TextFormat("Emotion: {text}"), "joy", "names no emotion"),
        (CONDITIONAL, "envy", "choose from joy, fear"),
        (TextFormat("{text} ({label})", labels=["joy"]), "joy", "after the text"),
    ],
)
def test_prompts_that_cannot_be(text_format: TextFormat, label: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        text_format.prompt(label)


@pytest.mark.parametrize(
    "template", ["", "Emotion", "{label}", "{text} {mood}", "{text", "{0}", "{text!r}", "{text:>9}"]
)
def test_templates_that_cannot_be(template: str) -> None:
    with pytest.raises(UserError, match="--template"):
        TextFormat(template)


def test_round_trip(tmp_path: Path) -> None:
    text_format = TextFormat("{label}: {text} ភាសា", append_eos=False, max_length=7, labels=["joy", "ភ័យ"])
    text_format.save(tmp_path)
    assert TextFormat.load(tmp_path) == text_format
