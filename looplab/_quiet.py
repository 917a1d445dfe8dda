"""Imports TensorFlow without its start-up lines, if looplab is the program: `python -m looplab…`.

A library has no business with another program's log. So nothing happens where looplab is merely imported, and a script
that calls `looplab.main` shows what TensorFlow logs. TensorFlow writes some lines before it knows its level, straight
to file descriptor 2. A level that the user has set is replaced, because every other level shows more.
"""

import itertools
import os
import sys


def _is_program() -> bool:
    """Whether Python is about to run a module of looplab: until it has found the module, it calls the program "-m"."""
    named = (name for flag, name in itertools.pairwise(sys.orig_argv) if flag == "-m")
    return sys.argv[0] == "-m" and next(named, "").split(".")[0] == "looplab"


if _is_program():
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
