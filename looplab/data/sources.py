"""Data that yields batches from Python: generators, loaders of other libraries, and `keras.utils.PyDataset`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab.compat import IteratorAdapter, PyDatasetAdapter
from looplab.data.arrays import converted
from looplab.data.resident import number_of, shuffled

ENDLESS = 2**31
"""The length of data without an end."""


def dataset_of(name: str, source: Any, failures: list[Exception]) -> tf.data.Dataset:
    """The batches of a generator or loader, whose signature is that of the first two batches.

    Args:
        name: What errors call the source.
        source: An iterator, which all iterations over the dataset share, or what can be iterated over several times.
        failures: Is filled with the exceptions that the source raises.

    Raises:
        ValueError: It has no batch.
    """
    restarts, signature = not isinstance(source, Iterator), None

    def batches() -> Iterator[tuple[Any]]:
        with recorded(failures):
            for batch in source:
                yield (_checked(name, batch, signature),)

    first = list(itertools.islice(batches(), 1))
    if not first:
        fix = "Pass at least one." if restarts else "If it was read before, create it again."
        raise ValueError(f"`{name}` must yield at least one batch; this {type(source).__name__} yields none. {fix}")
    adapter = IteratorAdapter(batches if restarts else lambda: itertools.chain(first, batches()), restarts)
    dataset = _batches(adapter)
    signature = dataset.element_spec
    return dataset


@contextlib.contextmanager
def recorded(failures: list[Exception]) -> Iterator[None]:
    """Inside it, exceptions are recorded, because TensorFlow turns them into errors of its own."""
    try:
        yield
    except Exception as failure:
        failures.append(failure)
        raise


def length(source: Any) -> int | None:
    """The number of batches of a source, None if it is unknown; of a loader without end, `ENDLESS`."""
    try:
        return min(source.num_batches if isinstance(source, keras.utils.PyDataset) else len(source), ENDLESS)
    except TypeError:
        return None


def sampler_of(source: Any) -> str:
    """What decides the order of a PyTorch `DataLoader`; "" for a sequential one, and for any other source."""
    found = (type(getattr(source, name, None)).__name__ for name in ("sampler", "batch_sampler"))
    known = ("NoneType", "SequentialSampler", "BatchSampler")
    return next((name for name in found if name not in known), "")


class ReadOnce:
    """Batches that can be read only once: all iterations share one iterator.

    Args:
        batches: A dataset, possibly a distributed one.
        skip: How many batches to skip.
    """

    def __init__(self, batches: Any, skip: int = 0):
        self.element_spec = batches.element_spec
        self._batches = batches
        self._skip = skip
        self._iterator: Any = None

    def __iter__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._batches)
            for _ in range(self._skip):
                self._iterator.get_next_as_optional()
        return self._iterator


class Ordered(keras.utils.PyDataset):
    """The batches of a PyDataset in the order of `indices`."""

    def __init__(self, name: str, batches: keras.utils.PyDataset):
        super().__init__(batches.workers, batches.use_multiprocessing, batches.max_queue_size)
        self.indices: list[int] = []
        self.failures: list[Exception] = []
        """What reading the batches raised."""
        self.signature: Any = None
        """That of the batches, once it is known."""
        self._name = name
        self._batches = batches
        self.on_epoch_begin = batches.on_epoch_begin
        self.on_epoch_end = batches.on_epoch_end

    @property
    def num_batches(self) -> int:  # noqa: D102
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any]:
        with recorded(self.failures):
            return (_checked(self._name, self._batches[self.indices[index]], self.signature),)


class PyDatasetSource:
    """The batches of a `keras.utils.PyDataset`, in an order that depends on the seed and the pass alone.

    Keras reads them with the dataset's workers. Batches that a resumed run skips are not read.

    Args:
        name: What errors call it.
        batches: The PyDataset.
        steps: Batches in an epoch; by default as many as there are.
        seed: Of the order, which is another one in each pass; None keeps that of the dataset.
        training_from: The first epoch of a training, whose epochs continue where the one before stopped; None: each is
            a pass of its own.

    Raises:
        ValueError: It has no batch, or no end and no `steps`.
    """

    def __init__(
        self, name: str, batches: keras.utils.PyDataset, steps: int | None, seed: int | None, training_from: int | None
    ):
        self.size: int | None = batches.num_batches
        """None: it has no end."""
        if self.size == 0:
            raise ValueError(f"`{name}` must have at least one batch; this {type(batches).__name__} has none.")
        if self.size is None and steps is None:
            argument = "steps_per_epoch" if name == "x" else "validation_steps"
            raise ValueError(
                f"`{name}` is a PyDataset without end, {type(batches).__name__}: pass as `{argument}` how many batches "
                f"an epoch has."
            )
        whole = self.size or ENDLESS
        self._trains = training_from is not None
        self.steps = steps or whole if self._trains else min(steps or whole, whole)
        """In an epoch."""
        self._seed = seed if self.size else None
        self._first_epoch = training_from or 0
        self._is_new = True
        self._ordered = Ordered(name, batches)
        self._ordered.indices = list(range(min(2, whole)))  # two show the signature
        self._adapter = PyDatasetAdapter(self._ordered)
        self._dataset = _batches(self._adapter)
        self._ordered.signature = self._dataset.element_spec
        self.failures = self._ordered.failures

    def start(self, epoch: int, batch: int) -> tf.data.Dataset:
        """The batches of an epoch, from one on."""
        size = self.size or ENDLESS
        first = number_of(epoch, 0, self.steps, size, self._first_epoch)
        numbers = range(first + batch, first + self.steps)
        orders = {number: self._order_of(number) for number in {number // size for number in numbers}}
        self._ordered.indices = [orders[number // size][number % size] for number in numbers]
        return self._dataset

    def on_begin(self) -> None:
        """Calls the dataset's hooks, as Keras does: its `on_epoch_end` is also called before the first epoch."""
        if self._is_new or not self._trains:
            self._adapter.on_epoch_end()
        self._is_new = False
        self._adapter.on_epoch_begin()

    def on_end(self) -> None:
        """Stops the workers, and calls the dataset's hook."""
        if not self._is_new:
            self._adapter.on_epoch_end()

    def _order_of(self, number: int) -> Any:
        whole = range(self.size or ENDLESS)
        return whole if self._seed is None else shuffled(len(whole), self._seed, number).numpy().tolist()


def overridden_hooks(batches: keras.utils.PyDataset) -> list[str]:
    """The methods of a PyDataset that may change it between epochs."""
    names = ("on_epoch_begin", "on_epoch_end")
    return [f"`{name}`" for name in names if getattr(type(batches), name) is not getattr(keras.utils.PyDataset, name)]


def _checked(name: str, batch: Any, signature: Any) -> Any:
    """A batch as arrays, which must fit the signature of the first two, if that is known.

    Raises:
        ValueError: It does not fit. TensorFlow would round numbers to an integer dtype.
    """
    arrays = converted(f"{name}: batch", batch)
    if signature is None:
        return arrays
    found, expected = (keras.tree.flatten_with_path(structure) for structure in (arrays, signature))
    same = [path for path, _ in found] == [path for path, _ in expected]
    if not same or not all(_fits(leaf, spec) for (_, leaf), (_, spec) in zip(found, expected, strict=True)):
        raise ValueError(
            f"All batches of `{name}` must be like the first two, {_described(signature)}; got {_described(arrays)}. "
            f"Give them one structure and dtype. A dimension after the first may vary if it does so in the first two; "
            f"a `tf.data.Dataset` can have None for it."
        )
    return arrays


def _fits(array: Any, spec: Any) -> bool:
    if array is None or not hasattr(spec, "dtype"):
        return array is None and not hasattr(spec, "dtype")
    is_number = not spec.dtype.is_bool and spec.dtype != tf.string
    dtypes = tf.as_dtype(array.dtype).as_numpy_dtype, spec.dtype.as_numpy_dtype
    return spec.shape.is_compatible_with(array.shape) and (
        np.can_cast(*dtypes, "same_kind") if is_number else dtypes[0] == dtypes[1]
    )


def _described(structure: Any) -> str:
    """The shapes and dtypes of the parts of a batch."""

    def described(leaf: Any) -> str | None:
        return f"{tuple(leaf.shape)} {tf.as_dtype(leaf.dtype).name}" if hasattr(leaf, "dtype") else None

    return str(keras.tree.map_structure(described, structure))


def _batches(adapter: Any) -> tf.data.Dataset:
    """An adapter's 1-tuples of batches as batches, with None for the optionals that stand for it."""

    def batch_of(element: Any) -> Any:
        return tf.nest.map_structure(lambda part: None if isinstance(part, tf.experimental.Optional) else part, element)

    return adapter.get_tf_dataset().map(tf.autograph.experimental.do_not_convert(batch_of))
