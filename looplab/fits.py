"""The calls of `fit` of one run: how many are complete, and the history of each, in `log_dir/fits.jsonl`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Fits:
    """Counts the complete calls of `fit`, and appends their histories to a file, a line each.

    A checkpoint holds `count` and `bytes`, so that it does not grow with the number of calls. Lines beyond `bytes` are
    of calls that a resumed run does again.
    """

    def __init__(self, log_dir: Path | None):
        self._path = None if log_dir is None else log_dir / "fits.jsonl"
        self._newest: str | None = None  # the line of the newest complete call, until the next one starts
        self.count = 0
        """How many calls are complete."""
        self.bytes = 0
        """The length of the file that holds their histories, without the newest."""

    def complete(self, history: dict[str, list[float]]) -> None:
        """Counts a call that has ended; its line is written when the next one starts, because it may be extended."""
        self._newest = json.dumps({"fit": self.count, "history": history}, default=float) + "\n"
        self.count += 1

    def start(self) -> None:
        """Writes the line of the call before."""
        if self._newest is not None and self._path is not None:
            line, self._newest = self._newest.encode(), None
            with open(self._path, "r+b" if self._path.exists() else "w+b") as file:
                file.truncate(min(self.bytes, self._path.stat().st_size))
                file.seek(0, os.SEEK_END)
                file.write(line)
                self.bytes = file.tell()

    def take_over(self, count: int, size: int) -> None:
        """Continues from a checkpoint."""
        self.count, self.bytes, self._newest = count, size, None

    def history(self, number: int) -> dict[str, Any]:
        """The history of a complete call (from 0); {} where the file does not have it."""
        try:
            assert self._path is not None
            with open(self._path, encoding="utf-8") as file:
                found = [line for line in map(json.loads, file) if line["fit"] == number]
            return {str(name): list(values) for name, values in found[-1]["history"].items()}
        except (AttributeError, IndexError, KeyError, OSError, RecursionError, TypeError, ValueError):
            return {}

    def files(self) -> list[Path]:
        """The file, if there is one."""
        return [] if self._path is None or not self._path.exists() else [self._path]
