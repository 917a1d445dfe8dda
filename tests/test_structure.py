"""How the parts meet: who imports whom, and what is public."""

import ast
from pathlib import Path

import looplab

PACKAGE = Path(looplab.__file__).parent
ALONE = {
    "arrays",
    "hparams",
    "loop",
    "losses",
    "metrics",
    "pairs",
    "paths",
    "projector",
    "randomness",
    "report",
    "safetensors",
    "tracking",
    "warn",
}
ALLOWED = {
    **{name: set() for name in ALONE},
    "callbacks": {"warn"},
    "interrupts": {"warn"},
    "lock": {"hparams", "warn"},
    "checkpoint": {"checks", "plain_files", "state", "tree"},
    "checks": {"tracking", "warn"},
    "data": {"arrays", "randomness", "warn"},
    "guard": {"tracking"},
    "plain_files": {"safetensors", "tree"},
    "plausible": {"guard", "pairs"},
    "summaries": {"hparams", "lock", "projector", "warn"},
    "state": {"plain_files", "tracking", "tree", "warn"},
    "resume": {"checkpoint", "plain_files", "warn"},
    "steps": {"checks", "guard", "loop", "losses", "metrics", "plausible", "state", "tracking", "warn"},
    "log": {"checks", "lock", "paths", "projector", "steps", "summaries"},
    "tracing": {"data", "log", "loop", "randomness", "tracking", "warn"},
    "epoch": {"callbacks", "data", "guard", "loop", "metrics", "steps", "tracing", "tracking", "warn"},
    "fit": {
        *{"checkpoint", "data", "epoch", "guard", "interrupts", "metrics", "plain_files", "resume", "state", "steps"},
        *{"warn"},
    },
    "trainer": {
        *{"arrays", "callbacks", "checkpoint", "checks", "data", "epoch", "fit", "guard", "metrics", "plain_files"},
        *{"plausible", "resume", "state", "warn"},
    },
    "datasets": {"arrays", "paths"},
    "folder": {"callbacks", "report", "datasets"},
    "recipe": {"trainer", "datasets", "checks", "paths"},
    "continued": {"checkpoint", "datasets", "folder", "recipe", "warn"},
    "running": {
        *{"callbacks", "checkpoint", "checks", "continued", "datasets", "folder", "lock", "recipe", "report", "state"},
        "warn",
    },
    "command": {"checkpoint", "datasets", "lock", "plain_files", "recipe", "running"},
    "testing": {"checks", "checkpoint", "paths", "recipe", "tree"},
    "tree": {"safetensors"},
    "__main__": {"command"},
    "_quiet": set(),
}


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
    found = {path.stem: imported(path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    assert set(found) == set(ALLOWED)
    for name, modules in found.items():
        assert modules <= ALLOWED[name], name


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
