"""What looplab says: printed lines, and warnings that point at the user's own line."""

import contextlib
import sys
import warnings
from pathlib import Path
from typing import TextIO

import keras
import tensorflow as tf

_LIBRARIES = tuple(str(Path(file).parent) + "/" for file in (__file__, keras.__file__, tf.__file__))
_WITHIN = (*_LIBRARIES, contextlib.__file__)


def say(text: str, file: TextIO | None = None) -> None:
    """Prints text and a line end to `file`, by default standard output, at once and in one piece.

    Training does not depend on it: characters that the file cannot encode are escaped, and a text that cannot be
    written (its reader is gone, or the disk is full) is dropped.
    """
    file = file or sys.stdout
    if file is not None:  # None: a process without a console
        with contextlib.suppress(OSError):
            try:
                file.write(f"{text}\n")
            except UnicodeEncodeError as error:
                file.write(f"{text}\n".encode(error.encoding, "backslashreplace").decode(error.encoding))
            file.flush()


def warn(text: str) -> None:
    """Warns, as of the innermost line that called looplab, Keras or TensorFlow."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_within(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def _is_within(file: str) -> bool:
    """Whether a file is of these libraries, or made by TensorFlow of a function that it traces."""
    return file.startswith(_WITHIN) or Path(file).name.startswith("__autograph_generated_file")
