"""The checkpoints of a run on disk: when one is due, each written whole or not at all, and found again."""

from __future__ import annotations

import concurrent.futures
import math
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from looplab.checkpoint.files import CheckpointError, NewerFormatError, delete, monitored_in, sync, write
from looplab.checkpoint.policy import Checkpoint
from looplab.checkpoint.snapshot import Saved, Snapshot, read
from looplab.checkpoint.tree import flatten
from looplab.warn import warn

_NAME = re.compile(r"step-(\d{1,18})-epoch-(\d{1,18})")
_UNFINISHED = ".unfinished-"


class Store:
    """The checkpoints of one run.

    Each is a folder `step-<steps>-epoch-<epochs>`. It is written under another name, flushed to disk, and renamed: a
    folder with a checkpoint's name is whole, unless the disk has damaged it.

    Args:
        folder: Where the checkpoints are.
        settings: When to save, and what to keep; None saves nothing.
    """

    def __init__(self, folder: Path, settings: Checkpoint | None):
        self.folder = folder
        self.saves = settings is not None
        """Whether anything is saved."""
        self.lower_is_better: bool | None = None
        """Whether a lower monitored value is better; once it is set, the best checkpoint is kept."""
        settings = settings or Checkpoint()
        self.monitor, self.mode = settings.monitor, settings.mode
        self._keep = settings.keep
        self._number, self._unit = settings.interval if self.saves else (1, "never")
        self._saved_at = time.monotonic()
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "looplab-checkpoint")
        self._pending: concurrent.futures.Future | None = None

    # When to save.

    def steps_left(self, steps: int) -> int | None:
        """The number of steps until the next checkpoint is due; None if that does not depend on steps."""
        return self._number - steps % self._number if self._unit == "step" else None

    def is_due_after_step(self, steps: int) -> bool:
        """Whether a checkpoint is due after this many steps."""
        if self._unit == "second":
            return time.monotonic() - self._saved_at >= self._number
        return self._unit == "step" and steps % self._number == 0

    def is_due_after_epoch(self, epochs: int, monitored: float | None) -> bool:
        """Whether a checkpoint is due after this many epochs, the last of which has this monitored value."""
        if self._unit == "epoch" and epochs % self._number == 0:
            return True
        if not self.saves or monitored is None:
            return False
        self.wait()
        return all(self._worth(monitored) > worth for worth, _ in self._best_first()[:1])

    # Writing.

    def commit(self, snapshot: Snapshot, monitored: float | None, durable: Iterable[Path] = ()) -> None:
        """Writes a snapshot in another thread.

        Args:
            snapshot: What to save.
            monitored: The value that decides which checkpoint is best.
            durable: Files whose lengths the snapshot has; they are flushed to disk before it.

        Raises:
            OSError: The previous checkpoint could not be written.
            ValueError: The previous checkpoint is too large.
        """
        self.wait()
        path = self.folder / f"step-{snapshot.state.steps}-epoch-{snapshot.state.epochs}"
        if not path.exists():  # else nothing has changed since, as at the start of a second `fit`
            self._pending = self._writer.submit(self._write, path, [*durable], *flatten(snapshot), monitored)
        self._saved_at = time.monotonic()

    def wait(self) -> None:
        """Waits until what was committed is on disk.

        Raises:
            OSError: It could not be written.
            ValueError: It is too large.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Releases the thread that writes."""
        self._writer.shutdown()

    def drop_newer(self, path: Path) -> None:
        """Removes the checkpoints newer than `path`, from which a run resumes: they are damaged."""
        paths = self.paths() if self.saves else [path]
        for newer in paths[: paths.index(path)]:
            self._remove(newer)

    def clean(self) -> None:
        """Removes what was not finished because the process was killed or the disk was full."""
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            delete(path)

    def _write(self, path: Path, durable: list[Path], *parts: Any) -> None:
        unfinished = self.folder / f"{_UNFINISHED}{path.name}"
        try:
            delete(unfinished)
            unfinished.mkdir(parents=True)
            for file in [self.folder.parent, *durable]:
                sync(file)
            write(unfinished, *parts)
            os.rename(unfinished, path)
            sync(self.folder)
            self._retain()
        except OSError as error:
            raise OSError(
                f"Saving the checkpoint {path} failed: {error}. Earlier ones are unchanged. Free space or grant "
                f"access, and continue with `resume`."
            ) from error

    def _retain(self) -> None:
        """Removes all checkpoints but the newest ones and the best."""
        best = [] if self.lower_is_better is None else self._best_first()[:1]
        for path in reversed(self.paths()[self._keep :]):
            if path not in [path for _, path in best]:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Renames a checkpoint first, because half of one must not have the name of a whole one."""
        removed = self.folder / f"{_UNFINISHED}removed-{path.name}"
        delete(removed)
        os.rename(path, removed)
        delete(removed)

    # Reading.

    def paths(self) -> list[Path]:
        """All checkpoints, the newest first."""
        paths = (path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name))
        return sorted(paths, key=steps_and_epochs, reverse=True)

    def newest(self) -> Saved | None:
        """The newest whole checkpoint, or None if there are none; warns about each that is skipped.

        Raises:
            CheckpointError: There are checkpoints, but none is whole; or the newest has a newer format.
        """
        return self._first_whole(self.paths())

    def best(self) -> Saved | None:
        """The best whole checkpoint, or None if none has a monitored value; warns and raises as `newest` does."""
        return self._first_whole(path for _, path in self._best_first(unreadable=math.inf))

    def _first_whole(self, paths: Iterable[Path]) -> Saved | None:
        skipped: list[str] = []
        for path in paths:
            try:
                saved = read(path)
            except NewerFormatError:
                raise
            except CheckpointError as error:
                skipped.append(str(error))
            else:
                for reason in skipped:
                    warn(f"Skipped: {reason}")
                return saved
        if skipped:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole: {' '.join(skipped)} To train from the start, pass another "
                f"`log_dir`, or remove this one."
            )
        return None

    def _best_first(self, unreadable: float = -math.inf) -> list[tuple[float, Path]]:
        """(worth, path) of each checkpoint with a monitored or an unreadable value: the best first, then the newest."""
        ranked: list[tuple[float, Path]] = []
        for path in self.paths():
            try:
                monitored = monitored_in(path)
            except CheckpointError:
                ranked.append((unreadable, path))
            else:
                if monitored is not None:
                    ranked.append((self._worth(monitored), path))
        return sorted(ranked, key=lambda pair: pair[0], reverse=True)

    def _worth(self, monitored: float) -> float:
        """The higher, the better."""
        return -monitored if self.lower_is_better else monitored


def steps_and_epochs(path: Path) -> tuple[int, ...]:
    """How many steps and epochs were done when the checkpoint with this path was saved."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return tuple(map(int, match.groups()))
