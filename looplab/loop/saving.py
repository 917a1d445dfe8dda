"""Saves and restores one call of `fit`."""

from __future__ import annotations

import contextlib
import dataclasses
import numbers
import shlex
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import keras

from looplab.checkpoint import callbacks as memory
from looplab.checkpoint.histories import FILE
from looplab.checkpoint.policy import Checkpoint
from looplab.checkpoint.resume import Resumed, saved_in
from looplab.checkpoint.snapshot import Asked, Saved, Snapshot, assign, check, most_bytes, values_of
from looplab.checkpoint.store import NullStore
from looplab.data.batches import Batches
from looplab.loop.engine import Engine
from looplab.loop.guard import Fault
from looplab.loop.interrupts import Interrupted, Interrupts
from looplab.paths import local_path
from looplab.warn import say, warn

COMMAND: ContextVar[str] = ContextVar("COMMAND", default="")
"""The command that runs the recipe that trains, if it is run by one."""


class Saving:
    """What one call of `fit` saves, and what it restores when it resumes.

    Args:
        engine: That of the trainer.
        train, validation: The data.
        callbacks: Those of the call.
        asked: What the call was asked for.
        store: Where it saves.
        resumed: Where it resumes.
    """

    def __init__(
        self,
        engine: Engine,
        train: Batches,
        validation: Batches | None,
        callbacks: keras.callbacks.CallbackList,
        asked: Asked,
        store: NullStore,
        resumed: Resumed,
    ):
        self.has_news = False
        """Whether there is anything new to save."""
        self.starts = train.starts
        """How often the training dataset was iterated over when the running epoch started."""
        self._engine = engine
        self._train = train
        self._validation = validation
        self._callbacks = callbacks
        self._asked = asked
        self._store = store
        self._resumed = resumed
        self._snapshot: Snapshot | None = None  # to restore
        self._saved_steps = 0 if resumed.snapshot is None else resumed.snapshot.state.steps
        self._at_first: list[memory.Attributes] = []  # of the callbacks, before and after `on_train_begin`
        self._before_validation: dict[str, Any] = {}  # what of a snapshot a validation changes, as it was before

    def load(self) -> None:
        """Reads what is restored later, and raises what is wrong with it before anything is changed."""
        if self._resumed.saved is None:
            return
        variables = self._engine.runner.variables.by_path()
        self._snapshot = self._resumed.saved.load(most_bytes(variables))
        check(variables, self._snapshot.variables, self._resumed.saved.path)
        self._advance_data(*self._snapshot.starts)

    def start(self) -> None:
        """Calls `on_train_begin` of the callbacks, and restores what was saved, which they would reset."""
        snapshot, callbacks = self._resumed.snapshot, self._callbacks.callbacks
        self._at_first.append(memory.attributes(callbacks))
        if snapshot is not None:
            memory.keep_files(callbacks)
        self._callbacks.on_train_begin()
        self._at_first.append(memory.attributes(callbacks))
        if snapshot is not None:
            self._restore()
        self.has_news = True

    def _restore(self) -> None:
        """Restores everything that was saved."""
        engine, then, callbacks = self._engine, self._snapshot, self._callbacks.callbacks
        assert self._resumed.saved is not None
        assert then is not None
        path = self._resumed.saved.path
        if then.state.in_epoch:
            self._callbacks.on_epoch_begin(then.state.epoch)
        assign(engine.runner.variables.by_path(), then.variables)
        remembered = then.callbacks
        engine.state.replace_by(then.state)
        engine.runner.trainer.stop_training = bool(then.stopped_by)
        if self._resumed.is_stopped and not self._resumed.is_complete(self._asked.epochs, self._asked.callbacks):
            # It counts anew with its new settings: the callback that stopped the training forgets.
            remembered = {key: {} if key == then.stopped_by else value for key, value in remembered.items()}
            engine.runner.trainer.stop_training = False
        memory.restore(callbacks, remembered, path)
        engine.folder.histories.rewind(then.files.pop(FILE, 0))
        engine.folder.events.rewind(then.files)
        memory.rewind(callbacks, then.appended)
        self._store.drop_newer(path)
        resuming = f"looplab: resuming at step {then.state.steps + 1} (epoch {then.state.epoch + 1})"
        say(self._resumed.report(self._asked.epochs, self._asked.callbacks) or resuming)

    @contextlib.contextmanager
    def on_exit(self, interrupts: Interrupts) -> Iterator[None]:
        """Saves the state if a signal or a fault ends the training."""
        state, log_dir = self._engine.state, self._engine.folder.path
        try:
            yield
            self._store.wait()
            interrupts.check()
        except Interrupted as interrupted:
            if self.has_news:
                self.save()
            self._store.wait()
            saved = f"looplab: {interrupted.received.name}: {self._saved_steps} steps are saved in {log_dir}."
            command = f"{COMMAND.get()} --resume {shlex.quote(str(log_dir))}"
            say(f"\n{saved} To resume: {command if COMMAND.get() else '`fit(..., resume=True)`'}", sys.stderr)
            raise
        except Fault as fault:
            self.save()
            self._store.wait()
            raise fault.error(state.steps + 1, state.epoch + 1, log_dir) from None
        finally:
            self._store.close()

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """Inside it, a checkpoint is one of before the validation, which a resumed run repeats as a whole."""
        if self._store.saves:
            state = self._engine.state
            self._before_validation = {"test_steps": state.test_steps, "files": self._file_lengths()}
        yield
        self._before_validation = {}

    def save(self) -> None:
        """Commits a checkpoint."""
        engine = self._engine
        durable = [*engine.folder.events.files(), *engine.folder.histories.files()]
        self._store.commit(self._captured, most_bytes(engine.runner.variables.by_path()), durable)

    def _captured(self) -> Snapshot:
        """Everything that decides how the training continues."""
        engine, callbacks = self._engine, self._callbacks.callbacks
        state = engine.state
        self._saved_steps = state.steps
        state = dataclasses.replace(
            state,
            test_steps=self._before_validation.get("test_steps", state.test_steps),
            logs={name: float(value) for name, value in state.logs.items() if isinstance(value, numbers.Real)},
        )
        with engine.runner.eager_lock:
            variables = values_of(engine.runner.variables.by_path())
        return Snapshot(
            state=state,
            asked=self._asked,
            stopped_by=self._stopped_by(),
            monitored=self.monitored(),
            starts=[self.starts, 0 if self._validation is None else self._validation.starts],
            files=self._before_validation.get("files") or self._file_lengths(),
            appended=memory.appended(callbacks),
            callbacks=memory.changed(memory.attributes(callbacks), *self._at_first),
            variables=variables,
        )

    def _file_lengths(self) -> dict[str, int]:
        return self._engine.folder.events.sizes() | {FILE: self._engine.folder.histories.length}

    def monitored(self) -> float | None:
        """The value that decides which epoch is best, if an epoch with such a value has just ended."""
        state, monitor = self._engine.state, self._store.monitor
        value = state.logs.get(monitor) if monitor and not state.in_epoch else None
        return None if value is None else float(value)

    def _stopped_by(self) -> str:
        """The callback that has stopped the training; "" if none has."""
        if not self._engine.runner.trainer.stop_training:
            return ""
        keyed = memory.by_key(self._callbacks.callbacks)
        return next((key for key, callback in keyed.items() if getattr(callback, "stopped_epoch", 0)), "a callback")

    def _advance_data(self, train: int, validation: int) -> None:
        """Lets datasets that shuffle in each iteration continue in their order, in this or the next `fit`."""
        is_complete = self._resumed.is_complete(self._asked.epochs, self._asked.callbacks)
        if is_complete and self._train.continues:
            train += 1  # that of the complete call
        if not (is_complete and self._train.starts > train):
            self._train.resume(train)
        if self._validation is not None and self._validation.dataset is not self._train.dataset:
            try:
                self._validation.resume(validation)
            except ValueError as error:  # what is learned does not depend on it
                warn(f"{error} Until then, its batches differ from those of the resumed run.")


def skip(engine: Engine, train: Batches, resumed: Resumed) -> keras.callbacks.History:
    """Restores the newest state of a run whose next call of `fit` is complete; returns the history of that call."""
    engine.tracer.compiled("train", train.element_spec, eagerly=False)
    variables = engine.runner.variables.by_path()
    assert resumed.newest is not None
    snapshot = resumed.newest.load(most_bytes(variables))
    assign(variables, snapshot.variables)
    engine.folder.take(resumes=True)
    number = engine.state.fits
    engine.state.replace_by(snapshot.state)
    engine.state.fits = number + 1
    engine.folder.histories.rewind(snapshot.files.get(FILE, 0))
    history = keras.callbacks.History()
    history.history = engine.folder.histories.read(number)
    epochs = max(map(len, history.history.values()), default=0)
    history.epoch = list(range(epochs))
    say(
        f"looplab: call {number + 1} of `fit` in {engine.folder.path} is complete, with {epochs} epochs: skipped. The "
        f"state is the newest, after {engine.state.epochs} epochs in all."
    )
    return history


def restore(engine: Engine, settings: Checkpoint | None, checkpoint: str | Path) -> None:
    """Restores all variables from the "newest" or "best" checkpoint, or from a checkpoint's folder.

    Raises:
        ValueError: There is none, it is damaged, or it is of another architecture. Nothing was changed.
    """
    if not engine.tracer.is_built:
        raise ValueError("`restore` needs all variables to exist: call `build` with the data before, or `fit`.")
    if checkpoint in ("newest", "best"):
        saved = saved_in(engine.folder.path, settings, str(checkpoint), engine.runner.trainer.metrics)
    elif (folder := local_path("checkpoint", checkpoint)).is_dir():
        saved = Saved(folder)
    else:
        raise ValueError(f'`checkpoint` must be "newest", "best" or an existing folder; got {checkpoint!r}.')
    variables = engine.runner.variables.by_path()
    values = saved.load(most_bytes(variables)).variables
    check(variables, values, saved.path)
    assign(variables, values)
