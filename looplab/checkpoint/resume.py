"""Where a call of `fit` resumes: found in the checkpoints of its run, and compared with what is asked for now."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import keras

from looplab.checkpoint.files import CheckpointError
from looplab.checkpoint.policy import Checkpoint
from looplab.checkpoint.snapshot import Asked, Saved, Snapshot
from looplab.checkpoint.store import NullStore, Store
from looplab.loop.metrics import lower_is_better
from looplab.summaries.folder import RunFolder
from looplab.warn import say, warn

_FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Resumed:
    """Where one call of `fit` resumes."""

    newest: Saved | None = None
    """The newest checkpoint of the run, which may belong to another call."""
    saved: Saved | None = None
    """The checkpoint to resume from; None if the call starts."""
    is_requested: bool = False
    is_skipped: bool = False
    """Whether the run has completed the call."""

    @property
    def snapshot(self) -> Snapshot | None:
        """That of `saved`."""
        return None if self.saved is None else self.saved.snapshot

    @property
    def is_stopped(self) -> bool:
        """Whether a callback had stopped the call."""
        return self.snapshot is not None and bool(self.snapshot.stopped_by) and not self.snapshot.state.in_epoch

    def is_complete(self, epochs: int, callbacks: dict[str, dict[str, str]]) -> bool:
        """Whether nothing is left to train.

        A call that a callback stopped continues if it asks for more epochs, or if the callback has other settings.
        """
        if self.snapshot is None or self.snapshot.state.in_epoch:
            return False
        then, key = self.snapshot.asked, self.snapshot.stopped_by
        has_changed = callbacks != then.callbacks
        if key in then.callbacks:
            has_changed = callbacks.get(key) != then.callbacks[key]
        stays_stopped = bool(key) and epochs <= then.epochs and not has_changed
        return stays_stopped or self.snapshot.state.epoch >= epochs

    def report(self, epochs: int, callbacks: dict[str, dict[str, str]]) -> str:
        """A line about a call that was complete or stopped; "" about any other."""
        is_complete = self.is_complete(epochs, callbacks)
        if self.snapshot is not None and self.is_stopped:
            then, epoch = self.snapshot.asked.epochs, self.snapshot.state.epoch
            stopped = f"looplab: training stopped after epoch {epoch} of {then} by {self.snapshot.stopped_by}"
            if is_complete:
                return f"{stopped}: nothing to train. To continue, ask for more `epochs`, or change the callback."
            return f"{stopped}: continuing to epoch {epochs}."
        if self.snapshot is not None and is_complete:
            done = self.snapshot.state.epoch
            return f"looplab: {done} epochs are done, and `epochs` is {epochs}: nothing to train."
        return ""

    def check(self, seed: int | None, now: Asked) -> None:
        """Checks that the call has the same seed and data as before; warns if the loss or optimizer differs.

        Args:
            seed: What the trainer was given, if anything.
            now: What is asked for.

        Raises:
            CheckpointError: The seed or the data differ.
        """
        if self.saved is None:
            return
        snapshot, then = self.saved.snapshot, self.saved.snapshot.asked
        seeds = [] if seed is None else [("seed", snapshot.state.seed, seed)]
        for name, was, is_now in [*seeds, *((name, then.data.get(name), value) for name, value in now.data.items())]:
            if was != is_now:
                raise CheckpointError(
                    f"`resume`: the run in {self.saved.path.parent.parent} has {name} {was}, and now it is {is_now}. "
                    f"Pass what it was, or start another run in another `log_dir`."
                )
        for name, settings in now.made_with.items():
            old = then.made_with.get(name, {})
            for setting in {**old, **settings}:
                if (was := old.get(setting)) != (is_now := settings.get(setting)):
                    warn(
                        f"`resume`: {setting} of `{name}` was {was}, and now it is {is_now}. Numbers that training "
                        f"changes, such as a learning rate, are restored; everything else is as it is now."
                    )


def open_store(folder: RunFolder, settings: Checkpoint | None, number: int, resume: bool) -> tuple[NullStore, Resumed]:
    """Where a call of `fit` saves, and where it resumes; warns of each checkpoint that is skipped.

    Args:
        folder: That of the trainer.
        settings: Those of the trainer.
        number: That of the call, from 0.
        resume: Whether the call resumes.

    Raises:
        CheckpointError: There are checkpoints, but none is whole; or the newest has a newer format.
    """
    if folder.path is None:
        return NullStore(), Resumed()
    store = Store(folder.path / _FOLDER, settings or Checkpoint())
    store.clean()
    resumed = Resumed()
    if resume:
        newest = _reported(store.newest())
        fits = -1 if newest is None else newest.snapshot.state.fits
        resumed = Resumed(newest, newest if fits == number else None, True, fits > number)
        if newest is None and not folder.events.has_written:
            say(f"looplab: {folder.path} has no checkpoint: starting at step 1.")
    return (NullStore() if settings is None else store), resumed


def saved_in(log_dir: Path | None, settings: Checkpoint | None, which: str, metrics: Iterable[keras.Metric]) -> Saved:
    """The "newest" or the "best" checkpoint in a log folder.

    Raises:
        ValueError: There is none.
    """
    if log_dir is None or settings is None:
        raise ValueError("`restore` needs the trainer's `log_dir` and `checkpoint`, or a checkpoint's folder.")
    store = Store(log_dir / _FOLDER, settings)
    if which == "newest":
        saved = _reported(store.newest())
    else:
        if settings.monitor is None:
            raise ValueError('`restore("best")` needs a `monitor` of the trainer\'s `checkpoint`.')
        store.prefer(lower_is_better(settings.monitor, settings.mode, metrics))
        saved = _reported(store.best())
    if saved is None:
        raise ValueError(f"`checkpoint`: there is no {which} one in {store.folder}.")
    return saved


def _reported(found: tuple[Saved | None, list[str]]) -> Saved | None:
    saved, skipped = found
    for reason in skipped:
        warn(f"Skipped: {reason}")
    return saved
