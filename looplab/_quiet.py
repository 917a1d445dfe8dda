"""Imports TensorFlow without its start-up lines, if looplab is the program: `python -m looplab…`.

A library has no business with another program's log; so nothing happens where looplab is merely imported, nor where
TF_CPP_MIN_LOG_LEVEL is set. The lines are written by C++ before any level can be set, straight to file descriptor 2.
"""

import itertools
import os
import sys


def _is_program() -> bool:
    return any(flag == "-m" and name.split(".")[0] == "looplab" for flag, name in itertools.pairwise(sys.orig_argv))


if _is_program() and "TF_CPP_MIN_LOG_LEVEL" not in os.environ:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import tensorflow  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
