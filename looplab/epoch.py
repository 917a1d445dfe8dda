"""One pass over data: an epoch of training, or an evaluation, as one graph call after another."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import keras
import tensorflow as tf

from looplab import data
from looplab.arrays import unpack
from looplab.callbacks import hooked_to_batches
from looplab.errors import raise_own
from looplab.fits import Fits
from looplab.guard import Fault
from looplab.loop import CallLogs, Loop, Pace
from looplab.metrics import Means
from looplab.tracing import Traces
from looplab.tracking import of_each_replica, plain, to_numpy
from looplab.warn import warn

T = TypeVar("T")


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
        self._fits = Fits(self.log_dir)
        self._eager_steps = threading.RLock()  # where Python runs steps, evaluations use the variables themselves

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
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Runs an epoch of training, or one evaluation, from where `progress` is to its end.

        Returns:
            Its values as Keras logs them, and those of the parts of the loss.

        Args:
            between: Called before each graph call, with how many batches are done, and returns how many steps that
                may do at most.
        """
        hooks = hooked_to_batches(callbacks.callbacks, kind)
        watches = any(not getattr(hook, "stateless", False) for hook in hooks)
        pace = Pace(self._pace(hooks))
        skipped = 0
        most = between(progress.done)
        while not self._is_over(kind, batches, progress):
            done = progress.done
            asked = pace.next(*(left for left in (batches.steps and batches.steps - done, most) if left is not None))
            began = time.time()
            if asked == 1:
                for hook in hooks:
                    getattr(hook, f"on_{kind}_batch_begin")(done, {})
            if watches and not loop.eager:  # a callback may have frozen a layer
                loop = self._prepared(kind, loop.element_spec, loop.eager)
            with self._eagerly() if loop.eager else contextlib.nullcontext():
                first = 1 + (self.steps if kind == "train" else done)
                try:
                    logs = loop(iterator, asked, first, progress.in_a_row, self.skip_nonfinite)
                except BaseException as error:
                    self._batch_metrics.reset()  # a step may not have ended
                    raise_own(error)
                    raise
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
                hidden = loop.meaning.rates | loop.meaning.parts
                with self._shown(loop, hooks):
                    self._replay(kind, hooks, told, done, hidden, begin=asked > 1)
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
        results = self._results(kind, loop, progress.means)
        parts = {name: results.pop(name) for name in loop.meaning.parts if name in results}
        return results, parts

    def _take_over(self, saved: dict[str, Any]) -> None:
        """Brings the counters to what they were in a saved state."""
        self.steps, self.epochs, self._test_steps = saved["steps"], saved["epochs"], saved["test_steps"]
        self.skipped_steps = saved["skipped_steps"]
        self._fits.take_over(saved["fit"], saved["fits_bytes"])

    def _is_over(self, kind: str, batches: data.Batches, progress: Progress) -> bool:
        """Whether a pass has come to its end."""
        if progress.ended or (batches.steps is not None and progress.done >= batches.steps):
            return True
        return kind == "train" and bool(self.stop_training) and progress.done > 0  # as in Keras, after a first call

    def _count(self, kind: str, loop: Loop, progress: Progress, logs: CallLogs, folder: str | None, began: float):
        """Enters what a graph call told into the means, the counters, and the event files."""
        clean = logs.faults == 0
        progress.means.add(logs.weights * clean, without(loop.meaning.rates, logs.scalars))
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
        x, y, sample_weight = unpack(rows)
        parts = {name: float(values[-1]) for name, values in logs.scalars.items() if "loss" in name}
        code = int(logs.faults[-1])
        batch = {name: x, "y": y, "sample_weight": sample_weight}
        return Fault(code, self._guard.message(code), kind, progress.done + 1, batch, parts)

    def _results(self, kind: str, loop: Loop, means: Means) -> dict[str, float]:
        """The values of a pass, parts of the loss too: the results of metrics, and means of all else."""
        sources = loop.meaning.sources
        metrics = {id(source.metric): source.metric for source in sources.values()}
        with self._eager_steps, self._in_scope(loop):
            outcomes = {key: metric.result() for key, metric in metrics.items()}
            results = {name: float(source.of(outcomes[id(source.metric)])) for name, source in sources.items()}
        results = {name: results.get(name, mean) for name, mean in means.result().items()}
        keras_mean = self._compiled.metrics[0]
        if kind == "train" and "loss" in results and keras_mean not in self._batch_metrics.updated[kind]:
            keras_mean.update_state(results["loss"])  # for callbacks that look it up among the metrics
        return results

    def _pace(self, hooks: Sequence[keras.callbacks.Callback]) -> int | str:
        if self.steps_per_execution != "auto":
            return self.steps_per_execution
        return "auto" if not self.run_eagerly and all(getattr(hook, "async_safe", False) for hook in hooks) else 1

    def _replay(
        self, kind: str, hooks: Sequence[Any], logs: CallLogs, first: int, hidden: Collection[str], begin: bool
    ) -> None:
        """Calls the hooks for each step that a graph call did, with the values of that step."""
        columns = {n: v.tolist() for n, v in logs.scalars.items() if n not in hidden}
        for index in range(logs.done):
            values = {name: column[index] for name, column in columns.items()}
            for hook in hooks:
                if begin:
                    getattr(hook, f"on_{kind}_batch_begin")(first + index, {})
                getattr(hook, f"on_{kind}_batch_end")(first + index, values)

    def _evaluate(
        self,
        batches: data.Batches,
        callbacks: Any,
        folder: str | None = None,
        between: Callable[[int], int | None] = lambda done: None,
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The values over all the data, and those of the parts of the loss."""
        loop = self._prepared("test", batches.element_spec, self.run_eagerly)
        with self._reading_only(loop):
            callbacks.on_test_begin()
            iterator = batches.iterate(0)
            results, parts = self._run("test", loop, iterator, batches, Progress(), callbacks, folder, between)
            with self._shown(loop, callbacks.callbacks, results.get("loss")):
                callbacks.on_test_end(results)
        return results, parts

    @contextlib.contextmanager
    def _reading_only(self, loop: Loop) -> Iterator[None]:
        """Within it an evaluation runs, whose metrics start afresh; afterwards all variables are as they were."""
        if loop.eager:
            with self._undisturbed():
                self._reset_metrics()
                yield
            return
        with loop.copies.lock:
            before = [to_numpy(copy) for _, copy in loop.copies.pairs]  # of an evaluation that this one is within
            loop.copies.refresh()
            with keras.StatelessScope() as fresh:
                self._reset_metrics()
            for variable in self._metric_variables():
                value = fresh.get_current_value(variable)
                for part in of_each_replica(variable).values():
                    copy = loop.copies.of(part)
                    if copy is not None and value is not None:
                        copy.assign(value)
            try:
                yield
            finally:
                for (_, copy), value in zip(loop.copies.pairs, before, strict=True):
                    copy.assign(value)

    @contextlib.contextmanager
    def _eagerly(self) -> Iterator[None]:
        """Within it, this thread runs steps line by line, and no other thread evaluates or predicts so."""
        with self._eager_steps, self._recording():
            yield

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Afterwards each variable is as it was before; meanwhile no other thread runs a step line by line."""
        with self._eager_steps:
            kept = [(variable, to_numpy(variable)) for variable in self._changeable()]
            try:
                yield
            finally:
                for variable, value in kept:
                    variable.assign(value)
                known = {id(plain(variable)) for variable, _ in kept}
                for metric in self.metrics:  # those that were built within
                    if any(id(plain(variable)) not in known for variable in metric.variables):
                        metric.reset_state()

    def _in_scope(self, loop: Loop) -> contextlib.AbstractContextManager:
        """Within it, in this thread, metrics are what the loop's pass made of them."""
        if self.strategy.num_replicas_in_sync > 1:  # one value of several copies: the metric knows which
            return self._shown(loop, [self])
        copies = [(variable, loop.copies.of(variable)) for variable in self._metric_variables()]
        return keras.StatelessScope([(v, tf.convert_to_tensor(copy)) for v, copy in copies if copy is not None])

    @contextlib.contextmanager
    def _shown(self, loop: Loop, viewers: Sequence[Any], loss: float | None = None) -> Iterator[None]:
        """Within it, metrics are what the loop's pass made of them, for callbacks that look at them."""
        shown: list[tuple[Any, Any]] = []
        is_watched = any(not getattr(viewer, "stateless", False) for viewer in viewers)
        if is_watched:
            parts = [part for v in self._metric_variables() for part in of_each_replica(v).values()]
            shown = [(part, copy) for part in parts if (copy := loop.copies.of(part)) is not None]
        mean = self._compiled.metrics[0]
        kept = [(variable, to_numpy(variable)) for variable, _ in shown]
        if is_watched and loss is not None and mean not in self._batch_metrics.updated["test"]:
            kept += [(variable, to_numpy(variable)) for variable in mean.variables]
            mean.reset_state()
            mean.update_state(loss)
        for variable, copy in shown:
            variable.assign(copy)
        try:
            yield
        finally:
            for variable, value in kept:
                variable.assign(value)

    def _metric_variables(self) -> list[Any]:
        return [variable for metric in self.metrics for variable in metric.variables]

    def _reset_metrics(self) -> None:
        with self._eager_steps:
            for metric in self.metrics:
                metric.reset_state()

    def _gathered(self, value: Any) -> Any:
        """All replicas' rows, in order."""
        return joined(*self.strategy.experimental_local_results(value))


def without(names: Collection[str], values: Mapping[str, T]) -> dict[str, T]:
    """The values of all other names."""
    return {name: value for name, value in values.items() if name not in names}


def joined(*parts: Any) -> Any:
    """The rows of all parts as one array, or as a `tf.RaggedTensor` where they are of several lengths."""
    shapes = [tuple(part.shape) for part in parts]
    if len({shape[1:] for shape in shapes}) > 1 and not any(isinstance(part, tf.RaggedTensor) for part in parts):
        if len({*map(len, shapes)}) > 1:
            raise ValueError(f"`predict_step` must return outputs of one rank; shapes {shapes[:5]} came.")
        lengths = [{*sizes} for sizes in zip(*shapes, strict=True)]
        ragged = max(axis for axis, sizes in enumerate(lengths) if axis > 0 and len(sizes) > 1)
        parts = tuple(tf.RaggedTensor.from_tensor(part, ragged_rank=ragged) for part in parts)
    whole = tf.concat(parts, 0)
    return whole.numpy() if isinstance(whole, tf.Tensor) else whole
