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
        argument: The name that errors give it.
        path: A str, bytes or `os.PathLike`.

    Raises:
        TypeError: `path` is none of these.
        ValueError: `path` is a URL, or the home folder that `~` stands for is unknown.
    """
    try:
        text = os.fsdecode(path)
    except TypeError as error:
        raise TypeError(f"`{argument}` must be a path; {path!r} came.") from error
    if _URL.match(text):
        raise ValueError(
            f"`{argument}` must be a path of a local file system; the URL {text} came. Use a local folder and copy the "
            f"files, or mount the storage and pass the path where it is mounted."
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(
            f"`{argument}`: the home folder in {text} is unknown. Write it out; a folder whose name begins with ~ is "
            f"./{text}"
        )
    return Path(expanded)
