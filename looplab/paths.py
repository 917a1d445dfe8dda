"""Paths as users pass them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash: `Path("gs://bucket")` is `gs:/bucket`


def local_path(argument: str, path: Any) -> Path:
    """Returns the path with `~` expanded.

    Args:
        argument: What errors call it.
        path: A str, bytes or `os.PathLike`; not a URL.
    """
    try:
        text = os.fsdecode(path)
    except TypeError as error:
        raise TypeError(f"`{argument}` must be a path; got {path!r}.") from error
    if _URL.match(text):
        raise ValueError(
            f"`{argument}` must be a path of a local file system; got the URL {text}. Use a local folder and copy the "
            f"files, or mount the storage and pass the path where it is mounted."
        )
    expanded = os.path.expanduser(text)  # that of `Path` would also expand ./~
    if expanded.startswith("~"):
        raise ValueError(
            f"`{argument}`: the home folder in {text} is unknown. Pass the full path; a folder whose name starts with "
            f"~ is ./{text}"
        )
    return Path(expanded)
