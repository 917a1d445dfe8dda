"""What one call of `fit` does with the checkpoints of earlier processes: it starts, resumes, or is skipped."""

from __future__ import annotations

from pathlib import Path

import keras

from looplab.checkpoint import callbacks as callback_state
from looplab.checkpoint import histories, snapshot
from looplab.checkpoint.files import CheckpointError
from looplab.checkpoint.policy import Checkpoint, lower_is_better
from looplab.checkpoint.snapshot import Asked, Saved, assign
from looplab.checkpoint.store import Store
from looplab.data.batches import Batches
from looplab.loop.engine import Engine
from looplab.paths import local_path
from looplab.warn import say, warn

_FOLDER = "checkpoints"


class Resume:
    """What one call of `fit` finds in the log folder, and restores from it.

    If nothing is found, or the newest checkpoint belongs to an earlier call of the program, this call starts. If the
    checkpoint belongs to this call, it resumes, and may have nothing left to train. If the checkpoint belongs to a
    later call, this one is skipped.

    Args:
        engine: That of the trainer. Unless the user chose its seed, it gets that of the checkpoint.
        settings: Those of the trainer.
        is_requested: Whether the call may resume.

    Raises:
        CheckpointError: There are checkpoints, but none is whole; or the newest has a newer format.
    """

    def __init__(self, engine: Engine, settings: Checkpoint | None, is_requested: bool):
        folder = engine.folder
        self.store = open_store(engine, settings)
        """Where the call saves."""
        self.is_requested = is_requested
        self.newest: Saved | None = None
        """The newest checkpoint of the run."""
        self.saved: Saved | None = None
        """The checkpoint to resume from, if this call resumes."""
        self.is_skipped = False
        self.is_complete = False
        """Whether nothing is left to train, of a call that resumes; known after `check`."""
        self._engine = engine
        if not is_requested:
            return
        self.newest = engine.workers.of_chief(self.store.newest)
        if self.newest is not None:
            state = self.newest.snapshot.state
            self.is_skipped = state.fits > engine.state.fits
            self.saved = self.newest if state.fits == engine.state.fits else None
            if (
                self.saved is not None and not self.saved.snapshot.asked.data
            ):  # of single steps, after which this starts
                self.saved = None
                if engine.state.steps < state.steps:
                    raise CheckpointError(
                        f"`resume`: the newest checkpoint in {folder.path} is of `train_on_batch`, after step "
                        f"{state.steps}. Call `build` with the data and `restore` first."
                    )
            if self.saved is not None and not engine.is_seeded:
                engine.state.seed = state.seed
        elif not folder.events.has_written:
            say(f"looplab: {folder.path} has no checkpoint: starting at step 1.")

    @property
    def _was_stopped(self) -> bool:
        """Whether a callback had stopped the call."""
        then = None if self.saved is None else self.saved.snapshot
        return then is not None and bool(then.stopped_by) and not then.state.in_epoch

    def first_epoch(self, initial_epoch: int) -> int:
        """How many epochs the trainer had completed when the call started for the first time."""
        if self.saved is None:
            return max(self._engine.state.epochs, initial_epoch)
        state = self.saved.snapshot.state
        return max(state.epochs - state.epoch + initial_epoch, 0)

    def check(self, now: Asked) -> None:
        """Compares what the call is asked for with what it was asked for; warns if the loss or optimizer differs.

        A call that a callback stopped continues if it asks for more epochs, or if the callback has other settings.

        Raises:
            CheckpointError: The seed or the data differ.
        """
        if self.saved is None:
            return
        state, then = self.saved.snapshot.state, self.saved.snapshot.asked
        before = {"seed": state.seed, **then.data}
        for name, value in {"seed": self._engine.state.seed, **now.data}.items():
            if before.get(name) != value:
                raise CheckpointError(
                    f"`resume`: the run in {self._engine.folder.path} has {name} {before.get(name)}, and now it is "
                    f"{value}. Pass what it was, or start another run in another `log_dir`."
                )
        had, has = snapshot.replicas_of(self.saved.snapshot.variables), self._engine.replicas
        if had != has:
            warn(f"`resume`: there were {had} replicas, and now {has}: the run continues, but not to the same bits.")
        for name, settings in now.made_with.items():
            old = then.made_with.get(name, {})
            for setting in {**old, **settings}:
                if (was := old.get(setting)) != (is_now := settings.get(setting)):
                    warn(
                        f"`resume`: {setting} of `{name}` was {was}, and now it is {is_now}. Numbers that training "
                        f"changes, such as a learning rate, are restored; everything else is as it is now."
                    )
        key = self.saved.snapshot.stopped_by
        keys = [key] if key in then.callbacks else [*then.callbacks, *now.callbacks]
        has_changed = any(then.callbacks.get(key) != now.callbacks.get(key) for key in keys)
        stays_stopped = self._was_stopped and now.epochs <= then.epochs and not has_changed
        self.is_complete = stays_stopped or (not state.in_epoch and state.epoch >= now.epochs)

    def load(self, train: Batches, validation: Batches | None) -> None:
        """Raises what is wrong with the checkpoint before anything is changed, and advances data that shuffles."""
        if self.saved is None:
            return
        snapshot.check(self._engine.runner.variables.by_path(), self.saved, self._engine.replicas)
        starts, validation_starts = self.saved.snapshot.starts
        if self.is_complete and train.continues:
            starts = None  # nobody counts the orders that the complete call has drawn
        is_ahead = train.starts is None or (starts is not None and train.starts > starts)
        if not (self.is_complete and is_ahead):
            train.resume(starts)
        if validation is not None and validation.dataset is not train.dataset:
            try:
                validation.resume(validation_starts)
            except ValueError as error:  # what is learned does not depend on it
                warn(f"{error} Until then, its batches differ from those of the resumed run.")

    def restore(self, callbacks: keras.callbacks.CallbackList, epochs: int) -> None:
        """Restores everything that was saved, after `on_train_begin`, in which callbacks reset themselves."""
        if self.saved is None:
            return
        engine, (path, then) = self._engine, self.saved
        if then.state.in_epoch:
            callbacks.on_epoch_begin(then.state.epoch)
        assign(engine.runner.variables.by_path(), then.variables, engine.replicas)
        then.variables.clear()  # their memory is needed
        engine.state.replace_by(then.state)
        continues = self._was_stopped and not self.is_complete
        engine.runner.trainer.stop_training = bool(then.stopped_by) and not continues
        if continues:
            then.callbacks[then.stopped_by] = {}  # the callback counts anew with its new settings
        callback_state.restore(callbacks.callbacks, then.callbacks, path)
        callback_state.rewind(callbacks.callbacks, then.appended)
        engine.folder.events.rewind(then.files)
        if engine.workers.is_chief:
            self.store.drop_newer(path)
        if self._was_stopped:
            outcome = f"continuing to epoch {epochs}."
            if self.is_complete:
                outcome = "nothing to train. To continue, ask for more `epochs`, or change the callback."
            reached = f"after epoch {then.state.epoch} of {then.asked.epochs} by {then.stopped_by}"
            say(f"looplab: training stopped {reached}: {outcome}")
        elif self.is_complete:
            say(f"looplab: {then.state.epoch} epochs are done, and `epochs` is {epochs}: nothing to train.")
        else:
            say(f"looplab: resuming at step {then.state.steps + 1} (epoch {then.state.epoch + 1})")

    def skip(self, train: Batches) -> keras.callbacks.History:
        """Restores the newest state of a run that has completed this call; returns the history of the call."""
        engine = self._engine
        engine.tracer.compiled("train", train.element_spec, eagerly=False)
        assert self.newest is not None
        path = engine.folder.path
        assert path is not None
        assign(engine.runner.variables.by_path(), self.newest.snapshot.variables, engine.replicas)
        engine.folder.resumed = self.newest.snapshot.files  # single steps may follow
        engine.folder.take(resumes=True)
        number = engine.state.fits
        engine.state.replace_by(self.newest.snapshot.state)
        engine.state.fits = number + 1
        history = keras.callbacks.History()
        history.history = engine.workers.of_chief(lambda: histories.read(path, number))
        history.epoch = list(range(max(map(len, history.history.values()), default=0)))
        say(
            f"looplab: call {number + 1} of `fit` in {engine.folder.path} is complete, with {len(history.epoch)} "
            f"epochs: skipped. The state is the newest, after {engine.state.epochs} epochs in all."
        )
        return history


def open_store(engine: Engine, settings: Checkpoint | None) -> Store:
    """The checkpoints of a trainer."""
    path = engine.folder.path
    if engine.on_batch is not None:
        engine.on_batch.wait()  # its unfinished checkpoint would be removed
    store = Store((path or Path()) / _FOLDER, None if path is None else settings)
    if path is not None and engine.workers.is_chief:
        store.clean()
    return store


def restore(engine: Engine, settings: Checkpoint | None, checkpoint: str | Path) -> None:
    """Restores all variables from the "newest" or "best" checkpoint, or from a checkpoint's folder.

    Raises:
        ValueError: There is none, it is damaged, or it is of another architecture. Nothing was changed.
    """
    if not engine.tracer.is_built:
        raise ValueError("`restore` needs all variables to exist: call `build` with the data before, or `fit`.")
    if engine.on_batch is not None:
        engine.on_batch.wait()
    saved = engine.workers.of_chief(lambda: _found(engine, settings, checkpoint))
    variables = engine.runner.variables.by_path()
    snapshot.check(variables, saved, engine.replicas)
    assign(variables, saved.snapshot.variables, engine.replicas)
    if checkpoint == "newest" and not engine.state.steps:
        engine.state.replace_by(saved.snapshot.state)
        engine.folder.resumed = saved.snapshot.files


def _found(engine: Engine, settings: Checkpoint | None, checkpoint: str | Path) -> Saved:
    if checkpoint not in ("newest", "best"):
        if not (folder := local_path("checkpoint", checkpoint)).is_dir():
            raise ValueError(f'`checkpoint` must be "newest", "best" or an existing folder; got {checkpoint!r}.')
        return snapshot.read(folder)
    if engine.folder.path is None or settings is None:
        raise ValueError("`restore` needs the trainer's `log_dir` and `checkpoint`, or a checkpoint's folder.")
    store = Store(engine.folder.path / _FOLDER, settings)
    if checkpoint == "newest":
        saved = store.newest()
    elif settings.monitor is None:
        raise ValueError('`restore("best")` needs a `monitor` of the trainer\'s `checkpoint`.')
    else:
        store.lower_is_better = lower_is_better(settings.monitor, settings.mode, engine.runner.trainer.metrics)
        saved = store.best()
    if saved is None:
        raise ValueError(f"`checkpoint`: there is no {checkpoint} one in {store.folder}.")
    return saved
