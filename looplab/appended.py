"""The files that callbacks append to, such as `CSVLogger`'s: a resumed run cuts off what it writes again."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from looplab.state import by_key


def sizes(callbacks: Iterable[keras.callbacks.Callback]) -> dict[str, int]:
    """The length in bytes of each file that a callback holds open for writing, by callback and attribute."""
    found = {}
    for name, file in _open_files(callbacks):
        file.flush()
        found[name] = os.fstat(file.fileno()).st_size
    return found


def rewind(callbacks: Iterable[keras.callbacks.Callback], saved: dict[str, int]) -> None:
    """Cuts each file to the length that it had."""
    for name, file in _open_files(callbacks):
        if name in saved and os.fstat(file.fileno()).st_size > saved[name]:
            file.truncate(saved[name])
            file.seek(0, os.SEEK_END)


def keep_on_begin(callbacks: Iterable[keras.callbacks.Callback]) -> None:
    """Lets `CSVLogger`s continue their files, which would otherwise start empty."""
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.CSVLogger):
            callback.append = True


def _open_files(callbacks: Iterable[keras.callbacks.Callback]) -> Iterator[tuple[str, Any]]:
    for key, callback in by_key(callbacks).items():
        for name, value in vars(callback).items():
            if isinstance(value, io.IOBase) and not value.closed and value.writable() and value.seekable():
                yield f"{key}.{name}", value
