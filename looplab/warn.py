"""Warnings that point at the user's own line, and lines that are printed."""

import sys
import warnings
from pathlib import Path
from typing import TextIO

import keras
import tensorflow as tf

_WITHIN = tuple(str(Path(file).parent) + "/" for file in (__file__, keras.__file__, tf.__file__))


def warn(text: str) -> None:
    """Warns, as of the innermost line that called looplab, Keras or TensorFlow."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_within(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def say(text: str, file: TextIO | None = None) -> None:
    """Prints a line of looplab's own, by default to standard output."""
    file = file or sys.stdout
    encoding = file.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)


def _is_within(file: str) -> bool:
    """Whether a file is of these libraries, or made by TensorFlow of a function that it traces."""
    return file.startswith(_WITHIN) or Path(file).name.startswith("__autograph_generated_file")
