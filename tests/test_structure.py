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
        if isinstance(node, ast.ImportFrom) and node.module == "looplab":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("looplab."):
            names.add(node.module.removeprefix("looplab."))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("looplab")}
    return names


def test_imports_run_one_way():
    """No file imports, through whatever others, what imports it."""
    found = {path.stem: imported(path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
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
