import json
import re
from pathlib import Path

import pytest

from emoft.data.template import TextFormat
from emoft.errors import UserError

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


def test_prompts_of_all_emotions_where_the_template_can_steer() -> None:
    assert CONDITIONAL.prompts() == {"joy": "joy:", "fear": "fear:"}
    assert TextFormat("{label}: {text} ({label})", labels=["joy"]).prompts() == {"joy": "joy:"}
    assert TextFormat("So: {text} ({label})", labels=["joy"]).prompts() == {"text": "So:"}


def test_braces_that_are_text() -> None:
    text_format = TextFormat("{{text}} {label}: {text}{{}}", labels=["joy"])
    assert text_format.fill("a", "joy") == "{text} joy: a{}"
    assert text_format.prompt("joy") == "{text} joy:"
    assert text_format.conditioned_from("a", "joy") == len("{text} joy: ")
    assert text_format.extract("{text} joy: a{}", "joy") == "a"


def test_a_text_may_hold_what_follows_it() -> None:
    assert TextFormat("{label}: {text}.", labels=["joy"]).extract("joy: i went. then i slept.", "joy") == (
        "i went. then i slept"
    )
    assert TextFormat('"{text}"').extract('"she said "hi" to me"') == 'she said "hi" to me'
    assert TextFormat("{text}.").extract("it ended early") == "it ended early"


def test_where_the_label_begins_after_the_text() -> None:
    text_format = TextFormat("so: {text} => {label}", labels=["joy"])
    assert text_format.conditioned_from("a", "joy") == len("so: a => ")
    assert CONDITIONAL.conditioned_from("a", "joy") == len("joy: ")


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


@pytest.mark.parametrize("written", [" joy", "joy ", "jo\u200by", "\ufeffjoy"])
def test_an_emotion_is_known_however_it_is_written(written: str) -> None:
    assert CONDITIONAL.prompt(written) == "joy:"
    assert TextFormat("{label}: {text}", labels=[" joy", "d\u00e9gout"]).prompt("joy") == " joy:", "of an older model"
    assert TextFormat("{label}: {text}", labels=["d\u00e9gout"]).prompt("de\u0301gout") == "d\u00e9gout:"


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("max_length", "64", "max_length is '64', not a whole number above 0"),
        ("max_length", 0, "not a whole number"),
        ("max_length", True, "not a whole number"),
        ("append_eos", "yes", "append_eos is 'yes', not true or false"),
        ("template", 3, "template is 3, not a string"),
        ("labels", [1, 2], "not a list of strings"),
        ("labels", "joy", "not a list of strings"),
        ("labels", None, "not a list of strings"),
        ("more", 1, "more"),
    ],
)
def test_a_file_that_was_edited_wrongly_is_one_line(tmp_path: Path, field: str, value: object, told: str) -> None:
    content = {"template": "{label}: {text}", "append_eos": True, "max_length": 64, "labels": ["joy"]}
    (tmp_path / "emoft.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(UserError, match=re.escape(told)):
        TextFormat.load(tmp_path)
