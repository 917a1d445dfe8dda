"""`python -m looplab my_package.my_recipe:build --epochs 3` runs the recipe function `build`."""

import importlib
import shlex
import sys

from looplab.cli.command import main


def _run() -> None:
    usage = "usage: python -m looplab MODULE:FUNCTION [--help] [--flag VALUE ...]"
    if len(sys.argv) < 2 or sys.argv[1].startswith(("-", ":", ".")):
        sys.exit(usage)
    module, _, function = sys.argv[1].partition(":")
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # an import of the module's own failed
        sys.exit(f"python -m looplab: {sys.argv[1]} names no recipe function: {error}\n{usage}")
    try:
        recipe = getattr(imported, function or module.rpartition(".")[2])
    except AttributeError as error:
        sys.exit(f"python -m looplab: {sys.argv[1]} names no recipe function: {error}\n{usage}")
    if not callable(recipe):
        sys.exit(f"python -m looplab: {sys.argv[1]} is {type(recipe).__name__}, not a recipe function\n{usage}")
    main(recipe, sys.argv[2:], prog=f"python -m looplab {shlex.quote(sys.argv[1])}")


_run()
