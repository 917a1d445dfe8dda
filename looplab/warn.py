"""Warnings that point at the user's own line."""

import sys
import warnings
from pathlib import Path

import keras
import tensorflow as tf

_WITHIN = tuple(str(Path(file).parent) + "/" for file in (__file__, keras.__file__, tf.__file__))


def warn(text: str) -> None:
    """Warns, as of the innermost line that called looplab, Keras or TensorFlow."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_within(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def _is_within(file: str) -> bool:
    """Whether a file is of these libraries, or made by TensorFlow of a function that it traces."""
    return file.startswith(_WITHIN) or Path(file).name.startswith("__autograph_generated_file")
