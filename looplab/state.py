"""What a checkpoint holds of a trainer and its callbacks, and how it is brought back."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab.plain_files import CheckpointError, damaged
from looplab.tracking import path_of, to_numpy
from looplab.tree import flatten, plain
from looplab.warn import warn

_KERAS_OWN = ("params", "_model")  # a list of callbacks sets them
_CHOSEN = "$monitor_op"  # that a callback had chosen it, which is a function
_COUNTS = (
    *("steps", "epochs", "test_steps", "skipped_steps", "fit", "fits_bytes", "epochs_asked", "epoch", "batch"),
    "in_a_row",
)
_DICTS = ("means", "logs", "data", "made_with", "callback_settings", "events", "appended", "callbacks", "variables")
_KINDS = {
    **dict.fromkeys((*_COUNTS, "seed"), int),
    **dict.fromkeys(("in_epoch", "ended"), bool),
    **dict.fromkeys(_DICTS, dict),
    **{"begun": list, "stopped_by": str},
}


def values(variables: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The values of variables, copied, and their names, for errors."""
    return {path: {"name": path_of(variable), "value": to_numpy(variable)} for path, variable in variables.items()}


def settings(value: Any) -> dict[str, str]:
    """What a loss or an optimizer is and was made with, in words that are the same in another process."""
    if not hasattr(value, "get_config"):
        return {"class": _in_words(value)}
    return {"class": type(value).__name__} | {k: _in_words(v) for k, v in config_of(value).items() if k != "name"}


def config_of(value: Any) -> dict[str, Any]:
    """What a Keras object was made with; nothing where it cannot tell, such as a schedule of a user's own."""
    try:
        with warnings.catch_warnings(action="ignore"):  # Keras's, of what could not be made from it again
            return value.get_config()
    except Exception:  # of the user's own code, which Keras would not have called
        return {}


def _in_words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):  # without names, which Keras counts through a process
        return ", ".join(f"{key}: {_in_words(inner)}" for key, inner in value.items() if key != "name")
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_in_words, value))
    if hasattr(value, "get_config"):
        return _in_words(settings(value))
    return str(value) if plain(value) else getattr(value, "__name__", type(value).__name__)


def check_structure(path: Path, tree: dict[str, Any]) -> None:
    """The state of a checkpoint, without its arrays, has what a state of ours has.

    Raises:
        CheckpointError: It has not.
    """
    for name, kind in _KINDS.items():
        value = tree.get(name)
        if type(value) is not kind or (isinstance(value, int) and name != "seed" and not 0 <= value < 2**53):
            raise damaged(path, f"its state has {name} {str(value)[:40]}")
    variables, means, callbacks = tree["variables"].values(), tree["means"], tree["callbacks"].values()
    sums = means["sums"].values() if _has(means, {"sums": dict, "weight": float}) else [None]
    for is_right, name in [
        (all(_has(v, {"name": str, "value": dict}) and "$array" in v["value"] for v in variables), "variables"),
        (all(type(v) is float for v in sums), "means"),
        (all(type(v) is float for v in tree["logs"].values()), "logs"),
        (tree["epoch"] <= tree["epochs"], "epoch"),
        (all(type(v) is int and v >= 0 for v in tree["events"].values()), "events"),
        (all(type(v) is int and v >= 0 for v in tree["appended"].values()), "appended"),
        (all(type(v) is dict for v in tree["callback_settings"].values()), "callback_settings"),
        (all(type(v) is dict for v in callbacks), "callbacks"),
        (all(type(v) is dict for v in tree["made_with"].values()), "made_with"),
        ([type(v) for v in tree["begun"]] == [int, int] and min(tree["begun"]) >= 0, "begun"),
        (isinstance(tree.get("monitored"), (float, type(None))), "monitored"),
    ]:
        if not is_right:
            raise damaged(path, f"its state has malformed {name}")


def _has(part: Any, kinds: dict[str, type]) -> bool:
    return type(part) is dict and all(type(part.get(name)) is kind for name, kind in kinds.items())


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
            where = "`metrics`" if path.startswith("_compiled") else path
            raise CheckpointError(
                f"checkpoint {checkpoint} is of another architecture: at {where} it has {there}, and this trainer has "
                f"{here}. Make the trainer as it was; to start afresh from its weights alone, use `load_weights`."
            )


def assign(variables: dict[str, Any], saved: dict[str, dict[str, Any]]) -> None:
    """Assigns what `values` told of the same variables."""
    for path, variable in variables.items():
        variable.assign(saved[path]["value"])


def assign_known(variables: dict[str, Any], saved: dict[str, dict[str, Any]]) -> None:
    """Assigns what there is for those of the same path, shape and dtype: others are of a later `fit`."""
    for path, variable in variables.items():
        value = saved.get(path, {}).get("value")
        if value is not None and _signature(variable).endswith(f", {value.shape} {value.dtype.name}"):
            variable.assign(value)


def callback_settings(callbacks: Iterable[keras.callbacks.Callback]) -> dict[str, dict[str, str]]:
    """What each callback was made with, as far as it keeps that under the names of its arguments, in words."""
    return {
        key: {n: _in_words(v) for n, v in vars(callback).items() if n in _arguments(callback) and plain(v)}
        for key, callback in by_key(callbacks).items()
    }


def _arguments(thing: Any) -> set[str]:
    """The names of the arguments of an object's `__init__`, those of its base classes too."""
    makers = (vars(kind)["__init__"] for kind in type(thing).__mro__ if "__init__" in vars(kind))
    return {name for maker in makers for name in inspect.signature(maker).parameters}


def attributes(callbacks: Iterable[keras.callbacks.Callback]) -> dict[str, dict[str, Any]]:
    """The attributes of each callback that are plain (numbers, strings, arrays, lists and dicts of such), copied.

    An attribute may also be a dict of a subclass, such as a `collections.Counter`: its items are saved, and fill the
    one that is there when it goes on. So the callback must have made it by the end of its `on_train_begin`. Where
    such a dict is within another dict, a list or a tuple, the whole attribute is not saved.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, callback in by_key(callbacks).items():
        items = [(name, _as_dict(value)) for name, value in vars(callback).items() if name not in _KERAS_OWN]
        found[key] = {name: _copied(value) for name, value in items if plain(value)}
        if callable(getattr(callback, "monitor_op", None)):
            found[key][_CHOSEN] = True
    return found


def changed(now: dict[str, dict[str, Any]], *before: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those attributes that are other than they were at one of these times: what a program passes is not saved."""
    return {
        key: {
            name: value
            for name, value in mine.items()
            if any(_differs(value, then.get(key, {}).get(name, ...)) for then in before)
        }
        for key, mine in now.items()
    }


def restore_callbacks(
    callbacks: Iterable[keras.callbacks.Callback], states: dict[str, dict[str, Any]], checkpoint: Path
) -> None:
    """Sets the attributes that were saved, and warns of callbacks that are not the same, and of what is not set.

    No method is replaced, and no text that the callback was made with, such as the name of a file.
    """
    known = by_key(callbacks)
    for keys, text in (
        (
            {key for key, kept in states.items() if kept} - known.keys(),
            "has the state of {}, which was not passed: it is left out",
        ),
        (known.keys() - states.keys(), "has no state of {}: it begins afresh"),
    ):
        if keys:
            warn(f"Checkpoint {checkpoint} {text.format(', '.join(sorted(keys)))}.")
    for key, callback in known.items():
        if key not in states:
            continue
        if states[key].pop(_CHOSEN, False) and getattr(callback, "monitor_op", ...) is None:
            callback._set_monitor_op()  # Keras's callbacks choose it late, and turn round another attribute then
        _set_attributes(key, callback, states[key], checkpoint)


def _set_attributes(key: str, callback: keras.callbacks.Callback, saved: dict[str, Any], checkpoint: Path) -> None:
    """Sets the attributes of one callback, and warns of text that stays as the callback was made with it."""
    arguments = _arguments(callback)
    for name, value in saved.items():
        now = vars(callback).get(name)
        if name in _KERAS_OWN or callable(getattr(type(callback), name, None)) or not plain(value):
            continue
        if isinstance(value, str) and name in arguments:  # it may name a file, and files are not to say where to write
            if _differs(value, now):
                warn(
                    f"Checkpoint {checkpoint} has {value[:200]!r} as `{name}` of {key}, which stays {now!r}: text that "
                    f"is an argument of a callback's `__init__` too, such as the name of a file, does not come from a "
                    f"checkpoint. Keep text that changes in an attribute of another name than the argument."
                )
        elif isinstance(value, dict) and isinstance(now, dict) and type(now) is not dict:
            now.clear()  # filled anew, a Counter or defaultdict stays what it is
            now.update(value)
        else:
            setattr(callback, name, value)


def by_key(callbacks: Iterable[keras.callbacks.Callback]) -> dict[str, keras.callbacks.Callback]:
    """Callbacks by class, the second of one with `_2` (or what is free); without ours that only show something."""
    found: dict[str, keras.callbacks.Callback] = {}
    for callback in callbacks:
        if not getattr(callback, "stateless", False):
            name = type(callback).__name__
            keys = (name if count == 1 else f"{name}_{count}" for count in itertools.count(1))
            found[next(key for key in keys if key not in found)] = callback
    return found


def _signature(variable: Any) -> str:
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return f"{path_of(variable)}, {tuple(variable.shape)} {dtype}"


def _differs(one: Any, other: Any) -> bool:
    """Whether two plain values differ; NaN is itself."""
    if other is ... or type(one) is not type(other):
        return True
    trees = flatten(one), flatten(other)
    if repr(trees[0][0]) != repr(trees[1][0]):
        return True
    pairs = zip(trees[0][1].values(), trees[1][1].values(), strict=True)
    return any(a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes() for a, b in pairs)


def _as_dict(value: Any) -> Any:
    """A dict of a subclass as a plain one, and all else as it is."""
    return dict(value) if isinstance(value, dict) else value


def _copied(value: Any) -> Any:
    """A copy that later changes do not reach."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    return np.array(value) if isinstance(value, np.ndarray) else value
