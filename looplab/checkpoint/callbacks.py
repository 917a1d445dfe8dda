"""The state of callbacks: their attributes, their settings, and the files that they append to."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import keras

from looplab.checkpoint.tree import is_plain, same
from looplab.compat import CALLBACK_OWN
from looplab.warn import warn

Callbacks = Iterable[keras.callbacks.Callback]
Attributes = dict[str, dict[str, Any]]
"""By callback and name."""


def by_key(callbacks: Callbacks) -> dict[str, keras.callbacks.Callback]:
    """Callbacks by class name, the second of a class with `_2`; without looplab's own, which have no state."""
    found: dict[str, keras.callbacks.Callback] = {}
    for callback in callbacks:
        if not getattr(callback, "stateless", False):
            name = type(callback).__name__
            names = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(2)))
            found[next(key for key in names if key not in found)] = callback
    return found


def attributes(callbacks: Callbacks) -> Attributes:
    """Copies of all attributes that a checkpoint can hold (see `tree.is_plain`).

    Of an attribute that is a subclass of dict, such as a `collections.Counter`, the items are saved. A resumed run
    puts them into the one that the callback has created by the end of its `on_train_begin`.
    """
    found: Attributes = {}
    for key, callback in by_key(callbacks).items():
        # Keras chooses `monitor_op` in the first epoch of each process, and changes the sign of `min_delta` with it.
        own = (*CALLBACK_OWN, "min_delta") if hasattr(callback, "monitor_op") else CALLBACK_OWN
        values = {n: dict(v) if isinstance(v, dict) else v for n, v in vars(callback).items() if n not in own}
        found[key] = {name: copy.deepcopy(value) for name, value in values.items() if is_plain(value)}
    return found


def changed(now: Attributes, *before: Attributes) -> Attributes:
    """The attributes that differ from any of the earlier ones: those that a program sets itself are not saved."""

    def is_as_before(key: str, name: str, value: Any) -> bool:
        return all(name in then.get(key, {}) and same(value, then[key][name]) for then in before)

    return {key: {n: v for n, v in values.items() if not is_as_before(key, n, v)} for key, values in now.items()}


def restore(callbacks: Callbacks, saved: Attributes, checkpoint: Path) -> None:
    """Sets the saved attributes; warns if the callbacks differ from those saved, and of text that is not restored."""
    known = by_key(callbacks)
    if gone := sorted({key for key, values in saved.items() if values} - known.keys()):
        warn(f"Checkpoint {checkpoint} has the state of {', '.join(gone)}, which was not passed: it is ignored.")
    if new := sorted(known.keys() - saved.keys()):
        warn(f"Checkpoint {checkpoint} has no state of {', '.join(new)}: it starts afresh.")
    for key, callback in known.items():
        for name, value in saved.get(key, {}).items():
            now = vars(callback).get(name)
            if name in CALLBACK_OWN or callable(getattr(type(callback), name, None)):
                continue
            if isinstance(value, str) and name in _arguments(callback):  # it may be the name of a file to write to
                if repr(value) != repr(now):
                    warn(
                        f"Checkpoint {checkpoint} has {value[:200]!r} as `{name}` of {key}, which stays {now!r}: text "
                        f"that is also an argument of a callback's `__init__`, such as the name of a file, is not "
                        f"restored. Keep text that changes in an attribute with another name."
                    )
            elif isinstance(value, dict) and isinstance(now, dict) and type(now) is not dict:
                now.clear()  # filled again, a Counter or defaultdict keeps its class
                now.update(value)
            else:
                setattr(callback, name, value)


def settings(callbacks: Callbacks) -> dict[str, dict[str, str]]:
    """The arguments that each callback was created with, in words, if it keeps them under their names."""
    found = {}
    for key, callback in by_key(callbacks).items():
        values = {n: v for n, v in vars(callback).items() if n in _arguments(callback) and is_plain(v)}
        if hasattr(callback, "monitor_op") and "min_delta" in values:
            values["min_delta"] = abs(values["min_delta"])  # Keras changes its sign: see `attributes`
        found[key] = {name: in_words(value) for name, value in values.items()}
    return found


def _arguments(callback: keras.callbacks.Callback) -> set[str]:
    """The names of the arguments of `__init__`, also of its base classes."""
    makers = (vars(kind)["__init__"] for kind in type(callback).__mro__ if "__init__" in vars(kind))
    return {name for maker in makers for name in inspect.signature(maker).parameters}


def config_of(value: Any) -> dict[str, Any]:
    """The configuration of a Keras object; {} if it has none."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return value.get_config()
    except Exception:  # raised by user code, which Keras would not have called
        return {}


def settings_of(value: Any) -> dict[str, str]:
    """The class and the configuration of a loss or an optimizer, in words that are the same in another process."""
    if not hasattr(value, "get_config"):
        return {"class": in_words(value)}
    return {"class": type(value).__name__} | {k: in_words(v) for k, v in config_of(value).items() if k != "name"}


def in_words(value: Any) -> str:
    """A setting as text, without names, which Keras numbers in a process."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value))
    if hasattr(value, "get_config"):
        value = settings_of(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {in_words(inner)}" for key, inner in value.items() if key != "name")
    return str(value) if is_plain(value) else getattr(value, "__name__", type(value).__name__)


def appended(callbacks: Callbacks) -> dict[str, int]:
    """The length in bytes of each file that a callback holds open for writing, by callback and attribute."""
    found = {}
    for name, file in _open_files(callbacks):
        file.flush()
        found[name] = os.fstat(file.fileno()).st_size
    return found


def rewind(callbacks: Callbacks, saved: dict[str, int]) -> None:
    """Truncates the files that callbacks append to, to these lengths."""
    for name, file in _open_files(callbacks):
        if name in saved and os.fstat(file.fileno()).st_size > saved[name]:
            file.truncate(saved[name])
            file.seek(0, os.SEEK_END)


def _open_files(callbacks: Callbacks) -> Iterator[tuple[str, Any]]:
    for key, callback in by_key(callbacks).items():
        for name, value in vars(callback).items():
            if isinstance(value, io.IOBase) and not value.closed and value.writable() and value.seekable():
                yield f"{key}.{name}", value
