"""Turns one step into one graph call of up to K steps that returns the logs of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from looplab.graphs import Copies, captured, releasable, trace, written_variables
from looplab.metrics import Source


class Meaning(NamedTuple):
    """What the scalars of a step are, by their names."""

    sources: Mapping[str, Source]
    """The metric, and the entry of its result, that a scalar is."""
    rates: frozenset[str]
    """Learning rates, which are for TensorBoard alone."""
    parts: frozenset[str]
    """Parts of the loss, which are for TensorBoard alone."""


class StepLogs(NamedTuple):
    """What one replica tells of its part of a batch."""

    scalars: dict[str, tf.Tensor]
    """Scalars of any numeric dtype, by name."""
    images: dict[str, tf.Tensor]
    """uint8 images of shape (n, height, width, channels), by name."""
    fault: Any = 0
    """int32: 0, or what was wrong, for which the step did not update what it trains; see `Guard`."""
    weight: Any = 1
    """How many examples the replica has."""
    meaning: Meaning = Meaning({}, frozenset(), frozenset())


class CallLogs(NamedTuple):
    """What one graph call tells of the steps that it did."""

    done: int
    """How many steps were done: fewer than asked for where the data ended, a fault came, or `stop` was set."""
    weights: np.ndarray
    """float64, shape (done,): how many examples each step's batch had."""
    scalars: dict[str, np.ndarray]
    """float64, shape (done,), by name: wide enough to hold each float32 and int32 exactly."""
    images: list[tuple[int, str, list[bytes]]]
    """(index of the step in this call, name, PNG files)."""
    faults: np.ndarray
    """int, shape (done,): 0, or what was wrong with each step."""
    batch: Any
    """The optional that holds the last step's batch, or the end of the data."""

    def first(self, steps: int) -> CallLogs:
        """Those of the first steps alone."""
        scalars = {name: values[:steps] for name, values in self.scalars.items()}
        images = [image for image in self.images if image[0] < steps]
        return CallLogs(steps, self.weights[:steps], scalars, images, self.faults[:steps], self.batch)


class Loop:
    """`step(batch, number)` as a graph call that does up to K steps and returns the logs of each.

    The step is traced once, when the loop is made, and called from a `while` loop in the graph. There K is a tensor:
    one trace serves every K, and every K gives the same bits. Making a loop makes all variables that the step makes,
    and runs nothing.

    Args:
        step: What one replica does with its part of a batch: `step(batch, number) -> StepLogs`, where `number` counts
            the steps from 1 (int64 scalar).
        element_spec: The signature of a batch, as `tf.data` tells it.
        image_every: For each image's name, n: it is kept at the steps 1, 1 + n, 1 + 2n, … Filled by `step`.
        strategy: Where the step runs. The replicas' scalars are averaged, weighed by the examples that each had.
        state: Tells, before a step, the variables that are kept as they were then.
        changed: Tells, after it, the variables that it may have changed: where it had a fault, they are brought back.
        forget: Called in the graph when that is done.
        stop: A bool variable: once it is true, the running step is the last.
        jit_compile: Whether XLA compiles the step.
        run_eagerly: Whether Python goes through it line by line, for debugging.
        read_only: Whether the step changes copies of the variables that it would change: see `copies`.
    """

    def __init__(
        self,
        step: Callable[[Any, tf.Tensor], StepLogs],
        element_spec: Any,
        image_every: dict[str, int],
        strategy: tf.distribute.Strategy,
        state: Callable[[], Sequence[Any]] = lambda: (),
        changed: Callable[[], Sequence[Any]] = lambda: (),
        forget: Callable[[], None] = lambda: None,
        stop: tf.Variable | None = None,
        jit_compile: bool = False,
        run_eagerly: bool = False,
        read_only: bool = False,
    ):
        self.element_spec = element_spec
        self._step = step
        self._image_every = image_every
        self._strategy = strategy
        self._state = state
        self._changed = changed
        self.unkept: list[Any] = []
        """Variables that would have to be brought back, and were not kept."""
        self._forget = forget
        self._stop = tf.Variable(False, trainable=False) if stop is None else stop
        self._scalar_names: list[str] = []
        self._image_names: list[str] = []
        self._traced: Callable | None = None
        self.eager = run_eagerly
        if strategy.num_replicas_in_sync > 1:
            self._make_variables()
        self.meaning = Meaning({}, frozenset(), frozenset())
        if not run_eagerly:
            number = tf.TensorSpec((), tf.int64)
            self._one_step = trace(self._whole_step, element_spec, number, jit_compile=jit_compile)
        self.copies = Copies(self._one_step if read_only and not run_eagerly else None)
        """With `read_only`, what the step changes."""

    @property
    def names(self) -> list[str]:
        """Of the scalars that the step tells; where Python goes through it, once it has."""
        return self._scalar_names

    @property
    def written(self) -> list[tf.Variable]:
        """The variables that the graph of one step may change, in the order in which it came to use them."""
        if self.eager:
            return []
        return [original for original, _ in self.copies.pairs] or written_variables(self._one_step)

    @property
    def used(self) -> list[tf.Variable]:
        """The variables that the graph of one step uses, in the order in which it came to use them."""
        return [] if self.eager else captured(self._one_step)

    @property
    def graph(self) -> tf.Graph | None:
        """The graph of one step; None where Python goes through it."""
        return None if self.eager else self._one_step.graph

    def __call__(self, iterator: Iterator, steps: int, first: int, faulty: int = 0, most_faulty: int = 0) -> CallLogs:
        """Does up to `steps` steps on what `iterator` gives.

        Args:
            iterator: Of the batches.
            steps: How many.
            first: The number of the first of them.
            faulty: How many steps before had faults, in a row.
            most_faulty: How many may have in a row: one more is the last.
        """
        whole = (tf.constant(number, tf.int32) for number in (steps, faulty, most_faulty))
        arguments = iterator, tf.constant(first, tf.int64), *whole
        if self.eager:
            rows, pictures, batch = self._call(*arguments)
        else:
            if self._traced is None:
                self._traced = tf.function(self._call).get_concrete_function(*arguments)
            rows, pictures, batch = self._traced(*arguments)
        table = rows.numpy().reshape(-1, 2 + len(self._scalar_names))  # without a step there are no columns
        images = [
            (index, name, tf.io.parse_tensor(cell, tf.string).numpy().tolist())
            for index, row in enumerate(pictures.numpy())
            for name, cell in zip(self._image_names, row, strict=True)
            if cell
        ]
        weights, faults, *columns = table.T
        scalars = dict(zip(self._scalar_names, columns, strict=True))
        return CallLogs(len(table), weights, scalars, images, faults.astype(int), batch)

    def _make_variables(self) -> None:
        """Goes through the step in a graph that is then forgotten; the variables that Keras made remain.

        `tf.function` lets a step make variables, but not variables with a copy on each replica.
        """
        with releasable, tf.__internal__.FuncGraph("variables").as_default():
            one_replica = tf.nest.map_structure(of_one_replica, self.element_spec)
            batch = tf.nest.map_structure(lambda spec: tf.compat.v1.placeholder(spec.dtype, spec.shape), one_replica)
            self._strategy.run(self._step, (batch, tf.constant(1, tf.int64)))

    def _whole_step(self, batch: Any, number: tf.Tensor) -> tuple[tf.Tensor, dict[str, tf.Tensor], Any, tf.Tensor]:
        """One step on all replicas: the count of examples, float64 means weighed by it, images, and the fault."""
        before = {id(variable): tf.convert_to_tensor(variable) for variable in self._state()}

        def replica_step(batch, number):
            logs = self._step(batch, number)
            self._scalar_names, self._image_names = list(logs.scalars), list(logs.images)
            self.meaning = logs.meaning
            # In float64 the product with a count, and the quotient, are exact: one replica's float32 comes back as
            # it was. Sums, because in a ragged last batch a replica may have no rows, and then no mean.
            with tf.name_scope("logs"):
                weight = tf.cast(logs.weight, tf.float64)
                sums = {name: _wide(value) * weight for name, value in logs.scalars.items()}
                sums = {name: tf.where(weight > 0, value, 0) for name, value in sums.items()}
            return weight, sums, logs.images, logs.fault

        try:
            weight, sums, images, fault = self._strategy.run(replica_step, (batch, number))
        except Exception:
            if self.eager:  # what the step changed before it failed
                for variable in self._state():
                    if id(variable) in before:
                        variable.assign(before[id(variable)])
            raise
        with tf.name_scope("logs"):
            total = self._strategy.reduce("SUM", weight, axis=None)
            means = {name: self._strategy.reduce("SUM", value, axis=None) / total for name, value in sums.items()}
            fault = self._worst(fault)
        images = {name: self._strategy.experimental_local_results(value)[0] for name, value in images.items()}

        changed = self._changed()
        self.unkept = [variable for variable in changed if id(variable) not in before]

        def bring_back() -> None:
            for variable in changed:
                if id(variable) in before:
                    variable.assign(before[id(variable)])
            self._forget()

        tf.cond(tf.equal(fault, 0), lambda: None, bring_back)
        return total, means, images, fault

    def _worst(self, codes: Any) -> tf.Tensor:
        """Of the replicas' codes the lowest, if one is negative, else the highest."""
        values = self._strategy.experimental_local_results(codes)
        if len(values) == 1:
            return values[0]
        values = tf.stack(values)
        return tf.where(tf.reduce_any(values < 0), tf.reduce_min(values), tf.reduce_max(values))

    def _call(self, iterator, first, steps, faulty, most_faulty):
        """The loop around the step: a graph call, or stepped through by Python."""
        size = 0 if self.eager else steps
        step = self._whole_step if self.eager else self._one_step
        row_shape = None if self.eager else (2 + len(self._scalar_names),)
        picture_shape = None if self.eager else (len(self._image_names),)
        rows = tf.TensorArray(tf.float64, size, dynamic_size=self.eager, element_shape=row_shape)
        pictures = tf.TensorArray(tf.string, size, dynamic_size=self.eager, element_shape=picture_shape)
        done, goes_on = tf.constant(0), tf.constant(True)
        batch = iterator.get_next_as_optional()
        while goes_on & batch.has_value():
            number = first + tf.cast(done, tf.int64)
            weight, scalars, images, fault = step(batch.get_value(), number)
            values = [weight, _wide(fault), *(scalars[name] for name in self._scalar_names)]
            rows = rows.write(done, tf.stack(values))
            pictures = pictures.write(done, self._encoded(images, number))
            done += 1
            faulty = tf.where(fault > 0, faulty + 1, 0)
            with tf.control_dependencies([fault]):  # else it could be read before the step is done
                stops = tf.convert_to_tensor(self._stop)
            goes_on = (done < steps) & (fault >= 0) & (faulty <= most_faulty) & ~stops
            if goes_on:  # else the next call would miss a batch, and whoever asks for a faulty one
                batch = iterator.get_next_as_optional()
        return rows.stack()[:done], pictures.stack()[:done], batch

    def _encoded(self, images: dict[str, tf.Tensor], number: tf.Tensor) -> tf.Tensor:
        """A string for each image's name: its PNG files where it is due at this step, else ''."""
        cells = []
        for name in self._image_names:
            image = images[name]
            due = tf.equal((number - 1) % self._image_every[name], 0)
            cells.append(tf.cond(due, lambda image=image: tf.io.serialize_tensor(tf.io.encode_png(image)), lambda: ""))
        return tf.stack(cells) if cells else tf.zeros((0,), tf.string)


def of_one_replica(spec: Any) -> Any:
    """The signature of a tensor on the first replica."""
    return spec._value_specs[0] if hasattr(spec, "_value_specs") else spec


def _wide(value: tf.Tensor) -> tf.Tensor:
    return tf.cast(value, tf.float64)


class Pace:
    """How many steps the next graph call does: a given number, or as many as take `seconds`."""

    def __init__(self, steps: int | str, seconds: float = 0.2):
        self._auto = steps == "auto"
        self._seconds = seconds
        self._steps = 1 if self._auto else int(steps)

    def next(self, *left: int) -> int:
        """The number for the next call, at most the given ones."""
        return min([self._steps, *left])

    def took(self, steps: int, seconds: float) -> None:
        """Learns from a call. By ten times at most: what a first call took says nothing of a step."""
        if self._auto and steps:
            self._steps = max(1, min(int(self._seconds * steps / max(seconds, 1e-9)), 10 * self._steps))
