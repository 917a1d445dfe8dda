"""How the parts meet: who imports whom, and what is public."""

import ast
import graphlib
from pathlib import Path

import looplab

PACKAGE = Path(looplab.__file__).parent


def imported(path):
    """The modules of looplab that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module + ".").startswith("looplab."):
            folder = node.module.removeprefix("looplab").removeprefix(".")
            is_package = (PACKAGE / folder.replace(".", "/")).is_dir()
            names |= {f"{folder}.{alias.name}".strip(".") for alias in node.names} if is_package else {folder}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("looplab")}
    return names


def test_imports_run_one_way():
    """No file imports, through whatever others, what imports it."""
    found = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): imported(path)
        for path in PACKAGE.rglob("*.py")
        if path.stem != "__init__"
    }
    graphlib.TopologicalSorter(found).prepare()  # raises CycleError


def test_recipes_use_public_names_alone():
    root = Path(looplab.recipes.__file__).parent if hasattr(looplab, "recipes") else PACKAGE.parent / "recipes"
    for path in root.glob("*.py"):
        others = {name for name in imported(path) if name.split(".")[0] == "recipes"}  # recipes share parts
        assert imported(path) - others <= {"looplab", *looplab.__all__}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "looplab":
                assert node.attr in looplab.__all__


def test_public_names_are_few_and_have_docstrings():
    assert len(looplab.__all__) <= 15
    for name in looplab.__all__:
        assert getattr(looplab, name).__doc__


def lengths_of_functions(tree):
    """The lines of each function without its docstring, by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if body is not node.body else 0
            yield node.name, node.end_lineno - node.lineno + 1 - docstring


def test_no_file_has_more_than_300_lines():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_no_function_has_more_than_60_lines():
    """Without its docstring."""
    lengths = {
        f"{path.relative_to(PACKAGE)}:{name}": length
        for path in PACKAGE.rglob("*.py")
        for name, length in lengths_of_functions(ast.parse(path.read_text()))
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_a_trainer_has_few_names():
    """A subclass shares them with the methods and attributes of its own."""
    trainer = looplab.Trainer()
    names = {name for name in {*dir(trainer), *vars(trainer)} if not hasattr(object, name)}
    names -= {"__dict__", "__module__", "__weakref__", "__annotations__"}
    assert len(names) <= 50, sorted(names)
