"""The histories of the calls of `fit` of one run, in `log_dir/fits.jsonl`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec

from looplab.state import Count

FILE = "fits.jsonl"
_MAX_BYTES = 2**26  # that are read


@dataclasses.dataclass
class _Call:
    fit: Count
    history: dict[str, list[Any]]


class Histories:
    """Appends the history of each complete call of `fit` to a file, one line each.

    A checkpoint has only the length of the file, so that it does not grow with the number of calls. Lines beyond that
    length belong to calls that a resumed run repeats.
    """

    def __init__(self, log_dir: Path | None):
        self._path = None if log_dir is None else log_dir / FILE
        self._newest = ""  # the line of the newest complete call, which may still be extended
        self.length = 0
        """In bytes, without the newest line."""

    def complete(self, number: int, history: dict[str, list[float]]) -> None:
        """Adds the call with this number (from 0)."""
        self._newest = json.dumps({"fit": number, "history": history}, default=float) + "\n"

    def write(self) -> None:
        """Writes the newest line: another call starts."""
        if self._newest and self._path is not None:
            if self._path.is_symlink() or (self._path.exists() and not self._path.is_file()):
                raise OSError(f"{self._path} is not a regular file. Remove it, or pass another `log_dir`.")
            with open(self._path, "ab") as file:
                file.truncate(min(self.length, file.tell()))
                file.write(self._newest.encode())
                self.length = file.tell()
            self._newest = ""

    def rewind(self, length: int) -> None:
        """Continues from a checkpoint."""
        self.length, self._newest = length, ""

    def read(self, number: int) -> dict[str, list[Any]]:
        """The history of a complete call; {} if the file does not have it."""
        for path in self.files():
            with open(path, "rb") as file:
                lines = file.read(_MAX_BYTES).splitlines()
            try:
                line = next((line for line in lines if line.startswith(b'{"fit": %d,' % number)), b"")
                return msgspec.convert(json.loads(line), _Call).history
            except (RecursionError, ValueError):  # missing or damaged
                return {}
        return {}

    def files(self) -> list[Path]:
        """The file, if there is one."""
        path = self._path
        return [path] if path is not None and path.is_file() and not path.is_symlink() else []
