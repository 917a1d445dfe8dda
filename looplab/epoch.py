"""One pass over data: an epoch of training, or an evaluation, as one graph call after another."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from looplab import data
from looplab.callbacks import hooked_to_batches
from looplab.guard import Fault
from looplab.loop import CallLogs, Loop, Pace
from looplab.metrics import Means, named_result
from looplab.steps import LEARNING_RATE
from looplab.tracing import Traces
from looplab.tracking import to_numpy
from looplab.warn import warn


@dataclasses.dataclass
class Progress:
    """How far a pass has come."""

    done: int = 0
    """Batches."""
    ended: bool = False
    """Whether the data has no more."""
    in_a_row: int = 0
    """How many steps were passed over since the last sound one, also in epochs before."""
    means: Means = dataclasses.field(default_factory=Means)
    """Of what the steps returned."""


class Epochs(Traces):
    """Runs steps over data."""

    def __init__(self, *arguments: Any, steps_per_execution: int | str, jit_compile: bool, run_eagerly: bool):
        super().__init__(*arguments, jit_compile=jit_compile, run_eagerly=run_eagerly)
        self.steps_per_execution = steps_per_execution
        self.stop_training = False
        self.steps = 0
        self.skip_nonfinite = 0
        self.skipped_steps = 0
        self._test_steps = 0
        self._finished: list[dict[str, list[float]]] = []  # the history of each `fit` that came to its end

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
        skipped = 0
        most = between(progress.done)
        while not self._is_over(kind, batches, progress):
            done = progress.done
            asked = pace.next(*(left for left in (batches.steps and batches.steps - done, most) if left is not None))
            began = time.time()
            if asked == 1:
                for hook in hooks:
                    getattr(hook, f"on_{kind}_batch_begin")(done)
            with self._recording() if loop.eager else contextlib.nullcontext():
                first = 1 + (self.steps if kind == "train" else done)
                logs = loop(iterator, asked, first, progress.in_a_row, self.skip_nonfinite)
            pace.took(logs.done, time.time() - began)
            if kind == "train" and logs.done and logs.scalars.get(self._bounded, [0])[0] > 1:
                self._doubts.setdefault(
                    "The outputs are all from 0 to 1, and the targets go beyond: scale them, such as images by 1/255.",
                    False,
                )
            self._tell_doubts()
            clean = logs.faults == 0
            in_a_row = int(clean[::-1].argmax()) if clean.any() else progress.in_a_row + logs.done
            stopped = logs.done > 0 and bool(logs.faults[-1] < 0 or in_a_row > self.skip_nonfinite)
            progress.in_a_row = in_a_row - stopped  # the last one is not done
            told = logs.first(logs.done - 1) if stopped else logs
            self._count(kind, loop, progress, told, folder, began)
            if hooks:
                self._replay(kind, hooks, told, done, begin=asked > 1)
            if stopped:
                raise self._fault(kind, batches.name, progress, logs)
            skipped += int((~clean).sum())
            progress.ended = logs.done < asked and not bool(logs.batch.has_value())
            if progress.ended and batches.steps is not None:
                warn(f"The data ended after {progress.done} of {batches.steps} batches.")
            most = between(progress.done)
        if skipped:
            warn(f"{skipped} of {progress.done} steps were passed over: their loss or gradients were not finite.")
        if not progress.done:
            raise ValueError(f"The data for `{kind}_step` has no batch: it ended at once. Pass at least one.")
        return self._results(kind, progress.means)

    def _is_over(self, kind: str, batches: data.Batches, progress: Progress) -> bool:
        """Whether a pass has come to its end."""
        if progress.ended or (batches.steps is not None and progress.done >= batches.steps):
            return True
        return kind == "train" and bool(self.stop_training) and progress.done > 0  # as in Keras, after a first call

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
            logs = self._run("test", loop, batches.iterate(0), batches, Progress(), callbacks, folder, between)
            callbacks.on_test_end(logs)
        return logs

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


def joined(*parts: Any) -> Any:
    """The rows of all parts as one array, or as one `tf.RaggedTensor`."""
    whole = tf.concat(parts, 0)
    return whole.numpy() if isinstance(whole, tf.Tensor) else whole
