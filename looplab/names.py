"""The names of a trainer: a subclass may use all but those that looplab needs."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from looplab.walk import OURS, is_users

_HOOKS = {"train_step", "test_step", "predict_step", "compute_loss", "compute_metrics", "reset_metrics"}


def check_assignment(owner: Any, name: str) -> None:
    """Checks that an attribute of a trainer may be assigned.

    Raises:
        AttributeError: The name is looplab's.
    """
    if (name == OURS and name in vars(owner)) or name in _taken(type(owner)):
        raise AttributeError(_is_taken(type(owner), name))


def check_subclass(kind: type) -> None:
    """Checks that a subclass overrides methods with methods, and properties with properties.

    Raises:
        TypeError: It does not, or is a Keras layer, too.
    """
    if issubclass(kind, keras.Layer):
        raise TypeError(
            f"`{kind.__name__}` is a trainer and a Keras layer: subclass one of them. A trainer holds models as "
            f"attributes, and `looplab.Trainer(model)` uses the `train_step` of a `keras.Model`."
        )
    taken = _taken(kind.__base__ or object)
    for name in taken.keys() & vars(kind).keys():
        own = vars(kind)[name]
        if not (isinstance(own, property) if isinstance(taken[name], property) else callable(own)):
            raise TypeError(_is_taken(kind, name))


def _is_taken(kind: type, name: str) -> str:
    return f"`{name}` of `{kind.__name__}` belongs to looplab. Store the value under another name."


def _taken(kind: type) -> dict[str, Any]:
    """The public methods and read-only properties of looplab's classes, except the hooks that users replace."""
    ours = [base for base in kind.__mro__ if base is not object and not is_users(base)]
    members = {name: value for base in reversed(ours) for name, value in vars(base).items()}
    return {
        name: value
        for name, value in members.items()
        if not name.startswith("_")
        and name not in _HOOKS
        and (inspect.isfunction(value) or (isinstance(value, property) and value.fset is None))
    }
