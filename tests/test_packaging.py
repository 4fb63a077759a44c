"""What `pip install -e .` needs: all that is imported is declared, in ranges that hold the versions tested with."""

import ast
import re
import sys
import tomllib

from conftest import ROOT
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMES = {
    "PIL": "pillow",
    "yaml": "PyYAML",
    "sklearn": "scikit-learn",
    "mauve": "mauve-text",
}  # of a package, by that of its module
OURS = {"emoft", "train", "generate", "_typeshed"}


def declared(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {Requirement(line).name.lower(): Requirement(line) for line in lines}


def pins(file: str) -> dict[str, str]:
    found = re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name.lower(): version for name, version in found}


def imported() -> set[str]:
    found: set[str] = set()
    for path in [ROOT / "train.py", ROOT / "generate.py", *(ROOT / "emoft").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return {NAMES.get(name, name).lower() for name in found - OURS - set(sys.stdlib_module_names)}


def test_all_that_is_imported_is_declared() -> None:
    assert imported() <= set(declared("evaluate", "export", "mauve", "benchmark"))


def test_the_versions_tested_with_are_within_the_ranges() -> None:
    tested = pins("requirements.txt")
    assert set(declared()) == set(tested)
    tested |= pins("tests/requirements.txt")
    for name, requirement in declared("evaluate", "export", "mauve", "benchmark").items():
        assert tested[name] in requirement.specifier, name


def test_the_version_has_its_entry_in_the_changelog() -> None:
    page = (ROOT / "emoft" / "docs" / "changelog.md").read_text(encoding="utf-8")
    assert f"\n## {PROJECT['version']}\n" in page


def test_this_python_is_one_it_is_for() -> None:
    assert ".".join(map(str, sys.version_info[:3])) in Requirement(f"python{PROJECT['requires-python']}").specifier
