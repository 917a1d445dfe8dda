"""Commits all state of a run to a folder, whole or not at all, and finds the newest whole one again."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from looplab import checks
from looplab.plain_files import CheckpointError, NewerFormatError, Saved, delete, read_tree, sync, write
from looplab.state import check_structure
from looplab.tree import flatten

_NAME = re.compile(r"step-(\d{1,18})-epoch-(\d{1,18})")
_UNFINISHED = ".unfinished-"
_EVERY = re.compile(r"(?:(\d+) )?(step|epoch|second)s?")


@checks.named
@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When a trainer saves all its state to `log_dir/checkpoints`, and what it keeps there.

    Args:
        every: A whole number of steps, "epoch", or a number with its unit: "500 steps", "2 epochs", "600 seconds".
        keep: How many of the newest stay.
        monitor: A name in the logs of an epoch, such as "val_loss": an epoch that is better by it than all before is
            saved too, whatever `every` is, and stays, for `Trainer.restore("best")`.
        mode: Whether the "min" or the "max" of `monitor` is best; "auto" asks the metric of that name.

    Raises:
        ValueError: An argument is none of these.
    """

    every: int | str = "epoch"
    keep: int = 2
    monitor: str | None = None
    mode: Literal["auto", "min", "max"] = "auto"

    def __post_init__(self) -> None:
        _ = self.interval
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1:
            raise ValueError(f"`keep` must be a whole number of at least 1; {self.keep!r} came.")
        if self.monitor is not None and not isinstance(self.monitor, str):
            raise ValueError(f"`monitor` must be a name in the logs of an epoch, or None; {self.monitor!r} came.")
        if self.mode not in ("auto", "min", "max"):
            raise ValueError(f'`mode` must be "auto", "min" or "max"; {self.mode!r} came.')
        if self.mode != "auto" and self.monitor is None:
            raise ValueError(f"`mode` {self.mode!r} came without `monitor`. Name what is to be best.")

    @property
    def interval(self) -> tuple[int, str]:
        """`every` as a number and its unit: "step", "epoch" or "second"."""
        text = f"{self.every} steps" if isinstance(self.every, int) and not isinstance(self.every, bool) else self.every
        match = _EVERY.fullmatch(text) if isinstance(text, str) else None
        if match is None or match[1] == "0" or (match[1] or "1").strip("0") == "":
            raise ValueError(
                f'`every` must be a whole number of steps of at least 1, "epoch", or such as "2 epochs" or '
                f'"600 seconds"; {self.every!r} came.'
            )
        return int(match[1] or 1), match[2]


class Checkpoints:
    """The checkpoints of one run.

    Each is a folder `step-<steps>-epoch-<epochs>` of plain files: arrays in the format of safetensors, the rest of the
    state as JSON, and a manifest with the checksums of both. It is written under another name, its files and then the
    folder are brought to the disk, and it is renamed last: a folder of that name is whole, or the disk has damaged it.
    Nothing that is read is ever run, and no name in a file leads to another file.
    """

    def __init__(self, folder: Path, settings: Checkpoint):
        self.folder = folder
        self.settings = settings
        self._number, self._unit = settings.interval
        self._lower_is_better: bool | None = None
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "looplab-checkpoint")
        self._pending: concurrent.futures.Future | None = None
        self._clock = time.monotonic()

    # When.

    def steps_left(self, steps: int) -> int | None:
        """How many steps after `steps` the next one is due, if steps are what it is due by."""
        return self._number - steps % self._number if self._unit == "step" else None

    def due_after_step(self, steps: int) -> bool:
        """Whether one is due when `steps` were done."""
        if self._unit == "second":
            return time.monotonic() - self._clock >= self._number
        return self._unit == "step" and steps % self._number == 0

    def due_after_epoch(self, epochs: int) -> bool:
        """Whether one is due when `epochs` were done."""
        return self._unit == "epoch" and epochs % self._number == 0

    # Writing.

    def prefer(self, lower: bool) -> None:
        """Says that of the monitored values the lower, or else the higher, are better: the best one stays."""
        self._lower_is_better = lower

    def commit(self, steps: int, epochs: int, state: dict[str, Any], most: int, durable: Iterable[Path] = ()) -> None:
        """Writes a state, in a thread of its own; first waits for the one before, and raises its error.

        Args:
            steps, epochs: How many were done; they are the checkpoint's name.
            state: Dicts, lists and tuples of arrays, numbers, strings and None. It must not change any more. Under
                "monitored" it has the value by which the best one is told, or None.
            most: How many bytes its arrays may have, to be read again.
            durable: Files that the state speaks of, which are brought to the disk before it.

        Raises:
            OSError: The one before could not be written.
            TypeError: The state has something else in it.
            ValueError: This one or the one before is larger than what would be read, or has another structure.
        """
        path = self.folder / f"step-{steps}-epoch-{epochs}"
        self.wait()
        # Where it is there already, nothing was done since: such as at the beginning of a second `fit`.
        if not path.exists():
            tree, arrays = flatten(state)
            check_structure(path, tree)  # what is not to be read again must not push out what is
            size = sum(array.nbytes for array in arrays.values())
            if size > most:
                largest = max(arrays, key=lambda name: arrays[name].nbytes)
                raise ValueError(
                    f"The checkpoint cannot be written: its arrays would have {size} bytes, and {most} are read at "
                    f"most. The largest is {largest.strip('/')}. Keep fewer numbers in callbacks."
                )
            self._pending = self._writer.submit(self._write, path, tree, arrays, list(durable))
        self._clock = time.monotonic()

    def wait(self) -> None:
        """Waits until what was committed is on the disk.

        Raises:
            OSError: It could not be written.
            ValueError: It is larger than what would be read.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread; what was committed is written."""
        self._writer.shutdown()

    def drop_newer(self, path: Path) -> None:
        """Removes those newer than `path`, which is gone on from: they are damaged, and would push out whole ones."""
        paths = self.paths()
        for newer in paths[: paths.index(path)]:
            self._remove(newer)

    def clean(self) -> None:
        """Removes what a killed process left unfinished."""
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            delete(path)

    def _write(self, path: Path, tree: Any, arrays: dict[str, np.ndarray], durable: list[Path]) -> None:
        unfinished = self.folder / f"{_UNFINISHED}{path.name}"

        def write_and_rename() -> None:
            delete(unfinished)
            unfinished.mkdir(parents=True)
            sync(self.folder.parent)
            for file in durable:
                with contextlib.suppress(FileNotFoundError):
                    sync(file)
            write(unfinished, tree, arrays)
            os.rename(unfinished, path)
            sync(self.folder)

        try:
            try:
                write_and_rename()
            except FileNotFoundError:  # somebody has removed the folder in between
                write_and_rename()
        except Exception as error:
            with contextlib.suppress(OSError):
                delete(unfinished)
            if not isinstance(error, OSError):
                raise
            raise OSError(
                f"The checkpoint {path} could not be written: {error.strerror or error}. Earlier ones are as they "
                f"were. Make room or give access, and continue with `resume`."
            ) from error
        try:
            self._retain()
        except OSError as error:
            raise OSError(
                f"The checkpoint {path} is written, and older ones could not be removed: {error}. Give access, and go "
                f"on with `resume`."
            ) from error

    def _retain(self) -> None:
        """Removes all but the newest ones and the best."""
        paths, best = self.paths(), next(iter(self._by_worth()[0]), None)
        for path in reversed(paths[self.settings.keep :]):
            if path != best:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """A folder that is half removed must not have the name of a whole one."""
        removed = self.folder / f"{_UNFINISHED}removed-{path.name}"
        delete(removed)
        os.rename(path, removed)
        delete(removed)

    # Reading.

    def paths(self) -> list[Path]:
        """All of them, the newest first."""
        found = [(match, path) for path in self.folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][2])), reverse=True)]

    def best(self) -> tuple[Saved | None, list[str]]:
        """The whole one with the best monitored value, the newest of equals, or None; and what is wrong with others."""
        paths, skipped = self._by_worth()
        saved, also_skipped = _first_sound(paths)
        return saved, skipped + also_skipped

    def _by_worth(self) -> tuple[list[Path], list[str]]:
        """Those that have a monitored value, the best first; and what is wrong with those that cannot be read."""
        if self._lower_is_better is None:
            return [], []
        worth, skipped = self._worths()
        paths = [path for path, value in worth.items() if value > -math.inf]
        return sorted(paths, key=worth.__getitem__, reverse=True), skipped

    def is_best(self, monitored: float) -> bool:
        """Whether this monitored value is better than that of each of them."""
        self.wait()
        return self._worth_of(monitored) > max(self._worths()[0].values(), default=-math.inf)

    def _worths(self) -> tuple[dict[Path, float], list[str]]:
        """How good each of them is; and what is wrong with those whose state cannot be read."""
        worth: dict[Path, float] = {}
        skipped: list[str] = []
        for path in self.paths():
            try:
                worth[path] = self._worth_of(read_tree(path).get("monitored"))
            except CheckpointError as error:
                skipped.append(str(error))
        return worth, skipped

    def _worth_of(self, monitored: Any) -> float:
        """The higher the better; the least of all where there is no number."""
        if not isinstance(monitored, float) or math.isnan(monitored):
            return -math.inf
        return -monitored if self._lower_is_better else monitored

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest whole one, or None where there is none; and what is wrong with each newer one, which is skipped.

        Raises:
            CheckpointError: There are some, but none is whole; or the newest is of a newer format.
        """
        saved, skipped = _first_sound(self.paths())
        if skipped and saved is None:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole: {' '.join(skipped)} To train from the beginning, "
                f"pass another `log_dir`, or remove this one."
            )
        return saved, skipped


def _first_sound(paths: Iterable[Path]) -> tuple[Saved | None, list[str]]:
    """The first that is whole, or None; and what is wrong with those before it."""
    skipped: list[str] = []
    for path in paths:
        try:
            return _sound(path), skipped
        except NewerFormatError:
            raise
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def _sound(path: Path) -> Saved:
    """The checkpoint in this folder, whole and with the structure that ours have.

    Raises:
        CheckpointError: It is not.
    """
    saved = Saved(path)
    check_structure(path, saved.tree)
    return saved
