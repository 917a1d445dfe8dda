"""The checkpoints of a run on disk: each is written whole or not at all, retained, and found again."""

from __future__ import annotations

import concurrent.futures
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from looplab.checkpoint.files import CheckpointError, NewerFormatError, delete, sync, write
from looplab.checkpoint.policy import Checkpoint, Schedule
from looplab.checkpoint.snapshot import Saved, Snapshot, encoded

_NAME = re.compile(r"step-(\d{1,18})-epoch-(\d{1,18})")
_UNFINISHED = ".unfinished-"


class NullStore:
    """Keeps nothing."""

    saves = False
    """Whether anything is saved."""
    monitor: str | None = None
    """The name in the logs of the value that decides which epoch is best."""
    mode = "auto"
    """Whether the lowest or the highest is best."""

    def prefer(self, lower: bool) -> None:
        """Sets whether a lower monitored value is better; from then on, the best checkpoint is kept."""

    def steps_left(self, steps: int) -> int | None:
        """The number of steps until the next checkpoint is due; None if that does not depend on steps."""
        return None

    def is_due_after_step(self, steps: int) -> bool:
        """Whether a checkpoint is due after this many steps."""
        return False

    def is_due_after_epoch(self, epochs: int, monitored: float | None) -> bool:
        """Whether a checkpoint is due after this many epochs, the last of which has this monitored value."""
        return False

    def commit(self, capture: Callable[[], Snapshot], most: int, durable: Iterable[Path] = ()) -> None:
        """Saves what `capture` returns, if its arrays have `most` bytes at most; flushes the `durable` files first."""

    def wait(self) -> None:
        """Waits until what was committed is on disk."""

    def close(self) -> None:
        """Releases the thread that writes."""

    def drop_newer(self, path: Path) -> None:
        """Removes the checkpoints newer than `path`, from which a run resumes: they are damaged."""


class Store(NullStore):
    """The checkpoints of one run.

    Each is a folder `step-<steps>-epoch-<epochs>`. It is written under another name, flushed to disk, and renamed: a
    folder with a checkpoint's name is whole, unless the disk has damaged it.

    Args:
        folder: Where the checkpoints are.
        settings: When to save, and what to keep.
    """

    saves = True

    def __init__(self, folder: Path, settings: Checkpoint):
        self.folder = folder
        self.monitor, self.mode = settings.monitor, settings.mode
        self._keep = settings.keep
        self._schedule = Schedule(settings)
        self._lower_is_better: bool | None = None
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "looplab-checkpoint")
        self._pending: concurrent.futures.Future | None = None

    # When to save.

    def prefer(self, lower: bool) -> None:  # noqa: D102
        self._lower_is_better = lower

    def steps_left(self, steps: int) -> int | None:  # noqa: D102
        return self._schedule.steps_left(steps)

    def is_due_after_step(self, steps: int) -> bool:  # noqa: D102
        return self._schedule.is_due_after_step(steps)

    def is_due_after_epoch(self, epochs: int, monitored: float | None) -> bool:  # noqa: D102
        return self._schedule.is_due_after_epoch(epochs) or self._is_best(monitored)

    # Writing.

    def commit(self, capture: Callable[[], Snapshot], most: int, durable: Iterable[Path] = ()) -> None:
        """Writes a snapshot in another thread, after the previous one.

        Args:
            capture: Returns the snapshot.
            most: How many bytes its arrays may have; larger ones could not be read again.
            durable: Files whose lengths the snapshot has; they are flushed to disk before it.

        Raises:
            OSError: The previous checkpoint could not be written.
            TypeError: The snapshot has something that a checkpoint cannot hold.
            ValueError: This checkpoint or the previous one is too large.
        """
        self.wait()
        snapshot = capture()
        path = self.folder / f"step-{snapshot.state.steps}-epoch-{snapshot.state.epochs}"
        if not path.exists():  # else nothing has changed since, as at the start of a second `fit`
            state, arrays = encoded(path, snapshot, most)
            self._pending = self._writer.submit(self._write, path, state, arrays, list(durable))
        self._schedule.saved()

    def wait(self) -> None:
        """Waits until what was committed is on disk.

        Raises:
            OSError: It could not be written.
            ValueError: It is too large.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:  # noqa: D102
        self._writer.shutdown()

    def drop_newer(self, path: Path) -> None:  # noqa: D102
        paths = self.paths()
        for newer in paths[: paths.index(path)]:
            self._remove(newer)

    def clean(self) -> None:
        """Removes what was not finished because the process was killed or the disk was full."""
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            delete(path)

    def _write(self, path: Path, state: bytes, arrays: dict[str, np.ndarray], durable: list[Path]) -> None:
        unfinished = self.folder / f"{_UNFINISHED}{path.name}"
        try:
            delete(unfinished)
            unfinished.mkdir(parents=True)
            sync(self.folder.parent)
            for file in durable:
                sync(file)
            write(unfinished, state, arrays)
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
        ranked = [] if self._lower_is_better is None else self._ranked()[0]
        best = [path for _, path in ranked[:1]]
        for path in reversed(self.paths()[self._keep :]):
            if path not in best:
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
        found = [(match, path) for path in self.folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][2])), reverse=True)]

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest whole checkpoint, or None if there are none; and why each newer one is skipped.

        Raises:
            CheckpointError: There are checkpoints, but none is whole; or the newest has a newer format.
        """
        saved, skipped = _first_whole(self.paths())
        if skipped and saved is None:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole: {' '.join(skipped)} To train from the start, pass another "
                f"`log_dir`, or remove this one."
            )
        return saved, skipped

    def best(self) -> tuple[Saved | None, list[str]]:
        """The best whole checkpoint, or None; and why each better one is skipped."""
        ranked, skipped = self._ranked()
        saved, also_skipped = _first_whole(path for _, path in ranked)
        return saved, skipped + also_skipped

    def _is_best(self, monitored: float | None) -> bool:
        """Whether this value is better than that of each checkpoint."""
        if monitored is None or math.isnan(monitored):
            return False
        self.wait()
        ranked, _ = self._ranked()
        return not ranked or self._worth(monitored) > ranked[0][0]

    def _ranked(self) -> tuple[list[tuple[float, Path]], list[str]]:
        """(worth, path) of each checkpoint with a monitored value, the best first; and why others are skipped."""
        ranked: list[tuple[float, Path]] = []
        skipped: list[str] = []
        for path in self.paths():
            try:
                monitored = Saved(path, verify_arrays=False).snapshot.monitored
            except CheckpointError as error:
                skipped.append(str(error))
            else:
                if monitored is not None and not math.isnan(monitored):
                    ranked.append((self._worth(monitored), path))
        return sorted(ranked, key=lambda pair: pair[0], reverse=True), skipped  # the newest of equals first

    def _worth(self, monitored: float) -> float:
        """The higher, the better."""
        return -monitored if self._lower_is_better else monitored


def _first_whole(paths: Iterable[Path]) -> tuple[Saved | None, list[str]]:
    """The first whole checkpoint, or None; and why those before it are skipped."""
    skipped: list[str] = []
    for path in paths:
        try:
            return Saved(path), skipped
        except NewerFormatError:
            raise
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped
