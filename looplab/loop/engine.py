"""One pass over data, as one graph call after another: an epoch of training, an evaluation or a prediction."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import keras
import tensorflow as tf

from looplab import strategies
from looplab.callbacks import begin_batch, end_batches, hooked_to_batches
from looplab.data.arrays import checksum, unpack
from looplab.data.batches import Batches, from_arguments
from looplab.loop import step_checks
from looplab.loop.call_logs import CallLogs
from looplab.loop.costs import Costs
from looplab.loop.errors import NoBatchError, raise_if_stateful, raise_own
from looplab.loop.guard import Fault
from looplab.loop.objective import Objective
from looplab.loop.outputs import joined
from looplab.loop.pace import Pace
from looplab.loop.pass_metrics import PassMetrics
from looplab.loop.step import StepRunner
from looplab.loop.tracing import Tracer
from looplab.loop.weights import examples
from looplab.paths import local_path
from looplab.state import Progress, RunState
from looplab.summaries.folder import RunFolder
from looplab.variables import Variables
from looplab.walk import overrides
from looplab.warn import Warnings, warn
from looplab.workers import Workers

T = TypeVar("T")
_STOPS = {"train": "stop_training", "test": "stop_evaluating", "predict": "stop_predicting"}


class Engine:
    """Runs the steps of a trainer over data.

    Args:
        runner: Runs one step.
        state: Counts the steps.
        folder: Where the values of each step are written.
        is_seeded: Whether the user chose the seed; otherwise a resumed run restores it.
        workers: The processes that train together.
    """

    def __init__(self, runner: StepRunner, state: RunState, folder: RunFolder, is_seeded: bool, workers: Workers):
        self.runner = runner
        self.state = state
        self.folder = folder
        self.is_seeded = is_seeded
        self.workers = workers
        self.replicas: int = runner.strategy.num_replicas_in_sync  # of all workers
        self.tracer = Tracer(runner, is_alone=workers.number == 1)
        self.costs = Costs()  # of the last call of `fit`
        self.profile_steps: tuple[int, int] | None = None  # the first and the last one
        self.on_batch: Any = None
        """Runs steps on single batches."""
        self.metrics = PassMetrics(runner)

    @classmethod
    def of(cls, trainer: Any, given: dict[str, Any], log_dir: Any, seed: int | None) -> Engine:
        """The engine of a trainer that gets these arguments; `given` are those of Keras's `compile`."""
        strategy = strategies.running()  # raises an error before a model is compiled
        warnings = Warnings()
        objective = Objective(trainer.model, given, warnings)
        roots = {"metrics": objective.compiled} if objective.is_used else {}
        runner = StepRunner(trainer, objective, Variables(trainer, roots), warnings, strategy)
        # Absolute, because the program may change its working directory.
        path, workers = None if log_dir is None else local_path("log_dir", log_dir).absolute(), Workers(strategy)
        is_seeded, folder = seed is not None, RunFolder(path, workers.is_chief)
        if seed is None:  # as `random` would give it now; what the program draws later does not depend on the trainer
            source = random.Random()
            source.setstate(random.getstate())
            seed = source.randint(1, 10**9)
        return cls(runner, RunState(workers.of_chief(lambda: seed)), folder, is_seeded, workers)

    def batches(self, name: str, *data: Any, **options: Any) -> Batches:
        """The batches of data as users pass it: see `from_arguments`."""
        options |= {"seed": self.state.seed, "strategy": self.runner.strategy, "workers": self.workers.number}
        batches = from_arguments(name, *data, **options)
        self.workers.require_same(f"`{name}`", lambda: {**batches.described, "checksum": checksum(batches.arrays)})
        return batches

    def run(
        self,
        kind: str,
        batches: Batches,
        progress: Progress,
        callbacks: keras.callbacks.CallbackList,
        iterate: Callable[[], Any] | None = None,
        folder: str | None = None,
        between: Callable[[int], int | None] = lambda done: None,
        take_outputs: Callable[[Any, Any], Any] = lambda batch, outputs: None,
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Runs a pass from where `progress` is to its end.

        Args:
            kind: "train", "test" or "predict".
            batches: The data.
            progress: Is advanced.
            callbacks: Their hooks for batches are called for each step, once the graph call has returned.
            iterate: Returns the iterator of `batches` to read; by default a new one.
            folder: That of the event file for the values of each step; None writes none.
            between: Called before the first graph call and after each, with the number of batches done; returns
                how many steps the next call may run, or None for any number.
            take_outputs: Called with each batch and the outputs of its prediction; returns the outputs for callbacks.

        Returns:
            The values of the pass as Keras logs them, and those of the parts of the loss.

        Raises:
            Fault: A step had a fault; everything before it is counted and written.
            ValueError: The data has no batch.
        """
        held: list[Any] = [batches.iterate(0) if iterate is None else iterate()]
        step = self.tracer.compiled(kind, held[0].element_spec)
        hooks = hooked_to_batches(callbacks.callbacks, kind)
        may_freeze = any(not getattr(hook, "stateless", False) for hook in hooks)
        pace = Pace(1 if kind == "predict" else self._pace(hooks), start=step.pace)
        skipped = 0
        most = between(progress.batches)
        while not self.is_over(kind, batches, progress):
            done = progress.batches
            left = None if batches.steps is None else batches.steps - done
            asked = int(self.workers.each(pace.next(*(n for n in (left, most) if n is not None))).min())
            if asked == 1:  # with more, these hooks are called when the call has returned
                with self.costs.of("callbacks"):
                    begin_batch(kind, hooks, done)
            if may_freeze and not step.eager:
                step = self.tracer.compiled(kind, step.element_spec)
            started = time.time()
            logs, sound, stops = self.advance(kind, step, held[0], asked, progress, folder)
            pace.took(logs.done, time.time() - started)
            step.pace = pace.steps
            if logs.outputs is not None:
                outputs = tf.nest.map_structure(self.gathered, logs.outputs)
                logs = sound = logs._replace(outputs=take_outputs(logs.batch.get_value(), outputs))
            if hooks:
                with self.costs.of("callbacks"), self.metrics.visible(step, hooks):
                    end_batches(kind, hooks, self.shown(step, sound), done, starts=asked > 1)
            if stops:
                raise self.fault(kind, batches.name, progress, logs)
            skipped += int((logs.faults != 0).sum())
            progress.ended = logs.done < asked and not bool(logs.batch.has_value())
            if progress.ended and progress.batches and batches.steps is not None:
                warn(f"The data ended after {progress.batches} of {batches.steps} batches.")
            most = between(progress.batches)

        # In a thread, because an iterator that ends may wait for one of its own threads, for tenths of a second.
        threading.Thread(target=held.clear).start()
        if skipped:
            warn(f"{skipped} of {progress.batches} steps were skipped: their loss or gradients were not finite.")
        if not progress.batches:
            raise NoBatchError(f"The data for `{kind}_step` has no batch: it ended at once. Pass at least one.")
        results = self.metrics.results(kind, step, progress)
        parts = {name: results.pop(name) for name in step.meaning.parts if name in results}
        return step.meaning.whole(results), parts

    def evaluate(
        self,
        batches: Batches,
        callbacks: keras.callbacks.CallbackList,
        folder: str | None = None,
        between: Callable[[int], int | None] = lambda done: None,
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Runs an evaluation, and leaves all variables as they were: its values, and those of the parts of the loss."""
        step = self.tracer.compiled("test", batches.element_spec)
        with self.workers.needed(), self.metrics.unchanged(step), batches.reading():
            self.metrics.reset(step.copies)
            self.runner.trainer.stop_evaluating = False
            callbacks.on_test_begin()
            results, parts = self.run("test", batches, Progress(), callbacks, None, folder, between)
            with self.metrics.visible(step, callbacks.callbacks, results.get("loss")):
                callbacks.on_test_end(results)
        return results, parts

    def predict(self, batches: Batches, callbacks: keras.callbacks.CallbackList) -> list[Any]:
        """Runs a prediction, and leaves all variables as they were: the outputs of each batch."""
        is_default = not overrides(self.runner.trainer, "predict_step")
        outputs: list[Any] = []

        def take(batch: Any, rows: Any) -> Any:
            if is_default and self.runner.strategy.num_replicas_in_sync == 1:
                x, signature = (step_checks.parts(part)[:1] for part in (batch, batches.element_spec))
                step_checks.rows(examples(x, signature=signature), rows)
            outputs.append(rows)
            return rows

        step = self.tracer.compiled("predict", batches.element_spec)
        with self.workers.needed(), self.metrics.unchanged(step), batches.reading():
            self.runner.trainer.stop_predicting = False
            callbacks.on_predict_begin()
            self.run("predict", batches, Progress(), callbacks, take_outputs=take)
            callbacks.on_predict_end()
        return outputs

    def advance(
        self, kind: str, step: Any, iterator: Any, steps: int, progress: Progress, folder: str | None
    ) -> tuple[CallLogs, CallLogs, bool]:
        """Runs one graph call of up to `steps` steps, counts them, and writes their values.

        Returns:
            Its logs, those of the steps that count, and whether a fault in the last step ends the pass. Such a step
            does not count, and no callback sees it.
        """
        started = time.time()
        with self.costs.of("steps"):
            logs = self._call(kind, step, iterator, steps, progress)
        self.costs.waited(logs.waited)
        progress.faults, stops = logs.faults_in_a_row(progress.faults, self.runner.trainer.skip_nonfinite)
        sound = logs.first(logs.done - 1) if stops else logs
        with self.costs.of("logging"):
            self._count(kind, step, progress, sound, folder, started)
        return logs, sound, stops

    def shown(self, step: Any, logs: CallLogs) -> list[dict[str, Any]]:
        """The values of each step that callbacks and users see."""
        hidden = step.meaning.rates | step.meaning.parts
        columns = {name: values.tolist() for name, values in _without(hidden, logs.scalars).items()}
        outputs = {} if logs.outputs is None else {"outputs": logs.outputs}
        rows = ({name: column[i] for name, column in columns.items()} for i in range(logs.done))
        return [step.meaning.whole(row) | outputs for row in rows]

    def _call(self, kind: str, step: Any, iterator: Any, asked: int, progress: Progress) -> CallLogs:
        """One graph call of up to `asked` steps."""
        first = 1 + (self.state.steps if kind == "train" else progress.batches)
        try:
            with self.runner.eager_lock if step.eager else contextlib.nullcontext():
                logs = step(iterator, asked, first)
        except BaseException as error:
            self.runner.batch_metrics.reset()  # the step may not have ended
            raise_own(error)
            raise_if_stateful(error, self.runner.variables.layers())
            raise
        if kind == "train" and logs.done:
            self.runner.objective.check_loss(logs.scalars)
        self.runner.warnings.give()
        return logs

    def is_over(self, kind: str, batches: Batches, progress: Progress) -> bool:
        """Whether a pass has reached its end."""
        if progress.ended or (batches.steps is not None and progress.batches >= batches.steps):
            return True
        return progress.batches > 0 and self.stops(kind)  # as in Keras

    def stops(self, kind: str) -> bool:
        """Whether a callback, on any worker, has ended such a pass."""
        name, trainer = _STOPS[kind], self.runner.trainer
        setattr(trainer, name, self.workers.any(getattr(trainer, name, False)))
        return bool(getattr(trainer, name))

    def _pace(self, hooks: Sequence[keras.callbacks.Callback]) -> int | str:
        trainer = self.runner.trainer
        if trainer.steps_per_execution != "auto":
            return trainer.steps_per_execution
        return "auto" if not trainer.run_eagerly and all(getattr(hook, "async_safe", False) for hook in hooks) else 1

    def _count(
        self, kind: str, step: Any, progress: Progress, logs: CallLogs, folder: str | None, started: float
    ) -> None:
        """Adds the steps of a graph call to the means, the counters and the event file."""
        state, sound = self.state, logs.faults == 0
        progress.means.add(logs.weights * sound, _without(step.meaning.rates, logs.scalars))
        progress.batches += logs.done
        before = state.steps if kind == "train" else state.test_steps  # validation has a count of its own
        if folder is not None:
            self.folder.events.steps(folder, 1 + before, {f"batch_{n}": v for n, v in logs.scalars.items()}, started)
            for index, name, files in logs.images:
                self.folder.events.images(folder, 1 + before + index, {name: files})
        if kind == "train":
            self.folder.events.graph("train", step.graph)
            state.steps += logs.done
            state.skipped_steps += int((~sound).sum())
        elif folder is not None:
            state.test_steps += logs.done

    def fault(self, kind: str, name: str, progress: Progress, logs: CallLogs) -> Fault:
        """The fault of the last step of a graph call."""
        x, y, sample_weight = unpack(tf.nest.map_structure(self.gathered, logs.batch.get_value()))
        losses = {name: float(values[-1]) for name, values in logs.scalars.items() if "loss" in name}
        code = int(logs.faults[-1])
        batch = {name: x, "y": y, "sample_weight": sample_weight}
        return Fault(code, self.runner.guard.message(code), kind, progress.batches + 1, batch, losses)

    def gathered(self, value: Any) -> Any:
        """The rows of all replicas, in order."""
        return joined(*self.workers.of_all(joined(*self.runner.strategy.experimental_local_results(value))))


def _without(names: Collection[str], values: Mapping[str, T]) -> dict[str, T]:
    """The values with other names."""
    return {name: value for name, value in values.items() if name not in names}
