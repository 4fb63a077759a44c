"""The README and its pages say what is so: their flags exist, their links lead somewhere, names are where they say."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

from emoft.benchmark.config import BenchmarkConfig
from emoft.compare.config import CompareConfig
from emoft.config import EvaluateConfig, GenerateConfig, GradientsConfig, TrainConfig
from emoft.export.config import ExportConfig
from emoft.share.config import ShareConfig
from emoft.step.config import StepConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "emoft" / "docs").glob("*.md"))]


def test_it_is_short_and_begins_with_the_two_commands() -> None:
    assert len(README.split()) <= 2600
    first, second = README.index("<!-- first command -->"), README.index("<!-- second command -->")
    assert first < second < README.index("```", second + 60)
    assert README.index("```bash") > first, "no other command before them"


@pytest.mark.parametrize("page", PAGES, ids=[path.name for path in PAGES])
def test_every_flag_it_names_exists(page: Path) -> None:
    configs = (
        TrainConfig,
        GenerateConfig,
        EvaluateConfig,
        BenchmarkConfig,
        GradientsConfig,
        StepConfig,
        CompareConfig,
        ShareConfig,
        ExportConfig,
    )
    known = {"config", "help"}.union(*(config.__dataclass_fields__ for config in configs))
    known |= {f"no_{name}" for name in known}
    others = {"logdir", "logdir_spec", "samples_per_plugin"}  # of tensorboard
    others |= {"standalone", "nnodes", "nproc_per_node", "max_restarts", "rdzv_backend", "rdzv_endpoint"}
    others |= {"rdzv_id", "rdzv_conf", "shutdown_timeout"}
    others |= {"tuning", "tokenizer"}  # of tests/faults.py and tests/million.py
    others |= {"nodes", "ntasks", "gpus", "cpus", "signal", "requeue"}  # of Slurm
    others |= {"data", "tokenizer"}  # of tests/conditional_recipe.py
    named = set(re.findall(r"--([a-z_]+)", page.read_text(encoding="utf-8")))
    assert named - known - others == set()


@pytest.mark.parametrize("page", PAGES, ids=[path.name for path in PAGES])
def test_every_link_leads_to_a_file_or_a_heading_and_to_no_line(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, place = target.partition("#")
        assert not re.match(r"L\d", place), f"{target}: a line moves, a name stays"
        assert target.startswith("https://") or not path or (page.parent / path).exists(), target
        assert path or place in headings or not place.isascii(), target


def test_every_function_it_names_stands_where_it_says() -> None:
    """In the tour of a step, where each paragraph names functions and links the file that holds them."""
    tour = README.partition("## One optimization step")[2].partition("\n## ")[0]
    found = 0
    for paragraph in re.split(r"\n(?=\d+\. )|\n\n", tour):
        files = ["train.py", *re.findall(r"\]\(([\w/]+\.py)\)", paragraph)]
        defined = set()
        for file in files:
            for node in ast.walk(ast.parse((ROOT / file).read_text())):
                defined |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
        for name in re.findall(r"`(\w+)`", paragraph):
            if (ROOT / "emoft" / name).is_dir() or name in (
                "samples_per_second",
                "Trainer",
                "torchrun",
                "clip_grad_norm_",
            ):
                continue
            assert name in defined, (name, files)
            found += 1
    assert found >= 3


def test_every_default_of_the_tutorials_table_is_the_programs() -> None:
    rows = re.findall(r"^\| [^|]+ \| `--(\w+)` \| (?:`([^`]+)`|([\w.-]+))", README, flags=re.MULTILINE)
    assert len(rows) >= 10
    for name, text, number in rows:
        default = getattr(TrainConfig, name)
        if isinstance(default, bool):
            assert number == ("on" if default else "off"), name
        elif isinstance(default, str):
            assert (text or number) == default, name
        else:
            assert float(number) == default, name


class TestTheKhmerReadme:
    """It is the README in another language: the same commands, figures and flags, in the same order."""

    KHMER = (ROOT / "emoft" / "docs" / "README.km.md").read_text(encoding="utf-8")

    @staticmethod
    def blocks(text: str) -> list[str]:
        return re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)

    @staticmethod
    def sections(text: str) -> list[str]:
        return re.split(r"^## ", text, flags=re.MULTILINE)

    @staticmethod
    def figures(text: str) -> set[str]:
        """The numbers of two digits and more in its prose: not in commands, names, tables and the targets of links."""
        prose = re.sub(r"^```.*?^```|`[^`]*`|\]\([^)]*\)|^\|.*$", "", text, flags=re.MULTILINE | re.DOTALL)
        return set(re.findall(r"\d[\d,.]*\d|\d+(?:e-\d+)", prose))

    def test_the_readme_leads_there_at_its_top(self) -> None:
        assert "(emoft/docs/README.km.md)" in "\n".join(README.splitlines()[:40])

    def test_the_commands_are_the_same(self) -> None:
        assert self.blocks(self.KHMER) == self.blocks(README)
        assert len(self.blocks(README)) > 8

    def test_so_are_the_figures_section_by_section(self) -> None:
        theirs, ours = self.sections(self.KHMER), self.sections(README)
        assert len(theirs) == len(ours)
        for number, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            assert self.figures(one) == self.figures(other), f"section {number}"
        assert not re.search("[\u17e0-\u17e9]", self.KHMER), "figures are written as in the README"

    def test_so_are_the_tables_flags_and_links(self) -> None:
        def rows(text: str) -> list[list[str]]:
            return [re.findall(r"`[^`]+`", line) for line in text.splitlines() if line.startswith("| ")]

        def targets(text: str, folder: Path) -> list[str]:
            found = [each for each in re.findall(r"\]\(([^)#]+)", text) if not each.startswith("https://")]
            return [str((folder / each).resolve().relative_to(ROOT)) for each in found]

        assert rows(self.KHMER) == rows(README)
        assert set(re.findall(r"--\w+", self.KHMER)) == set(re.findall(r"--\w+", README))
        languages = {"README.md", "emoft/docs/README.km.md", "emoft/docs/lesson.md", "emoft/docs/lesson.km.md"}
        theirs, ours = targets(self.KHMER, ROOT / "emoft" / "docs"), targets(README, ROOT)
        assert [each for each in theirs if each not in languages] == [each for each in ours if each not in languages]
