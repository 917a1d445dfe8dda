"""What the process that children are forked from does once: the imports, and AutoGraph's translations.

It runs no operation of TensorFlow, which would start threads that a fork does not take along.
"""

import contextlib
import importlib
import pkgutil
import types

import pytest  # noqa: F401
import runs  # noqa: F401

import looplab

TRACED = [
    module.name
    for part in ("loop", "data")
    for module in pkgutil.iter_modules([f"{looplab.__path__[0]}/{part}"], f"looplab.{part}.")
]


def _translate() -> None:
    """AutoGraph keeps each function's translation by its code; else each child takes two seconds for them.

    These are inner parts of TensorFlow: where they have changed, children start slower, and that is all.
    """
    from tensorflow.python.autograph.core import converter
    from tensorflow.python.autograph.impl import api

    context = converter.ProgramContext(converter.ConversionOptions(recursive=True, optional_features=()).call_options())
    for module in [importlib.import_module(name) for name in ("looplab.steps", *TRACED)]:
        for function in _functions(module):
            with contextlib.suppress(Exception):  # some it cannot translate, and leaves as they are
                api._TRANSPILER.transform(function, context)


def _functions(module):
    """All functions of a module, methods among them."""
    for thing in vars(module).values():
        for function in vars(thing).values() if isinstance(thing, type) else [thing]:
            if isinstance(function, property):
                function = function.fget
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                yield function


with contextlib.suppress(ImportError, AttributeError, TypeError):
    _translate()
