"""One pass over data: an epoch of training, or an evaluation, as one graph call after another."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from looplab import data
from looplab.callbacks import hooked_to_batches
from looplab.guard import Fault
from looplab.log import Logs
from looplab.loop import CallLogs, Loop, Pace
from looplab.metrics import Means, named_result
from looplab.steps import LEARNING_RATE
from looplab.tracking import of_each_replica, to_numpy


@dataclasses.dataclass
class Progress:
    """How far a pass has come."""

    done: int = 0
    """Batches."""
    ended: bool = False
    """Whether the data has no more."""
    means: Means = dataclasses.field(default_factory=Means)
    """Of what the steps returned."""


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A trace, and what it holds fast."""

    key: Any
    element_spec: Any
    call: Any
    trained: list[Any]


class Epochs(Logs):
    """Traces steps, and runs them over data."""

    def __init__(self, *arguments: Any, steps_per_execution: int | str, jit_compile: bool, run_eagerly: bool):
        super().__init__(*arguments)
        self.steps_per_execution = steps_per_execution
        self.jit_compile = jit_compile
        self.run_eagerly = run_eagerly
        self.stop_training = False
        self.steps = 0
        self.skip_nonfinite = 0
        self.skipped_steps = 0
        self._test_steps = 0
        self._traced: list[_Traced] = []
        self._signatures: dict[str, list[Any]] = {"train": [], "test": [], "predict": []}
        self._stray_variables = _Hidden([])
        self._stop = _Hidden(tf.Variable(False, trainable=False, name="stop"))

    # Traces.

    def _prepared(self, kind: str, element_spec: Any, eagerly: bool) -> Loop:
        """The loop of a kind of step, "train" or "test", for data of this signature; all variables are made then."""

        def make() -> Loop:
            step = functools.partial(self._run_step, kind, {"train": self.train_step, "test": self.test_step}[kind])
            if kind == "train":
                self._stray_variables = _Hidden([])
            metrics = None
            while metrics != self.metrics:  # those that a trace makes are seen by the next alone
                metrics = self.metrics
                with self._recording():
                    loop = Loop(
                        step,
                        element_spec,
                        self._image_every[kind],
                        self.strategy,
                        self._untrained if kind == "train" else list,
                        self._guard.forget,
                        self._stop.value,
                        self.jit_compile,
                        eagerly,
                    )
            if kind == "train":
                self._find_strays(loop)
            return loop

        return self._traced_once(kind, (self.jit_compile, eagerly), element_spec, make)

    def _predictor(self, element_spec: Any) -> Callable[[Any], Any]:
        """The prediction step for data of this signature, traced, so that all variables are made."""

        def one_batch(batch):
            return self.strategy.run(self._predict, (batch,))

        def make() -> Callable[[Any], Any]:
            if self.run_eagerly:
                return one_batch
            return tf.function(one_batch, jit_compile=self.jit_compile or None).get_concrete_function(element_spec)

        return self._traced_once("predict", (self.jit_compile, self.run_eagerly), element_spec, make)

    def _traced_once(self, kind: str, options: Any, element_spec: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns: made anew for other options or data, or when what it holds fast was exchanged."""
        trained = [*map(id, self._trained())]
        self._traced = [known for known in self._traced if [*map(id, known.trained)] == trained]
        for known in self._traced:
            if known.key == (kind, options) and known.element_spec == element_spec:
                return known.call
        self._warn_of_retraces(kind, element_spec)
        call = make()
        self._traced.append(_Traced((kind, options), element_spec, call, self._trained()))
        return call

    def _find_strays(self, loop: Loop) -> None:
        """Finds what a training step changes and the trainer does not hold.

        That of Keras's own seeds, which a bare `keras.random.normal(shape)` draws from, can be saved; that of
        TensorFlow's stateful random operations cannot.
        """
        if self.strategy.num_replicas_in_sync > 1:
            return  # there the graph has other variables, the replicas' own
        internal = {id(variable) for variable in (*self._guard.variables, *self._batch_metrics.variables)}
        self._stray_variables = _Hidden([v for v in loop.variables if not v.trainable and id(v) not in internal])
        if self.log_dir is not None and loop.graph is not None and (found := data.random_operations(loop.graph)):
            self._doubts.setdefault(
                f"`train_step` has random numbers that no checkpoint can bring back ({', '.join(found)}): after a "
                f"resume they are others. Use `keras.random` with `seed=self.seed_generator`, or a layer's own "
                f"`keras.random.SeedGenerator`.",
                False,
            )

    def _strays(self) -> list[tf.Variable]:
        known = {id(variable) for optimizer in self.optimizers.values() for variable in _values(optimizer.variables)}
        return [v for v in self._stray_variables.value if id(v) not in known]

    def _warn_of_retraces(self, kind: str, element_spec: Any) -> None:
        """Once, at the third trace: a step is traced for the training's data, and it may be for one other."""
        seen = self._signatures[kind]
        if element_spec not in seen:
            seen.append(element_spec)
        if len(seen) == 3:
            changes = data.changes(seen[-2], element_spec)
            warnings.warn(
                f"`{kind}_step` is traced for the third time, which takes seconds each time: {changes}. Give all "
                f"batches the same dtypes and shapes, with None where they differ: `drop_remainder=False` leaves "
                f"it, and `padded_batch` brings rows of several lengths to one.",
                stacklevel=4,
            )

    def _trained(self) -> list[Any]:
        """What a trace holds fast, and a user may exchange between two calls of `fit`."""
        return [*self.trainable_variables, *self.optimizers.values()]

    # Passes.

    def _run(
        self,
        kind: str,
        loop: Loop,
        iterator: Iterator,
        batches: data.Batches,
        progress: Progress,
        callbacks: Any,
        folder: str | None,
        between: Callable[[int], int | None] = lambda done: None,
    ) -> dict[str, float]:
        """Runs an epoch of training, or one evaluation, from where `progress` is to its end; and returns its logs.

        Args:
            between: Called before each graph call, with how many batches are done, and returns how many steps that
                may do at most.
        """
        hooks = hooked_to_batches(callbacks.callbacks, kind)
        pace = Pace(self._pace(hooks))
        in_a_row = 0
        most = between(progress.done)
        while not progress.ended and (batches.steps is None or progress.done < batches.steps):
            done = progress.done
            asked = pace.next(*(left for left in (batches.steps and batches.steps - done, most) if left is not None))
            began = time.time()
            if asked == 1:
                for hook in hooks:
                    getattr(hook, f"on_{kind}_batch_begin")(done)
            with self._recording() if loop.eager else contextlib.nullcontext():
                first = 1 + (self.steps if kind == "train" else done)
                logs = loop(iterator, asked, first, in_a_row, self.skip_nonfinite)
            pace.took(logs.done, time.time() - began)
            if kind == "train" and logs.done and logs.scalars.get(self._bounded, [0])[0] > 1:
                self._doubts.setdefault(
                    "The outputs are all from 0 to 1, and the targets go beyond: scale them, such as images by 1/255.",
                    False,
                )
            self._tell_doubts()
            clean = logs.faults == 0
            in_a_row = int(clean[::-1].argmax()) if clean.any() else in_a_row + logs.done
            stopped = logs.done > 0 and (logs.faults[-1] < 0 or in_a_row > self.skip_nonfinite)
            told = logs.first(logs.done - 1) if stopped else logs
            self._count(kind, loop, progress, told, folder, began)
            if hooks:
                self._replay(kind, hooks, told, done, begin=asked > 1)
            if stopped:
                raise self._fault(kind, batches.name, progress, logs)
            progress.ended = logs.done < asked and not bool(logs.batch.has_value())
            if progress.ended and batches.steps is not None:
                warnings.warn(f"The data ended after {progress.done} of {batches.steps} batches.", stacklevel=3)
            most = between(progress.done)
            if kind == "train" and self.stop_training:
                break
        if not progress.done:
            raise ValueError(f"The data for `{kind}_step` has no batch: it ended at once. Pass at least one.")
        return self._results(kind, progress.means)

    def _tell_doubts(self) -> None:
        """Warns of what looks wrong and may be meant, once."""
        for doubt, told in self._doubts.items():
            if not told:
                self._doubts[doubt] = True
                warnings.warn(doubt, stacklevel=5)

    def _count(self, kind: str, loop: Loop, progress: Progress, logs: CallLogs, folder: str | None, began: float):
        """Enters what a graph call told into the means, the counters, and the event files."""
        clean = logs.faults == 0
        progress.means.add(logs.weights * clean, logs.scalars)
        progress.done += logs.done
        before = self.steps if kind == "train" else self._test_steps
        if folder is not None:  # validation has a count of its own, which goes on rising
            self._events.steps(folder, 1 + before, {f"batch_{n}": values for n, values in logs.scalars.items()}, began)
            for index, name, files in logs.images:
                self._events.images(folder, 1 + before + index, {name: files})
        if kind == "train":
            self._events.graph("train", loop.graph)
            self.steps += logs.done
            self.skipped_steps += int((~clean).sum())
        elif folder is not None:
            self._test_steps += logs.done

    def _fault(self, kind: str, name: str, progress: Progress, logs: CallLogs) -> Fault:
        """What ends the pass: the last step of a graph call."""
        rows = tf.nest.map_structure(self._gathered, logs.batch.get_value())
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(rows)
        parts = {name: float(values[-1]) for name, values in logs.scalars.items() if "loss" in name}
        code = int(logs.faults[-1])
        batch = {name: x, "y": y, "sample_weight": sample_weight}
        return Fault(code, self._guard.message(code), kind, progress.done + 1, batch, parts)

    def _results(self, kind: str, means: Means) -> dict[str, float]:
        """The logs of a pass: the result of each metric that was updated, and the means of other values."""
        tracked: dict[str, Any] = {}
        unweighed = self._output_losses()  # Keras's means of these take a ragged last batch for a whole one
        for metric in self._batch_metrics.updated[kind].values():
            if metric not in unweighed:
                tracked |= named_result(metric)
        logged = {name: mean for name, mean in means.result().items() if not name.startswith(LEARNING_RATE)}
        results = {name: float(tracked.get(name, mean)) for name, mean in logged.items()}
        keras_mean = self._compiled.metrics[0]
        if "loss" in results and keras_mean not in self._batch_metrics.updated[kind].values():
            keras_mean.update_state(results["loss"])  # for callbacks that look it up among the metrics
        return results

    def _pace(self, hooks: Sequence[keras.callbacks.Callback]) -> int | str:
        if self.steps_per_execution != "auto":
            return self.steps_per_execution
        return "auto" if not self.run_eagerly and all(getattr(hook, "async_safe", False) for hook in hooks) else 1

    def _replay(self, kind: str, hooks: Sequence[Any], logs: CallLogs, first: int, begin: bool) -> None:
        """Calls the hooks for each step that a graph call did, with the values of that step."""
        columns = {n: v.tolist() for n, v in logs.scalars.items() if not n.startswith(LEARNING_RATE)}
        for index in range(logs.done):
            values = {name: column[index] for name, column in columns.items()}
            for hook in hooks:
                if begin:
                    getattr(hook, f"on_{kind}_batch_begin")(first + index)
                getattr(hook, f"on_{kind}_batch_end")(first + index, values)

    def _evaluate(
        self,
        batches: data.Batches,
        callbacks: Any,
        folder: str | None = None,
        between: Callable[[int], int | None] = lambda done: None,
    ) -> dict[str, float]:
        loop = self._prepared("test", batches.element_spec, self.run_eagerly)
        with self._undisturbed():
            self._reset_metrics()
            callbacks.on_test_begin()
            logs = self._run("test", loop, iter(batches.start(0)), batches, Progress(), callbacks, folder, between)
            callbacks.on_test_end(logs)
        return logs

    def _untrained(self) -> list[Any]:
        """Each variable that no optimizer changes: metrics, seeds, moving means; of several replicas, each one's."""
        trained = {id(variable) for variable in self.trainable_variables}
        whole = (variable for variable in self._state() if id(variable) not in trained)
        return [part for variable in whole for part in of_each_replica(variable).values()]

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Afterwards each variable that is not trained is as it was before."""
        kept = [(variable, to_numpy(variable)) for variable in self._untrained()]
        try:
            yield
        finally:
            for variable, value in kept:
                variable.assign(value)

    def _reset_metrics(self) -> None:
        for metric in self.metrics:
            metric.reset_state()

    def _gathered(self, value: Any) -> Any:
        """All replicas' rows, in order."""
        return joined(*self.strategy.experimental_local_results(value))


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """Keeps what an attribute leads to from being found as the trainer's own."""

    value: Any


def _values(variables: list[Any]) -> list[tf.Variable]:
    return [variable.value if isinstance(variable, keras.Variable) else variable for variable in variables]


def joined(*parts: Any) -> Any:
    """The rows of all parts as one array, or as one `tf.RaggedTensor`."""
    whole = tf.concat(parts, 0)
    return whole.numpy() if isinstance(whole, tf.Tensor) else whole
