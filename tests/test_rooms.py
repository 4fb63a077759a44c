"""The rooms of emoft/: what each may import. Read from the source, so that an import inside a function counts too."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# A module imports only from its own line and those above it. On a line with several rooms, none imports another.
ORDER = [
    ["emoft.streams", "emoft.colors"],
    ["emoft.errors"],
    ["emoft.terminal", "emoft.files", "emoft.private", "emoft.sentences"],
    ["emoft.flags", "emoft.suggestions", "emoft.help", "emoft.command_line"],
    ["emoft.config"],
    ["emoft.hints", "emoft.device"],
    ["emoft.distributed"],
    ["emoft.data"],
    ["emoft.training"],
    ["emoft.model"],
    ["emoft.evaluate", "emoft.gradients"],
    ["emoft.tracking"],
    ["emoft.checkpoints"],
    ["emoft.share"],
    ["emoft.start", "emoft.run"],
    ["emoft.plan"],
    ["train", "generate"],
    ["emoft.step", "emoft.compare", "emoft.export", "emoft.benchmark"],
]
LAYER = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
SHARE_A_LINE = {"emoft.flags", "emoft.suggestions", "emoft.help", "emoft.command_line"}  # and may import each other


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in [ROOT / "train.py", ROOT / "generate.py", *(ROOT / "emoft").rglob("*.py")]}
DOORS = {name for name in MODULES if name.endswith(".__main__")}


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def is_for_types_only(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(module: str, tree: ast.AST | None = None, also_for_types: bool = False) -> set[str]:
    """The modules of this project that a module imports."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(ast.parse(MODULES[module].read_text()) if tree is None else tree):
        if isinstance(node, ast.If) and is_for_types_only(node) and not also_for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: name the room, as in `from emoft.data.batching import Batch`"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found |= {name for name in (whole if whole in MODULES else node.module,) if name in MODULES}
        else:
            found |= imports_of(module, node, also_for_types)
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module: str) -> None:
    own = room_of(module)
    if own == "emoft":
        return
    assert own in LAYER, f"{own} has no place in the order of the rooms"
    for imported in imports_of(module):
        room = room_of(imported)
        is_own = room == own or {room, own} <= SHARE_A_LINE
        is_above = LAYER[room] < LAYER["train" if module in DOORS else own]  # a door is a script, as train.py is
        assert is_own or is_above, f"{module} imports {imported}, which comes later or beside it"


def test_no_circle() -> None:
    open_, done = [], set()

    def visit(module: str) -> None:
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        if module not in done:
            open_.append(module)
            for imported in sorted(imports_of(module)):
                visit(imported)
            done.add(open_.pop())

    for module in sorted(MODULES):
        visit(module)


def test_nothing_imports_a_door() -> None:
    assert {name.removesuffix(".__main__") for name in DOORS} == {
        "emoft.benchmark", "emoft.compare", "emoft.evaluate", "emoft.export", "emoft.gradients",
        "emoft.share", "emoft.step",
    }  # fmt: skip
    for module in MODULES:
        imported = imports_of(module, also_for_types=True)
        assert not imported & DOORS, module
        # The benchmark and the explained step train by the loop of train.py itself.
        assert not imported & {"train", "generate"} or room_of(module) in ("emoft.benchmark", "emoft.step"), module


def test_an_import_inside_a_function_says_why() -> None:
    """Only what takes long to load stands there, and the line says so or the one above it does."""
    for module, path in MODULES.items():
        source = path.read_text()
        lines = source.splitlines()
        for function in ast.walk(ast.parse(source)):
            if not isinstance(function, ast.FunctionDef):
                continue
            reasons = False
            for node in function.body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    line, above = lines[node.lineno - 1], lines[node.lineno - 2]
                    reasons = reasons or "#" in line or above.strip().startswith("#")
                    assert reasons, f"{module}, line {node.lineno}: say why this is imported here"


@pytest.mark.parametrize("room", sorted(path.parent.name for path in (ROOT / "emoft").glob("*/__init__.py")))
def test_a_room_says_what_it_holds(room: str) -> None:
    source = (ROOT / "emoft" / room / "__init__.py").read_text()
    (docstring,) = ast.parse(source).body
    assert isinstance(docstring, ast.Expr)
    assert len(source.splitlines()) == 1
    for path in (ROOT / "emoft" / room).glob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_tests_mirror_the_rooms() -> None:
    rooms = {path.parent.name for path in (ROOT / "emoft").glob("*/__init__.py")}
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name[0] not in "._"} == rooms


class TestTheLoop:
    """train.py stays what a student reads in one sitting."""

    TREE = ast.parse((ROOT / "train.py").read_text())

    def function(self, name: str) -> ast.FunctionDef:
        return next(node for node in self.TREE.body if isinstance(node, ast.FunctionDef) and node.name == name)

    def test_is_short(self) -> None:
        train = self.function("train")
        loop = next(node for node in ast.walk(train) if isinstance(node, ast.For))
        assert len((ROOT / "train.py").read_text().splitlines()) <= 220
        assert train.end_lineno - train.lineno + 1 <= 130
        assert loop.end_lineno - loop.lineno + 1 <= 45
        nested = [
            node for node in ast.walk(train) if isinstance(node, ast.FunctionDef | ast.Lambda) and node is not train
        ]
        assert [type(node) for node in nested] in ([], [ast.Lambda]), "no function that reads a name bound later"

    def test_holds_the_whole_step_in_order(self) -> None:
        loop = next(node for node in ast.walk(self.function("train")) if isinstance(node, ast.For))
        calls = [ast.unparse(node.func) for node in ast.walk(loop) if isinstance(node, ast.Call)]
        by_line = sorted(
            (node.lineno, node.col_offset, ast.unparse(node.func))
            for node in ast.walk(loop)
            if isinstance(node, ast.Call)
        )
        order = [name for _, _, name in by_line]
        step = [
            "batch.to", "precision.autocast", "transformer", "shift_labels", "cross_entropy", "losses.sum",
            "scaler.unscale_", "clip_in_next_step", "run.refuse_step", "scaler.step", "scaler.update",
            "schedule.step", "optimizer.zero_grad", "run.finish_step",
        ]  # fmt: skip
        assert [name for name in order if name in step] == step
        assert any(name.endswith(".backward") for name in calls)

    def test_the_run_touches_neither_loss_nor_gradient(self) -> None:
        source = "".join(path.read_text() for path in sorted((ROOT / "emoft" / "run").glob("*.py")))
        for word in (".backward(", ".grad ", ".grad)", "autocast", "zero_grad", "optimizer.step(", "scaler.s"):
            assert word not in source, word
