"""What is said of a step: in two languages, as text and as a page."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Result
from screenshots import browser, missing

from emoft.sentences import FOLDER, Sentences, read_sentences
from emoft.step.story import FORMULAS, LINES, lines_of_the_loop
from emoft.step.terminal import cells

LANGUAGES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
FIELD = re.compile(r"{(\w+)}")
KHMER = re.compile(r"[\u1780-\u17ff]")


@pytest.fixture
def two_texts(tmp_path: Path) -> Path:
    path = tmp_path / "two.txt"
    path.write_text("i feel happy today\nthe rain made me sad\n", encoding="utf-8")
    return path


def test_each_language_says_all_with_the_same_fields() -> None:
    english = read_sentences("en")
    assert LANGUAGES == ["en", "km"]
    for language in LANGUAGES:
        found = read_sentences(language)
        assert set(found) == set(english), language
        for key, sentence in found.items():
            assert set(FIELD.findall(sentence)) == set(FIELD.findall(english[key])), (language, key)
    same = {key for key, sentence in read_sentences("km").items() if sentence and not KHMER.search(sentence)}
    assert same <= {f"step.label.{name}" for name in ("line", "token", "id", "loss", "none", "decay")}


def test_what_is_missing_is_said_in_english(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "en.yaml").write_text('a:\n  b: "one {n}"\n  c: two\n  off: "no"\n')
    (tmp_path / "xx.yaml").write_text('a:\n  b: "un {n}"\n')
    monkeypatch.setattr("emoft.sentences.FOLDER", tmp_path)
    read_sentences.cache_clear()
    say = Sentences("xx")
    assert (say("a.b", n=1), say("a.c"), say("a.off")) == ("un 1", "two", "no")
    read_sentences.cache_clear()


def test_each_part_names_lines_that_train_py_has() -> None:
    assert list(FORMULAS) == list(LINES)
    for part, pieces in LINES.items():
        assert len(lines_of_the_loop(part)) == len(pieces), part
    assert lines_of_the_loop("shift") == ["targets = shift_labels(batch.labels)"]
    assert lines_of_the_loop("loss")[1] == "loss = losses.sum() / step.tokens"


def test_a_terminal_shows_khmer_in_as_many_cells_as_it_takes() -> None:
    assert [cells(text) for text in ("abc", "ខ្ញុំ", "你好")] == [3, 2, 4]


@pytest.mark.parametrize("blocks", [2, 12])
def test_two_short_texts_take_120_lines(run: Callable[..., Result], two_texts: Path, blocks: int) -> None:
    sizes = f"n_layer={blocks},n_embd=32,n_head=2,n_positions=64"
    result = run("-m", "emoft.step", "--train_file", two_texts, "--vocab_size", 300, "--config_overrides", sizes)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) <= 120
    assert [line.split(".")[0] for line in lines if re.match(r"\d+\. ", line)] == [str(n) for n in range(1, 11)]
    assert lines[-1] == "All 8 pairs of numbers agree." or lines[-1].startswith("All ")
    assert sum(line.strip().startswith("train.py: ") for line in lines) == 10
    of_prose = [line for line in lines if not line.startswith("   ")]
    assert max(map(len, of_prose)) <= 120


def test_khmer_says_the_same_numbers(run: Callable[..., Result], two_texts: Path) -> None:
    flags = ["--train_file", two_texts, "--vocab_size", 300]
    found = [run("-m", "emoft.step", *flags, "--language", language) for language in LANGUAGES]
    assert [each.code for each in found] == [0, 0]
    assert KHMER.search(found[1].out) and not KHMER.search(found[0].out)
    figures = [set(re.findall(r"-?\d+\.\d+(?:e-\d+)?", each.out)) for each in found]
    assert figures[0] == figures[1]


@pytest.fixture
def pages(run: Callable[..., Result], two_texts: Path, tmp_path: Path) -> dict[str, Path]:
    found = {language: tmp_path / f"{language}.html" for language in LANGUAGES}
    for language, path in found.items():
        flags = ["--train_file", two_texts, "--vocab_size", 300, "--language", language, "--output", path, "--json"]
        result = run("-m", "emoft.step", *flags)
        assert result.code == 0, result.err
        assert json.loads(result.out)["loss"] > 0, "standard output is JSON alone"
    return found


def test_the_page_needs_nothing_else(pages: dict[str, Path]) -> None:
    for language, path in pages.items():
        page = path.read_text(encoding="utf-8")
        assert f'<html lang="{language}">' in page
        assert not re.search(r"(src|href|url|@import)\s*[=(:]|https?:", page)
        assert page.count("<section>") == 10 and page.count("<svg") == 2
        assert "prefers-color-scheme: dark" in page and "@media print" in page


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_it_fits_a_phone_and_a_desk_light_and_dark(pages: dict[str, Path]) -> None:
    with browser(1280, 900) as driver:
        for path in pages.values():
            for width in (390, 1280):
                driver.execute_cdp_cmd(
                    "Emulation.setDeviceMetricsOverride",
                    {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
                )
                colors = []
                for scheme in ("light", "dark"):
                    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
                    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
                    driver.get(path.as_uri())
                    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
                    colors.append(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
                assert len(set(colors)) == 2


def test_the_example_in_the_docs_is_what_the_command_makes() -> None:
    page = (ROOT / "emoft" / "docs" / "step.html").read_text(encoding="utf-8")
    assert page.count("<section>") == 10
    titles = re.findall(r"<h2>(.+?)</h2>", page)
    english = read_sentences("en")
    assert titles == [english[f"step.{part}.title"].replace("'", "&#x27;") for part in FORMULAS]
    for part in FORMULAS:
        for line in lines_of_the_loop(part):
            assert line.replace("&", "&amp;").replace("'", "&#x27;").replace(">", "&gt;") in page, part
