"""The lesson says what is so: each edit fits the code, its commands run, and the symptom appears only with it."""

import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, Result

DOCS = ROOT / "emoft" / "docs"
LESSON = (DOCS / "lesson.md").read_text(encoding="utf-8")
KHMER = (DOCS / "lesson.km.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
TERMS = 40


@dataclass(frozen=True)
class Experiment:
    """One of the ten, as its section has it."""

    number: int
    edits: tuple[tuple[str, str, str], ...]  # file, the line that goes, the line that comes
    commands: tuple[str, ...]
    symptoms: tuple[str, ...]


def blocks(text: str, *kinds: str) -> list[str]:
    return [content for kind, content in FENCE.findall(text) if kind in kinds]


def read_experiments() -> list[Experiment]:
    sections = re.split(r"^### (\d+)\. .*$", LESSON.partition("\n## Forty terms")[0], flags=re.MULTILINE)[1:]
    found = []
    for number, text in zip(sections[::2], sections[1::2], strict=True):
        edits, file = [], ""
        for part in re.split(r"(^```diff\n.*?^```)", text, flags=re.MULTILINE | re.DOTALL):
            if not part.startswith("```diff"):
                file = ([file, *re.findall(r"`([\w/]+\.(?:py|yaml))`:\n", part)])[-1]
                continue
            old, new = (line[1:] for line in part.splitlines()[1:-1])
            edits.append((file, old, new))
        (commands,), (symptoms,) = blocks(text, "bash"), blocks(text, "text")
        found.append(Experiment(int(number), tuple(edits), tuple(commands.splitlines()), tuple(symptoms.splitlines())))
    return found


EXPERIMENTS = read_experiments()


def perform(run: Callable[..., Result], experiment: Experiment, folder: Path, edited: bool) -> str:
    """Run the commands in a copy of the project, with the edits or without; returns all that the last one printed."""
    shutil.copytree(ROOT / "emoft", folder / "emoft", ignore=shutil.ignore_patterns("__pycache__", "docs"))
    shutil.copy(ROOT / "train.py", folder)
    for file, old, new in experiment.edits if edited else ():
        source = (folder / file).read_text(encoding="utf-8")
        assert source.count(f"{old}\n") == 1, f"{file} has no such line any more: {old!r}"
        (folder / file).write_text(source.replace(f"{old}\n", f"{new}\n"), encoding="utf-8")
    (folder / "start.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(folder)!r})\ndel sys.argv[0]\n"
        "if sys.argv[0] == '-m':\n    del sys.argv[0]\n"
        "    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "else:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n",
        encoding="utf-8",
    )
    said = ""
    for command in experiment.commands:
        program, *words = shlex.split(command)
        assert program == "python"
        # Shorter than in the lesson, by what does not matter for the symptom. Of a flag given twice the last counts.
        if words[0] == "train.py":
            steps = min(int(words[words.index("--max_steps") + 1]), 100 if experiment.number == 9 else 60)
            words += ["--max_steps", str(steps), "--eval_steps", str(steps), "--max_eval_samples", "16"]
        result = run(folder / "start.py", *words, cwd=folder)
        assert result.code == (1 if "emoft.step" in command and edited and experiment.number != 10 else 0), result.err
        said = result.out
    return said


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda each: str(each.number))
def test_the_edit_shows_the_symptom_and_nothing_else_does(
    run: Callable[..., Result], tmp_path: Path, experiment: Experiment
) -> None:
    said = perform(run, experiment, tmp_path / "edited", edited=True)
    for symptom in experiment.symptoms:
        assert without_figures(symptom) in without_figures(said), said
    # The tenth edit changes nothing, which is what it shows; of the second and the fourth others show what is healthy.
    if experiment.number not in (2, 4, 10):
        sound = perform(run, experiment, tmp_path / "sound", edited=False)
        for symptom in experiment.symptoms:
            assert without_figures(symptom) not in without_figures(sound), sound


def without_figures(text: str) -> str:
    """Numbers depend on the number of steps and on the machine; words do not."""
    return re.sub(r"\d[\d.,]*(e[-+]\d+)?", "#", text)


def test_there_are_ten_and_each_has_its_edit() -> None:
    assert [each.number for each in EXPERIMENTS] == list(range(1, 11))
    assert all(each.edits and each.commands and each.symptoms for each in EXPERIMENTS)


def test_each_line_that_it_quotes_stands_in_train_py() -> None:
    lines = {line.strip() for line in (ROOT / "train.py").read_text(encoding="utf-8").splitlines()}
    quoted = [line for block in blocks(LESSON, "python") for line in block.splitlines()]
    assert len(quoted) >= 11
    for line in quoted:
        assert line in lines, line


@pytest.mark.parametrize("text", [LESSON, KHMER], ids=["English", "Khmer"])
def test_it_explains_forty_terms(text: str) -> None:
    rows = [line for line in text.rpartition("| --- | --- |\n")[2].splitlines() if line.startswith("| ")]
    assert len(rows) == len(set(rows)) == TERMS


def test_the_khmer_lesson_is_the_same_lesson() -> None:
    for kinds in (("bash",), ("diff",), ("python",), ("text",)):
        assert blocks(KHMER, *kinds) == blocks(LESSON, *kinds)
    assert len(re.findall(r"^#+ ", KHMER, flags=re.MULTILINE)) == len(re.findall(r"^#+ ", LESSON, flags=re.MULTILINE))
    terms = [
        re.findall(r"^\| ([^|]+?) \|", text.rpartition("| --- | --- |\n")[2], flags=re.MULTILINE)
        for text in (LESSON, KHMER)
    ]
    for english, khmer in zip(*terms, strict=True):
        assert english in khmer, "each Khmer term has the field's English one beside it"
