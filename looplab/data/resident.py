"""Arrays in memory, whose batches the graph gathers itself: no pipeline stands between the data and the loop."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from looplab.data.arrays import leaves


class Rows(NamedTuple):
    """Rows of arrays, as what `Iterator.get_next_as_optional` returns."""

    arrays: Resident
    rows: Any

    def has_value(self) -> bool:
        """Whether there are any: arrays start again at their end."""
        return True

    def get_value(self) -> Any:
        """The arrays of these rows."""
        return self.arrays.gather(self.arrays.tensors, self.rows)


class Resident:
    """The batches of arrays, pass after pass, as an iterator.

    Args:
        arrays: A structure of arrays with the same number of rows; None stays None.
        batch_size: The number of rows in a batch; the last one of a pass may have fewer.
        seed: Of the order of each pass; None keeps that of the arrays.
    """

    def __init__(self, arrays: Any, batch_size: int, seed: int | None):
        distinct = {id(leaf): leaf for leaf in leaves(arrays)}  # an auto-encoder's x is its y: it is gathered once
        places = {key: index for index, key in enumerate(distinct)}
        self.layout = tf.nest.map_structure(lambda leaf: places.get(id(leaf), -1), arrays)
        """For each part of a batch, its place in `tensors`; -1 for None."""
        self.tensors = [tf.convert_to_tensor(a) if isinstance(a, np.ndarray) else a for a in distinct.values()]
        self.batch_size = batch_size
        self.rows = int(self.tensors[0].shape[0])
        self.batches = math.ceil(self.rows / batch_size)
        """In a pass."""
        self.position = 0
        """In this pass, of the next batch."""
        self._seed = seed
        self._pass = 0
        self.order = self.order_of(0)
        """int64, shape (rows,): the order of this pass; None keeps that of the arrays."""

    @property
    def element_spec(self) -> Any:
        """The signature of a batch."""
        specs = [tf.type_spec_from_value(tensor) for tensor in self.tensors]
        specs = [
            tf.RaggedTensorSpec([None, *spec.shape[1:]], spec.dtype, spec.ragged_rank, spec.row_splits_dtype)
            if isinstance(spec, tf.RaggedTensorSpec)
            else tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
            for spec in specs
        ]
        return self._structured(specs, tf.type_spec_from_value(None))

    @property
    def left(self) -> int:
        """How many batches are left in this pass."""
        return self.batches - self.position

    def __iter__(self) -> Resident:
        return copy.copy(self)

    def __next__(self) -> Any:
        return self.get_next_as_optional().get_value()

    def at(self, batch: int) -> Resident:
        """An iterator that starts at a batch, counted from the first of the first pass."""
        iterator = copy.copy(self)
        iterator.skip(batch)
        return iterator

    def skip(self, batches: int) -> None:
        """Skips some batches."""
        passes, self.position = divmod(self.position + batches, self.batches)
        if passes:
            self._pass += passes
            self.order = self.order_of(self._pass)

    def order_of(self, number: Any) -> tf.Tensor | None:
        """The order of a pass."""
        if self._seed is None:
            return None
        seeds = tf.stack([tf.constant(self._seed, tf.int64), tf.cast(number, tf.int64)])
        return tf.random.experimental.stateless_shuffle(tf.range(self.rows, dtype=tf.int64), seeds)

    @property
    def key(self) -> Any:
        """What a graph depends on that gathers batches, besides their signature."""
        return self.batch_size, self.rows, self.order is None, str(self.layout)

    def rows_of(self, batch: int) -> Rows:
        """The batch that follows the next one by some batches."""
        return Rows(self, self.batch_rows(self.order, tf.constant(self.position + batch)))

    def get_next_as_optional(self) -> Rows:
        """The next batch."""
        rows = self.rows_of(0)
        self.skip(1)
        return rows

    def batch_rows(self, order: tf.Tensor | None, batch: tf.Tensor) -> tf.Tensor:
        """The rows of a batch of this pass."""
        first = tf.cast(batch, tf.int64) * self.batch_size
        last = tf.minimum(first + self.batch_size, self.rows)
        return tf.range(first, last) if order is None else order[first:last]

    def gather(self, tensors: list[Any], rows: tf.Tensor) -> Any:
        """The batch with these rows."""
        return self._structured([tf.gather(tensor, rows) for tensor in tensors], None)

    def _structured(self, parts: list[Any], none: Any) -> Any:
        return tf.nest.map_structure(lambda place: none if place < 0 else parts[place], self.layout)
