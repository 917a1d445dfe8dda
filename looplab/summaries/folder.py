"""The log folder of a trainer: whose run it holds, and what is written to it outside of steps."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from looplab.summaries.lock import can_resume, no_other_run
from looplab.summaries.writer import RunWriter

Write = Callable[[RunWriter], None]


class RunFolder:
    """A log folder. It belongs to this trainer from the first `fit`, or the first value that is written.

    If it already holds a run, values that are logged wait until `fit` decides whether to resume that run.

    Args:
        path: The folder; None writes nothing.
        is_written: Whether this process writes to it: with several workers, only the first does.
    """

    def __init__(self, path: Path | None, is_written: bool = True):
        self.path = path
        self._written = path if is_written else None
        self.events = RunWriter(self._written)
        self.resumed: dict[str, int] | None = None
        """The sizes of the event files in a checkpoint that the trainer was restored from, until it continues."""
        self._is_taken = False
        self._waiting: list[tuple[Write, bool]] = []  # (write, if_resumed)

    def log(self, write: Write, if_resumed: bool = False) -> None:
        """Writes what is logged outside of steps; before a `fit` that resumes, only if `if_resumed`."""
        if self._written is None or self._is_ours or not can_resume(self._written):
            with self.owned():
                write(self.events)
            return
        if not self._waiting:  # at the end of the program, if it never calls `fit`
            weakref.finalize(self, _warn_of_unwritten, self._waiting, self._written)
        self._waiting.append((write, if_resumed))

    def take(self, resumes: bool) -> None:
        """Makes the run in the folder this trainer's, and writes what has waited.

        Args:
            resumes: Whether the run has a checkpoint. If not, everything that it has left is removed.
        """
        if not resumes and not self._is_ours:
            self.events.remove()
        if self.resumed is not None:
            self.events.rewind(self.resumed)
            self.resumed = None
        for write, if_resumed in self._waiting:
            if if_resumed or not resumes:  # else the run has the value
                write(self.events)
        self._waiting.clear()
        self._is_taken = True

    @contextlib.contextmanager
    def owned(self, resume: bool = False) -> Iterator[None]:
        """Inside it, the folder belongs to this trainer, and no other process can write to it.

        Args:
            resume: Whether it may hold a run.

        Raises:
            ValueError: Another process uses it, or it holds the run of another trainer.
        """
        if self._written is None or self.events.owned:
            yield
            return
        if not self._is_ours:
            no_other_run(self._written, resume)
        with self.events.owning():
            yield

    @property
    def _is_ours(self) -> bool:
        return self._is_taken or self.events.has_written


def _warn_of_unwritten(waiting: list[Any], path: Path) -> None:
    if waiting:
        warnings.warn(
            f"What was logged was not written: {path} holds a run, and `fit` did not resume it.", stacklevel=2
        )
