"""One `fit`: epoch after epoch, with what it saves on the way, and where it resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras

from looplab import appended, checks, state
from looplab.checkpoint import Checkpoints
from looplab.data import Batches
from looplab.epoch import Epochs, Progress
from looplab.graphs import changed_tables
from looplab.guard import Fault
from looplab.interrupts import Interrupted, Interrupts
from looplab.metrics import lower_is_better
from looplab.plain_files import Saved
from looplab.resume import Resumed
from looplab.steps import LEARNING_RATE
from looplab.warn import say, warn


@dataclasses.dataclass
class Fit:
    """What one call of `fit` does."""

    trainer: Epochs
    train: Batches
    validation: Batches | None
    validates_after: Callable[[int], bool]
    """Whether to validate after this epoch (from 0)."""
    callbacks: keras.callbacks.CallbackList
    first_epoch: int
    epochs: int
    checkpoints: Checkpoints | None
    """None where nothing is saved."""
    resumed: Resumed
    """Where to go on."""

    def __post_init__(self) -> None:
        self.saved = self.resumed.saved
        self._epoch = self.first_epoch
        self._in_epoch = False
        self._progress = Progress()
        self._begun = self.train.begun  # how often the data was started, where an epoch is resumed
        self._logs: dict[str, float] = {}
        self._has_news = False  # whether there is something new to save
        self._saved_steps = 0 if self.saved is None else self.saved.tree["steps"]
        self._at_first: list[dict[str, Any]] = []  # the attributes of callbacks, before and after `on_train_begin`
        self._before_validation: dict[str, Any] = {}  # what of the state a validation changes, as it was before
        self._settings = state.callback_settings(self.callbacks.callbacks)  # what callbacks were made with
        self._interrupts = Interrupts(self.trainer._stop.value, saves=self.checkpoints is not None)

    def run(self) -> None:
        """Trains."""
        trainer = self.trainer
        with self._interrupts, self._saving():
            with self._interrupts.at_once():
                self._prepare()
            trainer.epochs, trainer.stop_training = max(trainer.epochs, self.first_epoch), False
            trainer._settle(goes_on=self.resumed.newest is not None)
            self._at_first.append(state.attributes(self.callbacks.callbacks))
            if self.saved is not None:
                appended.keep_on_begin(self.callbacks.callbacks)
            self.callbacks.on_train_begin()
            self._at_first.append(state.attributes(self.callbacks.callbacks))
            if self.saved is not None:
                self._resume(self.saved)
            self._has_news = True
            iterator = None
            while self._has_more():
                if not self._in_epoch:
                    trainer._reset_metrics()
                    self.callbacks.on_epoch_begin(self._epoch)
                    self._in_epoch = True
                if iterator is None or not self.train.continues:
                    self._begun = self.train.begun
                    iterator = self.train.iterate(trainer.epochs, self._progress.done)
                self._finish_epoch(iterator)
            if self.checkpoints is not None:
                self._save()
            self._interrupts.check()
            self._has_news = False  # a resumed run continues from before what ends it
            for known in trainer._minimized:  # as Keras does: with `use_ema`, the averages become the weights
                known.optimizer.finalize_variable_values(known.variables)
            self.callbacks.on_train_end(self._logs)

    def _has_more(self) -> bool:
        """Whether there is another epoch, or one to end: a callback may have stopped in the midst of it."""
        return self._epoch < self.epochs and (self._in_epoch or not self.trainer.stop_training)

    def _prepare(self) -> None:
        """Traces all steps, so that all variables are there, and tells what does not fit before one is changed."""
        trainer = self.trainer
        with self._able_to_trace() as eagerly:
            loop = trainer._prepared("train", self.train.element_spec, eagerly)
            names = list(loop.names)
            if self.validation is not None:
                test = trainer._prepared("test", self.validation.element_spec, eagerly)
                names += [f"val_{name}" for name in test.names]
        if self.checkpoints is not None and loop.graph is not None:
            checks.saved(changed_tables(loop.graph))
        for batches in (self.train, self.validation):
            if batches is not None and batches.arrays is not None:
                trainer._check_arrays(batches.name, batches.arrays)
        trainer._tell_doubts()
        if self.checkpoints is not None and self.checkpoints.settings.monitor is not None:
            monitor, mode = self.checkpoints.settings.monitor, self.checkpoints.settings.mode
            if not eagerly and monitor not in names:
                near = difflib.get_close_matches(monitor, names, 1) or [n for n in names if n != LEARNING_RATE]
                there = ", ".join(map(repr, near))
                raise ValueError(f"`monitor` must be in the logs of an epoch; {monitor!r} came. There is {there}.")
            self.checkpoints.prefer(lower_is_better(monitor, mode, trainer.metrics))
        if self.saved is None:
            self.train.check_order()
        else:
            variables = trainer._all_state()
            self._state = self.saved.load(state.most_bytes(variables))
            state.check(variables, self._state["variables"], self.saved.path)
            self._advance_data(*self._state["begun"])

    def _advance_data(self, train: int, validation: int) -> None:
        """Brings data sets that shuffle anew to the orders that they had, for this `fit` or the next."""
        is_complete = self.resumed.is_complete(self.epochs, self._settings)
        if is_complete:
            self.train.end()
        if not (is_complete and self.train.begun > train):
            self.train.advance(train)
        if self.validation is not None and self.validation.dataset is not self.train.dataset:
            try:
                self.validation.advance(validation)
            except ValueError as error:  # what is learned does not depend on it
                warn(f"{error} Until then its batches are others than they would have been.")

    @contextlib.contextmanager
    def _able_to_trace(self) -> Iterator[bool]:
        """Tells whether the steps are only gone through by Python.

        To go on, variables must be there before a step has run: so it is traced even then, and not told to be eager.
        """
        trainer, run_eagerly = self.trainer, self.trainer.run_eagerly
        trainer.run_eagerly = run_eagerly and self.saved is None
        try:
            yield trainer.run_eagerly
        except Exception as error:
            if run_eagerly and self.saved is not None:
                raise ValueError(
                    f"`run_eagerly` with `resume`: a step is traced once before, so that its variables are there, and "
                    f"{type(error).__name__} came: {' '.join(str(error).split())[-300:]}. Put what looks at "
                    f"values under `if self.run_eagerly:`."
                ) from error
            raise
        finally:
            trainer.run_eagerly = run_eagerly

    def _finish_epoch(self, iterator: Any) -> None:
        """Trains to the end of the epoch, and validates."""
        trainer = self.trainer
        with self._interrupts.at_once():  # a function of the epoch may give batches of another shape
            loop = trainer._prepared("train", iterator.element_spec, trainer.run_eagerly)
        results, parts = trainer._run(
            "train", loop, iterator, self.train, self._progress, self.callbacks, "train", self._between_calls
        )
        self._logs = results
        validation_results = None
        if self.validation is not None and self.validates_after(self._epoch):
            if self.checkpoints is not None:  # an interrupted validation runs again as a whole
                self._before_validation = {"test_steps": trainer._test_steps, "events": trainer._events.sizes()}
            check = self._interrupts.check
            validation_results = trainer._evaluate(self.validation, self.callbacks, "validation", lambda _: check())
            self._before_validation = {}
        trainer.epochs += 1
        trainer._events.scalars("train", trainer.epochs, _epoch_tags(results | parts))
        if validation_results is not None:
            values, parts = validation_results
            trainer._events.scalars("validation", trainer.epochs, _epoch_tags(values | parts))
            self._logs = results | {f"val_{name}": value for name, value in values.items()}
        self.callbacks.on_epoch_end(self._epoch, self._logs)
        self._epoch, self._in_epoch = self._epoch + 1, False
        self._progress = Progress(in_a_row=self._progress.in_a_row)
        self._begun = self._begun if self.train.continues else self.train.begun
        if self.checkpoints is not None:
            monitored = self._monitored()
            is_due = self.checkpoints.due_after_epoch(trainer.epochs)
            if is_due or (monitored is not None and self.checkpoints.is_best(monitored)):
                self._save()
        self._interrupts.check()

    def _monitored(self) -> float | None:
        """The value that decides which epoch is best, where an epoch that has it has ended."""
        monitor = self.checkpoints and self.checkpoints.settings.monitor
        return self._logs.get(monitor) if monitor and not self._in_epoch else None

    def _between_calls(self, done: int) -> int | None:
        """Saves where that is due, and returns how many steps are left until it is again."""
        left = None
        if self.checkpoints is not None:
            steps = self.trainer.steps
            if done and self.checkpoints.due_after_step(steps):
                self._save()
            left = self.checkpoints.steps_left(steps)
        self._interrupts.check()
        return left

    # Saving and resuming.

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Saves what there is, whatever ends the training."""
        trainer, checkpoints = self.trainer, self.checkpoints
        try:
            yield
            if checkpoints is not None:
                checkpoints.wait()
                self._interrupts.check()
        except Interrupted as interrupted:
            if self._has_news:
                self._save()
            assert checkpoints is not None
            checkpoints.wait()
            say(
                f"looplab: {interrupted.received.name}: {self._saved_steps} steps are saved in {trainer.log_dir}. To "
                f"resume: `fit(..., resume=True)`, or --resume {shlex.quote(str(trainer.log_dir))} on a recipe's "
                f"command line.",
                sys.stderr,
            )
            raise
        except Fault as fault:
            if checkpoints is not None:
                self._save()
                checkpoints.wait()
            raise fault.error(trainer.steps + 1, self._epoch + 1, trainer.log_dir) from None
        finally:
            if checkpoints is not None:
                checkpoints.close()

    def _save(self) -> None:
        assert self.checkpoints is not None
        now = self._state_now()
        self._saved_steps = now["steps"]
        most = state.most_bytes(self.trainer._all_state())
        durable = [*self.trainer._events.files(), *self.trainer._fits.files()]
        self.checkpoints.commit(now["steps"], now["epochs"], now, most, durable)

    def _state_now(self) -> dict[str, Any]:
        """All that decides how the training continues, copied."""
        trainer, progress = self.trainer, self._progress
        with trainer._eager_steps:
            variables = state.values(trainer._all_state())
        return {
            "steps": trainer.steps,
            "epochs": trainer.epochs,
            "test_steps": trainer._test_steps,
            "skipped_steps": trainer.skipped_steps,
            "seed": trainer.seed,
            "fit": trainer._fits.count,
            "fits_bytes": trainer._fits.bytes,
            "epochs_asked": self.epochs,
            "stopped_by": self._stopped_by(),
            "epoch": self._epoch,
            "in_epoch": self._in_epoch,
            "batch": progress.done,
            "ended": progress.ended,
            "in_a_row": progress.in_a_row,
            "means": progress.means.state(),
            "logs": dict(self._logs),
            "monitored": self._monitored(),
            "data": self.train.described,
            "made_with": trainer._made_with,
            "callback_settings": self._settings,
            "begun": [self._begun, 0 if self.validation is None else self.validation.begun],
            "events": trainer._events.sizes(),
            "appended": appended.sizes(self.callbacks.callbacks),
            "callbacks": self._callback_states(),
            "variables": variables,
            **self._before_validation,
        }

    def _stopped_by(self) -> str:
        """The callback that stopped the training; "" where none did."""
        if not self.trainer.stop_training:
            return ""
        by_key = state.by_key(self.callbacks.callbacks)
        return next((key for key, c in by_key.items() if getattr(c, "stopped_epoch", 0)), "a callback")

    def _callback_states(self) -> dict[str, Any]:
        return state.changed(state.attributes(self.callbacks.callbacks), *self._at_first)

    def _resume(self, saved: Saved) -> None:
        """Brings everything to where it was saved, after `on_train_begin` of the callbacks, which it undoes."""
        trainer, then = self.trainer, self._state
        if then["in_epoch"]:
            self.callbacks.on_epoch_begin(then["epoch"])
        state.assign(trainer._all_state(), then["variables"])
        callbacks = then["callbacks"]
        if self.resumed.is_stopped and not self.resumed.is_complete(self.epochs, self._settings):
            # Other settings than before are to count anew: the callback that stopped does not remember.
            callbacks = {key: {} if key == then["stopped_by"] else value for key, value in callbacks.items()}
            trainer.stop_training = False
        else:
            trainer.stop_training = bool(then["stopped_by"])
        state.restore_callbacks(self.callbacks.callbacks, callbacks, saved.path)
        trainer._take_over(then)
        trainer._events.rewind(then["events"])
        appended.rewind(self.callbacks.callbacks, then["appended"])
        self._epoch, self._in_epoch, self._logs = then["epoch"], then["in_epoch"], then["logs"]
        self._progress = Progress(then["batch"], then["ended"], then["in_a_row"])
        self._progress.means.restore(then["means"])
        if self.checkpoints is not None:  # a run may continue without saving any more
            self.checkpoints.drop_newer(saved.path)
        for line in self.resumed.report(self.epochs, self._settings):
            say(line)


def _epoch_tags(logs: dict[str, float]) -> dict[str, float]:
    return {f"epoch_{name}": value for name, value in logs.items()}
