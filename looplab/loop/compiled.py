"""Turns one step into one graph call that runs up to K steps and returns the logs of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from looplab.compat import of_one_replica, temporary_graph
from looplab.data.resident import Resident, Single, gather, rows_of
from looplab.loop.call_logs import CallLogs
from looplab.loop.context import recording
from looplab.loop.graphs import Copies, captured, concrete, releasable, trace, written_variables
from looplab.loop.step import Meaning, StepLogs
from looplab.summaries.writer import image_content

_MOST = 1024  # steps in a loop that XLA compiles: it fixes the size of tables


class Compiled:
    """A step as a graph call that runs up to K steps and returns the logs of each.

    The step is traced once, when the object is created, and called from a `while` loop in the graph. There, K is a
    tensor: one trace serves every K, and every K gives the same bits. Creating the object creates all variables that
    the step creates, and runs nothing.

    Args:
        step: What one replica does with its part of a batch.
        element_spec: The signature of a batch, as `tf.data` gives it.
        image_every: By image name, n: an image is written at the steps 1, 1 + n, 1 + 2n, … Filled by `step`.
        strategy: Where the step runs. The replicas' scalars are averaged, weighted by their numbers of examples.
        read_only: Whether the step changes copies of the variables that it would change: see `copies`.
        stop: A bool variable: once it is true, the running step is the last one. None if only the number of steps ends
            a call, because with several workers each would read its own.
        jit_compile: Whether XLA compiles the step, and where it can the loop around it: see `_on_resident`.
        run_eagerly: Whether Python runs the step line by line, for debugging.
    """

    def __init__(
        self,
        step: Callable[[Any], StepLogs],
        element_spec: Any,
        image_every: dict[str, int],
        strategy: tf.distribute.Strategy,
        stop: tf.Variable | None,
        read_only: bool = False,
        jit_compile: bool = False,
        run_eagerly: bool = False,
    ):
        self.element_spec = element_spec
        self.eager = run_eagerly
        self.pace = 1
        """How many steps the last pass ran in its last graph call, where the next one starts."""
        self.meaning = Meaning({}, frozenset(), frozenset())
        """What the scalars are, once the step has run or was traced."""
        self.names: list[str] = []
        """Of the scalars, once the step has run or was traced."""
        self.codes: Sequence[Any] = ()
        """The variables that hold the fault of a step; with replicas, those of each."""
        self.restored: Callable[[], Sequence[Any]] = list
        """Returns the variables that get their values back after a step with a fault, with replicas those of each."""
        self._image_names: list[str] = []
        self._step = step
        self._image_every = image_every
        self._strategy = strategy
        self._stop = stop
        self._jit_compile = jit_compile
        self._traced: Callable | None = None
        self._alone: Callable | None = None
        self._on_arrays: dict[Any, Callable] = {}
        with recording():
            if strategy.num_replicas_in_sync > 1:
                self._create_variables()
            if not run_eagerly:
                self._one_step = trace(self._whole_step, element_spec, jit_compile=jit_compile)
        self.copies = Copies(self._one_step if read_only and not run_eagerly else None)
        """What a step changes that only reads."""

    @property
    def written(self) -> list[tf.Variable]:
        """The variables that the graph of one step may change, in the order in which the step uses them."""
        if self.eager:
            return []
        return [original for original, _ in self.copies.pairs] or written_variables(self._one_step)

    @property
    def used(self) -> list[tf.Variable]:
        """The variables that the graph of one step uses, in that order."""
        return [] if self.eager else captured(self._one_step)

    @property
    def graph(self) -> tf.Graph | None:
        """The graph of one step; None in eager mode."""
        return None if self.eager else self._one_step.graph

    def __call__(self, iterator: Any, steps: int, first: int) -> CallLogs:
        """Runs up to `steps` steps on the batches of `iterator`; one with a fault is the last.

        Args:
            iterator: Of batches.
            steps: How many steps.
            first: The number of the first of them, from 1.
        """
        if isinstance(iterator, Single) and not self.eager:
            tables, batch = self._on_single(iterator, first)
            return CallLogs.of_tables(tables, batch, 0, self.names, self._image_names)
        counts = tf.constant(first, tf.int64), tf.constant(steps, tf.int32)
        if self.eager:
            with recording():
                tables, batch, waited = self._on_iterator(iterator, *counts)
        elif isinstance(iterator, Resident):
            (tables, batch), waited = self._on_resident(iterator, counts), 0
        else:
            if self._traced is None:
                self._traced = concrete(self._on_iterator, iterator, *counts)
            tables, batch, waited = self._traced(iterator, *counts)
        return CallLogs.of_tables(tables, batch, waited, self.names, self._image_names)

    def _create_variables(self) -> None:
        """Runs the step in a graph that is then dropped; the variables that Keras created remain.

        `tf.function` lets a step create variables, but not variables with a copy on each replica.
        """

        def create(batch: Any) -> None:
            self._step(batch)  # whose values may differ: the first replica starts without variables

        with releasable, temporary_graph().as_default():
            signature = tf.nest.map_structure(of_one_replica, self.element_spec)
            batch = tf.nest.map_structure(
                lambda spec: tf.compat.v1.placeholder(spec.dtype, spec.shape), signature, expand_composites=True
            )
            self._strategy.run(create, (batch,))

    def _whole_step(self, batch: Any) -> tuple[tf.Tensor, dict[str, tf.Tensor], Any, tf.Tensor]:
        """One step on all replicas: the number of examples, float64 means weighted by it, images, and the fault."""

        def replica_step(batch: Any) -> tuple[tf.Tensor, dict[str, tf.Tensor], Any, tf.Tensor]:
            logs = self._step(batch)
            self.names, self._image_names, self.meaning = list(logs.scalars), list(logs.images), logs.meaning
            with tf.name_scope("logs"):
                weight = tf.cast(logs.weight, tf.float64)
                scalars = {name: _wide(value) for name, value in logs.scalars.items()}
            return weight, scalars, logs.images, logs.fault

        def summand(batch: Any) -> tuple[tf.Tensor, dict[str, Any]]:
            """What a replica adds to the numbers of all, and its images."""
            weight, scalars, images, fault = replica_step(batch)
            with tf.name_scope("logs"):  # in a smaller last batch, a replica may have no rows, and then no mean
                sums = [tf.where(weight > 0, value * weight, 0) for value in scalars.values()]
                context = tf.distribute.get_replica_context()
                faults = tf.one_hot(context.replica_id_in_sync_group, context.num_replicas_in_sync, dtype=tf.float64)
                return tf.concat([[weight, *sums], faults * _wide(fault)], 0), images

        if self._strategy.num_replicas_in_sync == 1:
            return self._strategy.run(replica_step, (batch,))
        numbers, images = self._strategy.run(summand, (batch,))
        with tf.name_scope("logs"):
            numbers = self._strategy.reduce("SUM", numbers, axis=None)
            weight, sums, faults = numbers[0], numbers[1 : 1 + len(self.names)], numbers[1 + len(self.names) :]
            scalars = dict(zip(self.names, tf.unstack(sums / weight, len(self.names)), strict=True))
            # The lowest code if one is negative, else the highest.
            fault = tf.where(tf.reduce_any(faults < 0), tf.reduce_min(faults), tf.reduce_max(faults))
            images = {name: self._strategy.experimental_local_results(value)[0] for name, value in images.items()}
        return weight, scalars, images, tf.cast(fault, tf.int32)

    def _sound_step(self, batch: Any) -> tuple[tf.Tensor, dict[str, tf.Tensor], Any, tf.Tensor]:
        """What `_whole_step` returns, of a step of which a fault leaves no trace in the variables."""
        variables = [self.copies.written_for(variable) for variable in self.restored()]
        before = [(variable, tf.convert_to_tensor(variable)) for variable in variables]

        def undo() -> None:
            for variable, value in before:
                variable.assign(value)

        try:
            weight, scalars, images, fault = self._whole_step(batch) if self.eager else self._one_step(batch)
        except Exception:  # in eager mode, after a part of the step
            undo()
            raise
        if before:
            tf.cond(tf.equal(fault, 0), lambda: None, undo)
        return weight, scalars, images, fault

    def _on_iterator(self, iterator, first, steps):
        """The loop around the step: a graph, or in eager mode run by Python."""

        def is_due(tables, done, continues, batch, waited):
            return continues & batch.has_value()

        def body(tables, done, continues, batch, waited):
            tables, done, continues = self._recorded(tables, done, steps, first, batch.get_value())
            # If this was the last, the next call needs the next batch, and an error the faulty one.
            batch, seconds = tf.cond(continues, lambda: self._read(iterator), lambda: (batch, tf.zeros_like(waited)))
            return tables, done, continues, batch, waited + seconds

        tables, done, _, batch, waited = _repeated(is_due, body, [*self._start(steps), *self._read(iterator)])
        return [table.stack()[:done] for table in tables], batch, waited

    def _read(self, iterator: Any) -> tuple[Any, tf.Tensor]:
        """The next batch, and how many seconds that took."""
        start = tf.timestamp()
        with tf.control_dependencies([start]):
            batch = iterator.get_next_as_optional()
        with tf.control_dependencies([batch.has_value()]):
            return batch, tf.timestamp() - start

    def _on_resident(self, data: Resident, counts: Sequence[tf.Tensor]) -> tuple[list[tf.Tensor], Any]:
        """The loop around the step, in the running pass over arrays.

        If XLA compiles the step, it also compiles this loop, unless steps return images, which it cannot encode. As it
        has a program for each shape, a smaller last batch has a call of its own.
        """
        layout, by_xla = data.layout, self._jit_compile and not self._image_names
        batch_rows, most = data.alike if by_xla else (None, data.left)

        def call(tensors, order, batch_size, position, most, first, steps):
            steps = tf.minimum(steps, most)

            def body(tables, done, _):
                batch = gather(layout, tensors, rows_of(order, position + done, batch_size, batch_rows))
                return self._recorded(tables, done, steps, first, batch)

            start = self._start(_MOST if by_xla else steps)
            tables, done, _ = tf.while_loop(lambda tables, done, continues: continues, body, start)
            return [table.stack()[: None if by_xla else done] for table in tables], done

        most = min(most, _MOST) if by_xla else most
        sizes = [tf.constant(number) for number in (data.batch_size, data.position, most)]
        if (key := (str(layout), batch_rows)) not in self._on_arrays:
            specs = data.tensor_specs, tf.TensorSpec([None], tf.int64), *sizes, *counts
            self._on_arrays[key] = concrete(call, *specs, jit_compile=by_xla)
        tables, done = self._on_arrays[key](data.tensors, data.order, *sizes, *counts)
        tables = [table[:done] for table in tables] if by_xla else tables
        last = data.ahead(int(done) - 1)
        data.skip(int(done))
        return tables, last

    def _on_single(self, data: Single, first: int) -> tuple[list[tf.Tensor], Any]:
        """A single step, without a loop."""

        def call(batch, first):
            self._start(1)
            weight, scalars, images, fault = self._sound_step(batch)
            return [tf.stack([self._row(weight, scalars, fault)]), tf.stack([self._encoded(images, first)])]

        if self._alone is None:
            self._alone = concrete(call, self.element_spec, tf.TensorSpec((), tf.int64))
        return self._alone(data.get_value(), tf.constant(first, tf.int64)), data

    def _start(self, steps):
        """Forgets the last fault, and returns what a loop has: its tables, the steps done, and whether it continues."""
        for variable in self.codes:
            self.copies.written_for(variable).assign(0)
        columns = {tf.float64: 2 + len(self.names), tf.string: len(self._image_names)}
        if self.eager:  # whose columns the first step shows
            tables = [tf.TensorArray(dtype, 0, dynamic_size=True) for dtype in columns]
        else:
            tables = [tf.TensorArray(dtype, steps, element_shape=(n,)) for dtype, n in columns.items() if n]
        return tables, tf.constant(0), tf.constant(True)

    def _recorded(self, tables, done, steps, first, batch):
        """Runs a step: the tables with its values, how many are done, and whether another step may follow."""
        weight, scalars, images, fault = self._sound_step(batch)
        rows, *pictures = tables
        rows = rows.write(done, self._row(weight, scalars, fault))
        pictures = [table.write(done, self._encoded(images, first + tf.cast(done, tf.int64))) for table in pictures]
        with tf.control_dependencies([fault]):  # otherwise it could be read before the step has run
            stops = False if self._stop is None else tf.convert_to_tensor(self._stop)
        done += 1
        return [rows, *pictures], done, tf.equal(fault, 0) & tf.logical_not(stops) & (done < steps)

    def _row(self, weight: tf.Tensor, scalars: dict[str, tf.Tensor], fault: tf.Tensor) -> tf.Tensor:
        """The numbers of a step, in the order of the columns."""
        return tf.stack([weight, _wide(fault), *(scalars[name] for name in self.names)])

    def _encoded(self, images: dict[str, tf.Tensor], number: tf.Tensor) -> tf.Tensor:
        """For each image name, a string: the images if they are due at this step, else ""."""
        cells = []
        for name in self._image_names:
            image = images[name]
            due = tf.equal((number - 1) % self._image_every[name], 0)
            cells.append(tf.cond(due, lambda image=image: tf.io.serialize_tensor(image_content(image)), lambda: ""))
        return tf.stack(cells) if cells else tf.zeros((0,), tf.string)


def _repeated(is_due: Callable[..., Any], body: Callable[..., Any], values: Sequence[Any]) -> Sequence[Any]:
    """`tf.while_loop`; in eager mode for values of any type."""
    if not tf.executing_eagerly():
        return tf.while_loop(is_due, body, values)
    while is_due(*values):
        values = body(*values)
    return values


def _wide(value: tf.Tensor) -> tf.Tensor:
    return tf.cast(value, tf.float64)
