"""Printed lines, and warnings that point at the user's own line."""

import contextlib
import inspect
import sys
import warnings
from pathlib import Path
from typing import TextIO

import keras
import tensorflow as tf

_LIBRARIES = (str(Path(file).parent) + "/" for file in (__file__, keras.__file__, tf.__file__))
_INSIDE = (*_LIBRARIES, contextlib.__file__)
_is_quiet = False


def be_quiet() -> None:
    """From now on, prints and warns nothing in this process, but for lines to a `file`: another worker does."""
    global _is_quiet
    _is_quiet = True


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line to `file`, by default standard output; it never raises an error.

    Characters that the file cannot encode are escaped. A line that cannot be written, because its reader is gone or the
    disk is full, is dropped.
    """
    file = file or (None if _is_quiet else sys.stdout)
    if file is not None:  # a process may have no console
        with contextlib.suppress(OSError):
            try:
                file.write(f"{text}\n")
            except UnicodeEncodeError as error:
                file.write(f"{text}\n".encode(error.encoding, "backslashreplace").decode(error.encoding))
            file.flush()


def warn(text: str) -> None:
    """Warns at the innermost line that called looplab, Keras or TensorFlow."""
    if _is_quiet:
        return
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def _is_inside(file: str) -> bool:
    """Whether a file belongs to these libraries, or AutoGraph has generated it."""
    return file.startswith(_INSIDE) or Path(file).name.startswith("__autograph_generated_file")


class Warnings:
    """Collects warnings while a step is traced, and gives each of them once."""

    def __init__(self) -> None:
        self._new: list[str] = []
        self._seen: set[str] = set()

    def add(self, text: str) -> None:
        """Adds a warning, unless it has been added before."""
        if text not in self._seen:
            self._seen.add(text)
            self._new.append(text)

    def give(self) -> None:
        """Gives the warnings that are new."""
        while self._new:
            warn(self._new.pop(0))
