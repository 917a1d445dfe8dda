"""The calls of `fit` of one run: how many are complete, and the history of each, in `log_dir/fits.jsonl`."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

_MOST_BYTES = 2**26  # that are read


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
            with self._open(os.O_RDWR | os.O_CREAT) as file:
                file.truncate(min(self.bytes, os.fstat(file.fileno()).st_size))
                file.seek(0, os.SEEK_END)
                file.write(line)
                self.bytes = file.tell()

    def take_over(self, count: int, size: int) -> None:
        """Continues from a checkpoint."""
        self.count, self.bytes, self._newest = count, size, None

    def history(self, number: int) -> dict[str, Any]:
        """The history of a complete call (from 0); {} where the file does not have it."""
        try:
            with self._open(os.O_RDONLY) as file:
                lines = file.read(_MOST_BYTES).splitlines()
            line = next(line for line in lines if line.startswith(b'{"fit": %d,' % number))
            return {str(name): list(values) for name, values in json.loads(line)["history"].items()}
        except (AttributeError, KeyError, OSError, RecursionError, StopIteration, TypeError, ValueError):
            return {}

    def _open(self, flags: int) -> IO[bytes]:
        """The file: no link, and nothing that one would wait for."""
        assert self._path is not None
        descriptor = os.open(self._path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(f"{self._path} is not a file. Remove it, or pass another `log_dir`.")
        return open(descriptor, "r+b" if flags & os.O_RDWR else "rb")

    def files(self) -> list[Path]:
        """The file, if there is one."""
        path = self._path
        return [path] if path is not None and path.is_file() and not path.is_symlink() else []
