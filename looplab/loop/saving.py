"""What one call of `fit` saves, and when it ends early."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import shlex
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import keras

from looplab.checkpoint import callbacks as callback_state
from looplab.checkpoint.snapshot import Asked, Snapshot, of_replicas, values_of
from looplab.data.batches import Batches
from looplab.loop.engine import Engine
from looplab.loop.guard import Fault
from looplab.loop.interrupts import Interrupted, Interrupts
from looplab.loop.resume import Resume
from looplab.warn import say

COMMAND: ContextVar[str] = ContextVar("COMMAND", default="")
"""The command that runs the recipe that trains, if it is run by one."""


class Saving:
    """Saves the state of one call of `fit`.

    Args:
        engine: That of the trainer.
        train, validation: The data.
        callbacks: Those of the call.
        asked: What the call was asked for.
        resume: Where it saves, and what it restores.
    """

    def __init__(
        self,
        engine: Engine,
        train: Batches,
        validation: Batches | None,
        callbacks: keras.callbacks.CallbackList,
        asked: Asked,
        resume: Resume,
    ):
        self.has_news = False
        """Whether there is anything new to save."""
        self.starts = train.starts
        """How often the training dataset was iterated over when the running epoch started; None if unknown."""
        self._engine = engine
        self._validation = validation
        self._callbacks = callbacks
        self._asked = asked
        self._store = resume.store
        self._resume = resume
        self._saved_steps = 0 if resume.saved is None else resume.saved.snapshot.state.steps
        self._at_first: list[callback_state.Attributes] = []  # of the callbacks, before and after `on_train_begin`
        self._before_validation: dict[str, Any] = {}  # what of a snapshot a validation changes, as it was before

    def start(self) -> None:
        """Calls `on_train_begin` of the callbacks, and restores what was saved, which they would reset."""
        callbacks = self._callbacks.callbacks
        self._at_first.append(callback_state.attributes(callbacks))
        for callback in callbacks if self._resume.saved is not None else []:
            if isinstance(callback, keras.callbacks.CSVLogger):
                callback.append = True  # it would overwrite its file
        self._callbacks.on_train_begin()
        self._at_first.append(callback_state.attributes(callbacks))
        self._resume.restore(self._callbacks, self._asked.epochs)
        self.has_news = True

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
            if not self._engine.workers.is_chief:
                raise
            command = f"{COMMAND.get()} --resume {shlex.quote(str(log_dir))}"
            say(f"\n{saved} To resume: {command if COMMAND.get() else '`fit(..., resume=True)`'}", sys.stderr)
            raise
        except Fault as fault:
            self.save()
            self._store.wait()
            error = functools.partial(fault.error, state.steps + 1, state.epoch + 1, log_dir)
            raise self._engine.workers.of_chief(error) from None
        finally:
            self._store.close()

    @contextlib.contextmanager
    def validating(self) -> Iterator[None]:
        """Inside it, a checkpoint is one of before the validation, which a resumed run repeats as a whole."""
        if self._store.saves:
            sizes = self._engine.folder.events.sizes()
            self._before_validation = {"test_steps": self._engine.state.test_steps, "files": sizes}
        yield
        self._before_validation = {}

    def save(self) -> None:
        """Commits a checkpoint, if the call saves any."""
        if not self._store.saves:
            return
        with self._engine.costs.of("checkpoints"):
            self._store.wait()  # for at most one copy of the variables in memory
            captured = self._captured()
            if self._engine.workers.is_chief:
                self._store.commit(captured, self.monitored(), self._engine.folder.events.files())
        self._saved_steps = self._engine.state.steps

    def _captured(self) -> Snapshot:
        """Everything that decides how the training continues."""
        engine, state, callbacks = self._engine, self._engine.state, self._callbacks.callbacks
        now: dict[str, Any] = {"test_steps": state.test_steps, "files": engine.folder.events.sizes()}
        before_validation = now | self._before_validation
        logs = {name: float(value) for name, value in state.logs.items() if isinstance(value, numbers.Real)}
        with engine.runner.eager_lock:
            variables = values_of(engine.runner.variables.by_path())
        for others in engine.workers.of_all(of_replicas(variables)):
            variables |= others
        return Snapshot(
            state=dataclasses.replace(state, test_steps=before_validation["test_steps"], logs=logs),
            asked=self._asked,
            stopped_by=self._stopped_by(),
            starts=[self.starts, 0 if self._validation is None else self._validation.starts],
            files=before_validation["files"],
            appended=callback_state.appended(callbacks),
            callbacks=callback_state.changed(callback_state.attributes(callbacks), *self._at_first),
            variables=variables,
        )

    def monitored(self) -> float | None:
        """The value that decides which epoch is best, if an epoch with such a value has just ended."""
        state, monitor = self._engine.state, self._store.monitor
        value = state.logs.get(monitor) if monitor and not state.in_epoch else None
        return None if value is None or math.isnan(value) else float(value)

    def _stopped_by(self) -> str:
        """The callback that has stopped the training; "" if none has."""
        if not self._engine.runner.trainer.stop_training:
            return ""
        keyed = callback_state.by_key(self._callbacks.callbacks)
        return next((key for key, callback in keyed.items() if getattr(callback, "stopped_epoch", 0)), "a callback")
