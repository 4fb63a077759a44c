"""The README and its pages say what is so: their flags exist, their links lead somewhere, names are where they say."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

from emoft.benchmark.config import BenchmarkConfig
from emoft.config import EvaluateConfig, GenerateConfig, GradientsConfig, TrainConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "emoft" / "docs").glob("*.md"))]


def test_it_is_short_and_begins_with_the_two_commands() -> None:
    assert len(README.split()) <= 2600
    first, second = README.index("<!-- first command -->"), README.index("<!-- second command -->")
    assert first < second < README.index("```", second + 60)
    assert README.index("```bash") > first, "no other command before them"


@pytest.mark.parametrize("page", PAGES, ids=[path.name for path in PAGES])
def test_every_flag_it_names_exists(page: Path) -> None:
    configs = (TrainConfig, GenerateConfig, EvaluateConfig, BenchmarkConfig, GradientsConfig)
    known = {"config", "help"}.union(*(config.__dataclass_fields__ for config in configs))
    known |= {f"no_{name}" for name in known}
    others = {"logdir", "logdir_spec", "samples_per_plugin"}  # of tensorboard
    others |= {"standalone", "nnodes", "nproc_per_node", "max_restarts", "rdzv_backend", "rdzv_endpoint", "rdzv_id"}
    others |= {"shutdown_timeout"}
    others |= {"tuning"}  # of tests/faults.py
    others |= {"nodes", "ntasks", "gpus", "cpus", "signal", "requeue"}  # of Slurm
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
