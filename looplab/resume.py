"""What a checkpoint holds of a trainer and its callbacks, and how it is brought back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab.checkpoint import CheckpointError, plain
from looplab.tracking import path_of, to_numpy

_KERAS_OWN = ("params", "_model")  # a list of callbacks sets them


def values(variables: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The values of variables, copied, and their names, for errors."""
    return {path: {"name": path_of(variable), "value": to_numpy(variable)} for path, variable in variables.items()}


def most_bytes(variables: dict[str, Any]) -> int:
    """What a checkpoint of them may have at most: callbacks may hold copies of weights, and arrays of their own."""
    return 16 * sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables.values()) + 2**28


def check(variables: dict[str, Any], saved: dict[str, dict[str, Any]], checkpoint: Path) -> None:
    """What `values` told is of the same variables.

    Raises:
        CheckpointError: It is not.
    """
    mine = {path: _signature(v) for path, v in variables.items()}
    other = {path: f"{v['name']}, {v['value'].shape} {v['value'].dtype.name}" for path, v in saved.items()}
    for path in [*mine, *other]:
        here, there = mine.get(path, "nothing"), other.get(path, "nothing")
        # Names are for people: Keras counts them through a process.
        if here.rpartition(", ")[2] != there.rpartition(", ")[2] or "nothing" in (here, there):
            raise CheckpointError(
                f"checkpoint {checkpoint} is of another architecture: at {path} it has {there}, and this trainer has "
                f"{here}. Make the trainer as it was; to start afresh from its weights alone, use `load_weights`."
            )


def assign(variables: dict[str, Any], saved: dict[str, dict[str, Any]]) -> None:
    """Assigns what `values` told of the same variables."""
    for path, variable in variables.items():
        variable.assign(saved[path]["value"])


def callback_states(callbacks: Iterable[keras.callbacks.Callback]) -> dict[str, dict[str, Any]]:
    """The attributes of each callback that are plain: numbers, strings, arrays, and lists and dicts of such."""
    return {
        key: {name: _copied(value) for name, value in vars(callback).items() if name not in _KERAS_OWN and plain(value)}
        for key, callback in _by_key(callbacks).items()
    }


def restore_callbacks(
    callbacks: Iterable[keras.callbacks.Callback], states: dict[str, dict[str, Any]], checkpoint: Path
) -> None:
    """Sets the attributes that `callback_states` told, and warns of callbacks that are not the same."""
    known = _by_key(callbacks)
    for keys, text in (
        (states.keys() - known.keys(), "has the state of {}, which was not passed: it is left out"),
        (known.keys() - states.keys(), "has no state of {}: it begins afresh"),
    ):
        if keys:
            warnings.warn(f"Checkpoint {checkpoint} {text.format(', '.join(sorted(keys)))}.", stacklevel=4)
    for key, callback in known.items():
        if key not in states:
            continue
        if getattr(callback, "monitor_op", ...) is None and "monitor_op" not in states[key]:
            callback._set_monitor_op()  # Keras's callbacks choose it late, and turn round another attribute then
        lost = [name for name, value in vars(callback).items() if plain(value) and name not in states[key]]
        if lost := sorted(set(lost) - set(_KERAS_OWN)):
            warnings.warn(
                f"Checkpoint {checkpoint} could not hold {', '.join(lost)} of {key}, which begins afresh. State that "
                f"is to be saved must be numbers, strings, arrays, and lists and dicts of such.",
                stacklevel=4,
            )
        vars(callback).update(states[key])


def _by_key(callbacks: Iterable[keras.callbacks.Callback]) -> dict[str, keras.callbacks.Callback]:
    """Callbacks by class, the second of one with `_2`; without ours that only show something."""
    found: dict[str, keras.callbacks.Callback] = {}
    for callback in callbacks:
        if not getattr(callback, "stateless", False):
            name = type(callback).__name__
            count = 1 + sum(key.partition("_")[0] == name for key in found)
            found[name if count == 1 else f"{name}_{count}"] = callback
    return found


def _signature(variable: Any) -> str:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return f"{path_of(variable)}, {tuple(variable.shape)} {dtype}"


def _copied(value: Any) -> Any:
    """A copy that later changes do not reach."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    return np.array(value) if isinstance(value, np.ndarray) else value
