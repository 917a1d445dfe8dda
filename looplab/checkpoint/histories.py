"""The histories of the complete calls of `fit` of one run: a line for each call in `log_dir/fits.jsonl`.

A checkpoint does not hold them, so that it does not grow with the number of calls.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from looplab.checkpoint.files import sync

FILE = "fits.jsonl"


def write(log_dir: Path, number: int, history: dict[str, list[Any]]) -> None:
    """Writes the history of the call with this number (from 0), in place of those of this and later calls.

    Raises:
        OSError: The disk is full, or not writable.
    """
    earlier = _lines(log_dir)[:number]
    missing = [b"{}"] * (number - len(earlier))
    lines = [*earlier, *missing, json.dumps(history, default=lambda value: np.asarray(value).tolist()).encode()]
    unfinished = log_dir / f".unfinished-{FILE}"
    try:
        unfinished.unlink(missing_ok=True)  # it may be a link
        unfinished.write_bytes(b"\n".join(lines) + b"\n")
        sync(unfinished)
        os.replace(unfinished, log_dir / FILE)
    except OSError as error:
        raise OSError(f"The history could not be written to {log_dir / FILE}: {error}.") from error


def read(log_dir: Path, number: int) -> dict[str, list[Any]]:
    """The history of a complete call; {} if it is missing or damaged."""
    try:
        return msgspec.convert(json.loads(_lines(log_dir)[number]), dict[str, list[float | list[Any]]])
    except (IndexError, RecursionError, ValueError):
        return {}


def _lines(log_dir: Path) -> list[bytes]:
    path = log_dir / FILE
    return path.read_bytes().splitlines() if path.is_file() else []
