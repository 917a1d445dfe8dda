"""One call of `fit`: epoch after epoch, in an order that the comments explain."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from looplab import checks
from looplab.callbacks import EpochLine, ProgressBar
from looplab.checkpoint import callbacks as callback_state
from looplab.checkpoint import histories
from looplab.checkpoint.policy import lower_is_better
from looplab.checkpoint.snapshot import Asked
from looplab.data.arrays import held_out, is_arrays
from looplab.data.batches import Batches
from looplab.loop.costs import Costs
from looplab.loop.engine import Engine
from looplab.loop.errors import NoBatchError
from looplab.loop.graphs import changed_tables
from looplab.loop.interrupts import Interrupts
from looplab.loop.profile import Profile
from looplab.loop.resume import Resume
from looplab.loop.saving import Saving
from looplab.loop.step import LEARNING_RATE
from looplab.loop.weights import ClassWeights
from looplab.state import Progress
from looplab.walk import overrides
from looplab.warn import warn


@dataclasses.dataclass
class Fit:
    """One call of `fit`."""

    engine: Engine
    train: Batches
    validation: Batches | None
    validation_freq: int | Sequence[int]
    callbacks: list[keras.callbacks.Callback]
    first_epoch: int
    epochs: int
    verbose: int | str
    resume: Resume
    """Where to save, and what to restore."""
    _iterator: Any = None  # that continues in the next epoch

    def run(self) -> keras.callbacks.History:
        """Trains, and returns the history."""
        engine, state = self.engine, self.engine.state
        asked = Asked(
            self.epochs,
            self.train.described,
            engine.runner.objective.made_with,
            callback_state.settings(self.callbacks),
        )
        self.resume.check(asked)
        store, is_requested = self.resume.store, self.resume.is_requested
        if self.train.unseeded and (store.saves or is_requested):
            checks.unseeded("x", self.train.unseeded, is_requested)
        for data in (self.train, self.validation) if store.saves or is_requested else ():
            if data is not None and data.inexact:
                checks.inexact(data.name, data.inexact)
        engine.costs = engine.tracer.costs = Costs()
        is_shown = self.verbose and engine.workers.is_chief
        shown = [(EpochLine if self.verbose == 2 else ProgressBar)(engine.costs)] if is_shown else []
        callbacks = keras.callbacks.CallbackList(
            [*self.callbacks, *shown],
            add_history=True,
            model=engine.runner.trainer,
            epochs=self.epochs,
            steps=self.train.steps,
            verbose=self.verbose,
            costs=engine.costs.seconds,
        )
        saving = Saving(engine, self.train, self.validation, callbacks, asked, self.resume)
        with engine.costs:
            self._train(callbacks, saving, Interrupts(engine.tracer.stop, store.saves, engine.workers))
        history = engine.runner.trainer.history  # which the list of callbacks has set
        if store.saves and engine.folder.path is not None and engine.workers.is_chief:
            histories.write(engine.folder.path, state.fits, history.history)
        state.fits += 1
        return history

    def _train(self, callbacks: keras.callbacks.CallbackList, saving: Saving, interrupts: Interrupts) -> None:
        engine, state, trainer = self.engine, self.engine.state, self.engine.runner.trainer
        events, store, workers = engine.folder.events, self.resume.store, engine.workers
        profiled = engine.profile_steps if workers.is_chief else None
        with interrupts, saving.on_exit(interrupts), Profile(profiled, engine.folder.path) as profile:
            between = functools.partial(self._between, saving, interrupts, profile)
            self._prepare()
            self.resume.load(self.train, self.validation)
            interrupts.check()  # nothing has changed yet
            state.epochs, state.epoch = max(state.epochs, self.first_epoch), self.first_epoch
            state.in_epoch, trainer.stop_training, state.progress = False, False, Progress()
            state.updates = engine.runner.updates()
            engine.folder.take(resumes=self.resume.newest is not None)
            saving.start()  # restores after `on_train_begin`, in which callbacks reset themselves
            has_ended = False  # data that cannot be read again
            while state.epoch < self.epochs and not has_ended and (state.in_epoch or not engine.stops("train")):
                if not state.in_epoch:  # else the epoch has started before the checkpoint that was resumed
                    engine.metrics.reset()
                    with engine.costs.of("callbacks"):
                        callbacks.on_epoch_begin(state.epoch)
                    state.in_epoch = True
                try:
                    logs, parts = self._read(callbacks, saving, between)
                except NoBatchError:  # known only now, if the epoch before has read the last batch
                    if not self.train.continues or state.epoch == self.first_epoch:
                        raise
                    state.in_epoch, has_ended = False, True
                    continue

                state.logs = logs
                validation = self._validate(callbacks, saving, interrupts)
                state.epochs += 1
                events.epoch("train", state.epochs, logs | parts)
                if validation is not None:
                    values, validation_parts = validation
                    events.epoch("validation", state.epochs, values | validation_parts)
                    state.logs = logs | {f"val_{name}": value for name, value in values.items()}
                with engine.costs.of("callbacks"):
                    callbacks.on_epoch_end(state.epoch, state.logs)
                engine.stops("train")  # on any worker, which the checkpoint has
                # Before the checkpoint, which holds all points so far: its time counts to the next epoch.
                events.scalars("time", state.epochs, {f"time/{name}": n for name, n in engine.costs.lap().items()})

                has_ended = self.train.continues and state.progress.ended
                # The epoch is over: its means start again, as its metrics do above, and a checkpoint from here on
                # resumes with the next one.
                state.epoch, state.in_epoch = state.epoch + 1, False
                state.progress = Progress(faults=state.progress.faults)
                saving.starts = saving.starts if self.train.continues else self.train.starts
                if workers.of_chief(functools.partial(store.is_due_after_epoch, state.epochs, saving.monitored())):
                    saving.save()
                interrupts.check()
            self._warn_if_ended(has_ended)
            saving.save()
            interrupts.check()
            saving.has_news = False  # a resumed run repeats what follows
            engine.runner.finalize(since=state.updates)
            callbacks.on_train_end(state.logs)

    def _between(self, saving: Saving, interrupts: Interrupts, profile: Profile, done: int) -> int | None:
        """Saves and profiles if that is due, and returns after how many steps it is due again."""
        store, workers, steps = self.resume.store, self.engine.workers, self.engine.state.steps
        if workers.any(workers.is_chief and done and store.is_due_after_step(steps)):
            saving.save()
        interrupts.check()
        left = [store.steps_left(steps), profile.left(steps)]
        return min((number for number in left if number is not None), default=None)

    def _read(
        self, callbacks: keras.callbacks.CallbackList, saving: Saving, between: Callable[[int], int | None]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Trains for the rest of the running epoch: what `Engine.run` returns."""
        state = self.engine.state

        def iterate() -> Any:
            iterator = self._iterator
            if iterator is None:
                saving.starts = self.train.starts
                iterator = self.train.iterate(state.epochs, state.progress.batches)
                self._iterator = iterator if self.train.continues else None
            return iterator

        with self.train.reading():
            return self.engine.run("train", self.train, state.progress, callbacks, iterate, "train", between)

    def _warn_if_ended(self, has_ended: bool) -> None:
        epoch = self.engine.state.epoch
        if has_ended and epoch < self.epochs:
            warn(
                f"`{self.train.name}` has ended and cannot be read again: training ends after epoch {epoch} of "
                f"{self.epochs}. Pass `steps_per_epoch` if its batches are meant for several epochs, or data that can "
                f"be read again, such as a `keras.utils.PyDataset`."
            )

    def _validate(
        self, callbacks: keras.callbacks.CallbackList, saving: Saving, interrupts: Interrupts
    ) -> tuple[dict[str, float], dict[str, float]] | None:
        """The values of the validation after this epoch, and those of the parts of the loss; None if none is due."""
        freq, epoch = self.validation_freq, self.engine.state.epoch + 1
        is_due = epoch % freq == 0 if isinstance(freq, int) else epoch in freq
        if self.validation is None or not is_due:
            return None
        with saving.validating(), self.engine.costs.of("validation"):
            return self.engine.evaluate(self.validation, callbacks, "validation", lambda _: interrupts.check())

    def _prepare(self) -> None:
        """Traces all steps, so that all variables exist, and raises what is wrong before anything is changed."""
        engine, runner, trainer = self.engine, self.engine.runner, self.engine.runner.trainer
        with self._traceable() as eagerly:
            step = engine.tracer.compiled("train", self.train.element_spec, eagerly)
            names = list(step.names)
            if self.validation is not None:
                test = engine.tracer.compiled("test", self.validation.element_spec, eagerly)
                names += [f"val_{name}" for name in test.names]
        if self.resume.store.saves and step.graph is not None:
            checks.saved(changed_tables(step.graph))
        model = None if overrides(trainer, "__call__") else trainer.model
        for batches in (self.train, self.validation):
            if batches is not None and batches.arrays is not None:
                runner.objective.check_arrays(batches.name, batches.arrays, model)
        runner.warnings.give()
        store, monitor = self.resume.store, self.resume.store.monitor
        if monitor is not None:
            if not eagerly and monitor not in names:
                near = difflib.get_close_matches(monitor, names, 1) or [n for n in names if n != LEARNING_RATE]
                known = ", ".join(map(repr, near))
                raise ValueError(f"`monitor` must be in the logs of an epoch, such as {known}; got {monitor!r}.")
            store.lower_is_better = lower_is_better(monitor, store.mode, trainer.metrics)

    @contextlib.contextmanager
    def _traceable(self) -> Iterator[bool]:
        """Yields whether steps run eagerly.

        To resume, variables must exist before a step has run: so the step is traced even if it runs eagerly.
        """
        trainer = self.engine.runner.trainer
        if not trainer.run_eagerly or self.resume.saved is None:
            yield trainer.run_eagerly
            return
        assigned = vars(trainer)["run_eagerly"]  # None stands for that of the model
        trainer.run_eagerly = False
        try:
            yield False
        except Exception as error:
            raise ValueError(
                f"`run_eagerly` with `resume`: the step is traced once before, so that its variables exist, which "
                f"raised {type(error).__name__}: {' '.join(str(error).split())[-300:]}. Put code that looks at "
                f"values under `if self.run_eagerly:`."
            ) from error
        finally:
            trainer.run_eagerly = assigned


def fit(
    engine: Engine,
    *,
    x: Any,
    y: Any,
    sample_weight: Any,
    batch_size: Any,
    epochs: Any,
    verbose: Any,
    callbacks: Any,
    validation_split: Any,
    validation_data: Any,
    shuffle: Any,
    class_weight: Any,
    initial_epoch: Any,
    steps_per_epoch: Any,
    validation_steps: Any,
    validation_batch_size: Any,
    validation_freq: Any,
    resume: Any,
) -> keras.callbacks.History:
    """Checks the arguments of `Trainer.fit`, and runs it or skips it."""
    trainer = engine.runner.trainer
    batch_size, steps_per_epoch, validation_steps, validation_batch_size = checks.positive(
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        validation_steps=validation_steps,
        validation_batch_size=validation_batch_size,
    )
    epochs = checks.epochs(epochs)
    initial_epoch = checks.whole(0, "initial_epoch", initial_epoch)
    trainer.skip_nonfinite = checks.whole(0, "skip_nonfinite", trainer.skip_nonfinite)
    validation_freq = checks.validation_freq(validation_freq)
    checks.resume(resume, engine.folder.path)
    checks.learning_rates(trainer.optimizers)
    given = checks.callbacks(callbacks)
    checks.same(engine.workers, engine.folder.path, epochs, initial_epoch, resume, validation_data)
    engine.runner.class_weights = ClassWeights.of(class_weight)
    if validation_split and validation_data is None:
        x, y, sample_weight, validation_data = held_out(x, y, sample_weight, validation_split)
    with engine.workers.needed(), contextlib.ExitStack() as on_exit:
        engine.workers.of_chief(lambda: on_exit.enter_context(engine.folder.owned(resume)))
        found = Resume(engine, trainer.checkpoint, resume)
        order = {"shuffle": shuffle, "training_from": found.first_epoch(initial_epoch)}
        train = engine.batches("x", x, y, sample_weight, batch_size, steps=steps_per_epoch, **order)
        validation = None
        if validation_data is not None:
            checks.test_step("validation_data", trainer)
            parts = keras.utils.unpack_x_y_sample_weight(validation_data)
            size = validation_batch_size or (batch_size if is_arrays(parts[0]) else None)
            validation = engine.batches("validation_data", *parts, size, steps=validation_steps)
        if found.is_skipped:
            trainer.history = found.skip(train)
            return trainer.history
        data = train, validation, validation_freq
        return Fit(engine, *data, given, initial_epoch, epochs, verbose, found).run()
