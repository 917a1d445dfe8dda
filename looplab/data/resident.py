"""Arrays in memory, whose batches the graph gathers itself: no pipeline stands between the data and the loop."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from looplab.data.arrays import leaves
from looplab.data.sparse import SparseRows


class Gathered(NamedTuple):
    """A batch of arrays, as `tf.data.Iterator.get_next_as_optional` returns one."""

    source: Resident
    rows: tf.Tensor
    """int64, shape (examples,)."""

    def has_value(self) -> bool:
        """Whether there is a batch: arrays start again at their end."""
        return True

    def get_value(self) -> Any:
        """The batch."""
        return gather(self.source.layout, self.source.tensors, self.rows)


class Single:
    """One batch, as an iterator: each time it returns the same one.

    Args:
        arrays: A structure of arrays with the same number of rows; None stays None.
    """

    def __init__(self, arrays: Any):
        self._batch = tf.nest.map_structure(_to_tensor, arrays)
        self.element_spec = tf.nest.map_structure(_spec_of, self._batch)
        """The signature of a batch, with any number of rows."""

    def get_next_as_optional(self) -> Single:
        """The batch."""
        return self

    def has_value(self) -> bool:
        """Whether there is a batch."""
        return True

    def get_value(self) -> Any:
        """The batch."""
        return self._batch


class Resident:
    """An iterator over the batches of arrays, pass after pass.

    Args:
        arrays: A structure of arrays with the same number of rows; None stays None.
        batch_size: The number of rows in a batch; the last one of a pass may have fewer.
        seed: Of the order, which is another one in each pass; None keeps that of the arrays.
    """

    def __init__(self, arrays: Any, batch_size: int, seed: int | None):
        distinct = {id(leaf): leaf for leaf in leaves(arrays)}  # an auto-encoder's x is its y: it is gathered once
        places = {key: index for index, key in enumerate(distinct)}
        self.layout = tf.nest.map_structure(lambda leaf: places.get(id(leaf), -1), arrays)
        """For each part of a batch, its place in `tensors`; -1 for None."""
        self.tensors = [_gatherable(leaf) for leaf in distinct.values()]
        self.rows = int(next(iter(distinct.values())).shape[0])
        self.batch_size = batch_size
        self.batches = math.ceil(self.rows / batch_size)
        """In a pass."""
        self.position = 0
        """Of the next batch in this pass."""
        self._seed = seed
        self._pass = 0
        self.order = self.order_of(0)
        """int64, shape (rows,): the order of this pass."""

    @property
    def tensor_specs(self) -> list[Any]:
        """The signatures of `tensors`, for any number of rows."""
        return [_spec_of(tensor) for tensor in self.tensors]

    @property
    def element_spec(self) -> Any:
        """The signature of a batch."""
        specs = [t.batch_signature if isinstance(t, SparseRows) else _spec_of(t) for t in self.tensors]
        return structured(self.layout, specs, none=tf.type_spec_from_value(None))

    @property
    def left(self) -> int:
        """How many batches are left in this pass."""
        return self.batches - self.position

    @property
    def alike(self) -> tuple[int, int]:
        """How many rows the next batch has, and how many batches in a row have as many."""
        full = self.rows // self.batch_size - self.position
        return (self.batch_size, full) if full else (self.rows % self.batch_size, 1)

    def at(self, batch: int) -> Resident:
        """An iterator that starts at a batch, counted from the first one of the first pass."""
        iterator = copy.copy(self)
        iterator.skip(batch)
        return iterator

    def skip(self, batches: int) -> None:
        """Skips some batches."""
        passes, self.position = divmod(self.position + batches, self.batches)
        if passes:
            self._pass += passes
            self.order = self.order_of(self._pass)

    def order_of(self, number: Any) -> tf.Tensor:
        """The order of a pass."""
        return tf.range(self.rows, dtype=tf.int64) if self._seed is None else shuffled(self.rows, self._seed, number)

    def ahead(self, batches: int) -> Gathered:
        """The batch of this pass that comes some batches after the next one."""
        return Gathered(self, rows_of(self.order, tf.constant(self.position + batches), self.batch_size))

    def get_next_as_optional(self) -> Gathered:
        """The next batch."""
        batch = self.ahead(0)
        self.skip(1)
        return batch

    def __iter__(self) -> Resident:
        return copy.copy(self)

    def __next__(self) -> Any:
        return self.get_next_as_optional().get_value()


def number_of(epoch: int, batch: int, steps: int, batches: int, first_epoch: int) -> int:
    """The number of a batch of an epoch, counted from the first batch of pass 0.

    A training starts with a new pass: the one that follows those of as many epochs before it.

    Args:
        epoch, batch: From 0.
        steps: In an epoch.
        batches: In a pass.
        first_epoch: That of the training.
    """
    first_pass = -(-first_epoch * steps // batches)  # rounded up
    return first_pass * batches + (epoch - first_epoch) * steps + batch


def shuffled(size: int, seed: int, number: Any) -> tf.Tensor:
    """The whole numbers below `size`, in an order that depends on the seed and the number of the pass alone."""
    seeds = tf.stack([tf.constant(seed, tf.int64), tf.cast(number, tf.int64)])
    return tf.random.experimental.stateless_shuffle(tf.range(size, dtype=tf.int64), seeds)


def rows_of(order: tf.Tensor, batch: tf.Tensor, batch_size: Any, rows: int | None = None) -> tf.Tensor:
    """The rows of a batch of a pass with this order; `rows` is their number, if it must be fixed."""
    first, size = tf.cast(batch, tf.int64), tf.cast(batch_size, tf.int64)
    if rows is None:
        return order[first * size : (first + 1) * size]
    # A slice would need a fixed start as well: XLA would compile a program for each batch.
    return tf.gather(order, first * size + tf.range(rows, dtype=tf.int64))


def gather(layout: Any, tensors: list[Any], rows: tf.Tensor) -> Any:
    """The batch with these rows."""
    parts = [tensor.batch(rows) if isinstance(tensor, SparseRows) else tf.gather(tensor, rows) for tensor in tensors]
    return structured(layout, parts, none=None)


def structured(layout: Any, parts: list[Any], none: Any) -> Any:
    """The structure in which each place of `layout` is one of the parts."""
    return tf.nest.map_structure(lambda place: none if place < 0 else parts[place], layout)


def _gatherable(array: Any) -> Any:
    """An array in a form whose rows the graph can gather."""
    if isinstance(array, tf.SparseTensor):
        return SparseRows.of(array)
    return _to_tensor(array)


def _to_tensor(array: Any) -> Any:
    return tf.convert_to_tensor(array) if isinstance(array, np.ndarray) else array


def _spec_of(tensor: Any) -> Any:
    """The signature of a tensor, for any number of rows; that of None is its own."""
    if isinstance(tensor, tf.Tensor):
        return tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype)
    if isinstance(tensor, SparseRows):
        return tensor.signature
    spec = tf.type_spec_from_value(tensor)
    if isinstance(spec, tf.RaggedTensorSpec):
        return tf.RaggedTensorSpec([None, *spec.shape[1:]], spec.dtype, spec.ragged_rank, spec.row_splits_dtype)
    return spec
