"""What an object holds through its attributes: models, optimizers, metrics and variables, each by its path."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from looplab.compat import all_layers, learning_rate

OURS = "_looplab"
"""The attribute of a trainer that holds everything of looplab's; it is not searched."""
VARIABLES = (keras.Variable, tf.Variable)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.ndarray, np.generic, tf.Tensor, types.ModuleType, type)
_LIBRARIES = ("tensorflow", "keras", "numpy", "tensorboard", "tqdm")
_MOST = 10_000  # members of a container that is searched: a longer one is data
_MANY = 100  # members of a container that a glance does not look through
_LEAVES = (keras.Layer, keras.Optimizer, keras.Metric, keras.random.SeedGenerator, *VARIABLES)


class Held(NamedTuple):
    """A stateful object that another object holds."""

    path: str
    """The attributes, and positions in lists, that lead to it, joined by "/"."""
    thing: Any
    """A Keras layer, optimizer, metric, variable or seed generator, or a `tf.Variable`."""
    trainable: bool
    """For a variable: whether gradients may change it, and no layer that holds it is frozen."""
    is_bare: bool = False
    """For a `tf.Variable`: whether it is an attribute of the trainer or a Keras layer, which Keras would not train."""


def methods_of(owner: Any) -> dict[str, Any]:
    """The functions that the classes of a user's object define, by name."""
    methods: dict[str, Any] = {}
    for kind in type(owner).__mro__:
        if not _is_library(kind):
            functions = {name: getattr(value, "python_function", value) for name, value in vars(kind).items()}
            methods = {name: value for name, value in functions.items() if inspect.isfunction(value)} | methods
    return methods


def overrides(owner: Any, name: str) -> bool:
    """Whether a user's class, or the object itself, replaces a method."""
    return name in vars(owner) or name in methods_of(owner)


def walk(attributes: dict[str, Any]) -> Iterator[Held]:
    """Each stateful object below `attributes`, once, in the order of the attributes.

    Searches lists, tuples, dicts, `tf.Module`s, objects of users' classes, and functions (what they close over, and the
    globals that they use). A Keras layer or model counts as one object, because Keras knows what is inside; but the
    `tf.Variable`s and optimizers among the attributes of a layer, which Keras does not track, are found next to it.
    """
    seen: set[int] = set()  # also the variables that Keras knows

    def visit(path: str, value: Any, is_own: bool, layer: keras.Layer | None = None) -> Iterator[Held]:
        if id(value) in seen or (layer is not None and not _may_be_untracked(value)):
            return
        is_variable, is_container = isinstance(value, VARIABLES), isinstance(value, (dict, list, tuple))
        seen.add(id(value))
        if isinstance(value, _LEAVES):
            is_trainable = is_variable and _is_trainable(value) and (layer is None or layer.trainable)
            is_bare = is_own and is_variable and (layer is not None or not isinstance(value, keras.Variable))
            yield Held(path, value, is_trainable, is_bare)
            if isinstance(value, keras.Layer):
                seen.update(map(id, value.variables))
                for index, inner in enumerate(all_layers(value)):
                    for name, attribute in vars(inner).items():
                        if _may_be_untracked(attribute) and not name.startswith("_self_"):
                            inside = f"{path}/{index}" if index else path
                            yield from visit(f"{inside}/{name}", attribute, True, inner)
            return
        for name, inner in _members(value):
            yield from visit(f"{path}/{name}", inner, is_own and is_container, layer)

    for name, value in attributes.items():
        yield from visit(name, value, True)


def marks(attributes: dict[str, Any]) -> list[Any]:
    """What `walk` would find with these attributes, and what a step's trace depends on, in a fraction of the time.

    If each of the marks is the same object as before, so is everything that `walk` yields, unless a private attribute
    of a layer has another variable or optimizer, or a long container another member. A number, string, array or short
    container is no mark: an agent's memory may change in each step.
    """
    found: list[Any] = []
    pending, seen = [*attributes.values()], set()
    for value in pending:  # which grows
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        is_container = isinstance(value, (dict, list, tuple))
        if is_container and len(value) >= _MANY:
            continue
        found += [] if is_container else [value]
        if isinstance(value, keras.Layer):
            for layer in all_layers(value):
                found += [layer, layer.trainable]
                if is_users(type(layer)):
                    own = [inner for name, inner in vars(layer).items() if name[0] != "_"]
                    pending += [inner for inner in own if isinstance(inner, (*VARIABLES, keras.Optimizer, list, dict))]
        elif isinstance(value, keras.Optimizer):
            found.append(learning_rate(value))
        elif isinstance(value, VARIABLES):
            found.append(value.trainable)
        elif not isinstance(value, _LEAVES):
            pending += [inner for _, inner in _members(value)]
    return found


def _may_be_untracked(attribute: Any) -> bool:
    """Whether an attribute of a Keras layer may be or hold what Keras does not track; most are of few other classes."""
    return _is_untracked(type(attribute))  # type: ignore[arg-type]


@functools.cache
def _is_untracked(kind: type) -> bool:
    return issubclass(kind, (dict, list, tuple, keras.Optimizer, *VARIABLES))


def _is_trainable(variable: Any) -> bool:
    """Whether gradients may change it: they do not exist for whole numbers, such as counters."""
    dtype = tf.as_dtype(variable.dtype)
    return bool(variable.trainable) and (dtype.is_floating or dtype.is_complex)


def _members(value: Any) -> list[tuple[str, Any]]:
    """What a container, module, function or object holds, by name, except what can hold nothing."""
    if isinstance(value, (dict, list, tuple)) and len(value) > _MOST:
        return []
    if isinstance(value, dict):
        members = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, (list, tuple)):
        members = [(str(index), inner) for index, inner in enumerate(value)]
    elif isinstance(value, tf.Module):
        members = [(name, inner) for name, inner in vars(value).items() if not name.startswith("_tf_")]
    elif isinstance(value, functools.partial):
        members = [("function", value.func), *_members(value.args), *_members(value.keywords)]
    elif isinstance(value, tf.types.experimental.PolymorphicFunction):
        members = [("function", value.python_function)]
    elif inspect.ismethod(value):
        members = [*_attributes(value.__self__), ("function", value.__func__)]
    elif inspect.isfunction(value):
        members = [] if _is_library(value) else _used(value)
    else:
        members = _attributes(value)
    return [(name, inner) for name, inner in members if not isinstance(inner, _PLAIN)]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """The attributes of an object of a user's class."""
    is_searched = hasattr(value, "__dict__") and is_users(type(value)) and not isinstance(value, type)
    return list(vars(value).items()) if is_searched and OURS not in vars(value) else []


def _used(function: Any) -> list[tuple[str, Any]]:
    """What a function closes over, and the globals that it uses."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closed = []
    for name, cell in cells:
        with contextlib.suppress(ValueError):  # it is still empty
            closed.append((name, cell.cell_contents))
    used = [(n, function.__globals__[n]) for n in _global_names(function.__code__) if n in function.__globals__]
    return closed + used


@functools.cache
def _global_names(code: types.CodeType) -> list[str]:
    """From the instructions, because `co_names` also has the names of attributes; includes inner functions."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return sorted(names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))))


def is_users(kind: type) -> bool:
    """Whether objects of a class may hold models, metrics or variables of the user."""
    return kind is types.SimpleNamespace or not _is_library(kind)


def _is_library(value: Any) -> bool:
    """Whether a function or class belongs to a library that holds no model of the user."""
    module = getattr(value, "__module__", None) or ""
    root, _, inner = module.partition(".")
    is_ours = root == "looplab" and not inner.startswith("recipes")
    return root in sys.stdlib_module_names or root in _LIBRARIES or is_ours
