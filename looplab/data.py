"""Turns what a user passes as data into batches whose order is a function of (seed, epoch)."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab.arrays import is_arrays, leaves, to_arrays, unpack
from looplab.randomness import draws_when_begun, find_unseeded, reshuffles
from looplab.warn import warn

_BUFFER = 4  # batches that are made ready while the graph computes


@dataclasses.dataclass(frozen=True)
class Batches:
    """Data as batches, epoch after epoch."""

    name: str
    """What an error calls it."""
    start: Callable[..., tf.data.Dataset]
    """`start(epoch, batch=0)`: the batches of that epoch (from 0), from that one (from 0) on."""
    steps: int | None
    """Batches in an epoch, or None where only the end of the data tells."""
    continues: bool
    """Whether one iterator goes on through all epochs; else each epoch begins with `start`."""
    element_spec: Any = None
    """The signature of a batch, as `tf.data` tells it."""
    described: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What must be the same where a training goes on, as JSON has it."""
    arrays: Any = None
    """(x, y, sample_weight), or what there is of it, where it came as arrays."""
    unseeded: str = ""
    """What is random in it, and will be otherwise the next time."""
    dataset: tf.data.Dataset | None = None
    """The user's own, where it shuffles anew each time that it is begun."""
    steps_given: bool = False
    """Whether an epoch may end before the data does."""

    @property
    def begun(self) -> int:
        """How often its data set was begun in this process."""
        return 0 if self.dataset is None else _begun.get(self.dataset, 0)

    def iterate(self, epoch: int, batch: int = 0) -> Iterator:
        """An iterator over `start(epoch, batch)`."""
        if self.dataset is not None:
            draws_more = self.continues or (self.steps_given and not draws_when_begun(self.dataset))
            _begun[self.dataset] = _UNKNOWN if draws_more or self.begun >= _UNKNOWN else self.begun + 1
        return iter(self.start(epoch, batch))

    def advance(self, begun: int) -> None:
        """Brings its data set to the order that it has when it was begun so often.

        Where that cannot be known, because it was only read in part and draws an order as it is read, warns.

        Raises:
            ValueError: It was begun more often.
        """
        if self.dataset is None or self.begun == begun:
            return
        if begun >= _UNKNOWN:
            _begun[self.dataset] = _ELSEWHERE
            return self.check_order()
        if self.begun > begun:
            raise ValueError(
                f"`{self.name}` is a data set that shuffles anew each time, and has given the order that is needed now "
                f"already. Make it anew, as a program does that starts again, or pass to `shuffle` "
                f"reshuffle_each_iteration=False."
            )
        for _ in range(begun - self.begun):
            passed = iter(self.dataset)
            if not draws_when_begun(self.dataset):
                collections.deque(passed, maxlen=0)
        _begun[self.dataset] = begun

    def end(self) -> None:
        """Notes that another process has read its data set, without end, in an earlier `fit`."""
        if self.dataset is not None and self.continues:
            _begun[self.dataset] = _ELSEWHERE

    def check_order(self) -> None:
        """Warns where its data set cannot be brought to the order that it would have."""
        if self.begun == _ELSEWHERE:
            warn(
                f"`{self.name}` shuffles anew each time, and was read in parts before: it goes on in another order "
                f"than it would have. Pass reshuffle_each_iteration=False to `shuffle` to go on to the same bits."
            )


_UNKNOWN = 2**52  # how often, where it draws orders that nobody counts
_ELSEWHERE = _UNKNOWN + 1  # where another process did
_begun: weakref.WeakKeyDictionary[tf.data.Dataset, int] = weakref.WeakKeyDictionary()


def from_arguments(
    name: str,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    steps: int | None = None,
    training_from: int | None = None,
    strategy: tf.distribute.Strategy,
) -> Batches:
    """Batches from arrays, from a `tf.data.Dataset`, or from a function of the epoch that returns one.

    Args:
        name: What an error calls `x`: "x" or "validation_data".
        steps: Batches in an epoch, if not as many as there are.
        training_from: The first epoch of a training. With `steps`, its data goes on in the next epoch where it
            stopped, and begins again at its end. Without it, the data is for one evaluation, and ends where it ends.

    Raises:
        TypeError: `x` is none of these.
        ValueError: The parts differ in length, are empty, or do not go together.
    """
    if not is_arrays(x):
        for other, value in {"y": y, "sample_weight": sample_weight, "batch_size": batch_size}.items():
            if value is not None:
                raise ValueError(
                    f"`{other}` must not be given where `{name}` is a data set: it came with {type(x).__name__}. "
                    f"Let the data set's elements be batches: x, (x, y) or (x, y, sample_weight)."
                )
        source = _from_dataset if isinstance(x, tf.data.Dataset) else _from_function
        batches = source(name, x, steps, training_from is not None)
        described: dict[str, Any] = {"steps_per_epoch": batches.steps}
    else:
        arrays = to_arrays(name, x, y, sample_weight)
        batches = _from_arrays(name, arrays, 32 if batch_size is None else batch_size, shuffle, seed, steps)
        n = leaves(arrays)[0].shape[0]
        described = {
            "examples": n,
            "batch_size": batch_size or 32,
            "shuffle": bool(shuffle),
            "steps_per_epoch": batches.steps,
        }
        if training_from is None:
            batches = dataclasses.replace(batches, steps=min(batches.steps, math.ceil(n / (batch_size or 32))))

    def start(epoch: int, batch: int = 0) -> tf.data.Dataset:
        return strategy.experimental_distribute_dataset(batches.start(epoch, batch))

    begin = training_from or 0
    first = start(begin)
    return dataclasses.replace(
        batches,
        start=lambda epoch, batch=0: first if (epoch, batch) == (begin, 0) else start(epoch, batch),
        element_spec=first.element_spec,
        described={"signature": str(first.element_spec), **described},
        unseeded=batches.unseeded or (find_unseeded(first) if isinstance(first, tf.data.Dataset) else ""),
    )


def changes(before: Any, after: Any) -> str:
    """In words, where two signatures of a batch differ."""
    names = ("x", "y", "sample_weight")
    pairs = [dict(zip(names, unpack(signature), strict=True)) for signature in (before, after)]
    if tf.nest.map_structure(lambda _: 0, pairs[0]) != tf.nest.map_structure(lambda _: 0, pairs[1]):
        return f"a batch was {before}, and is {after}"
    leaves = [keras.tree.flatten_with_path(part) for part in pairs]
    told = [
        f"`{'.'.join(map(str, path))}` was {old.shape} {old.dtype.name}, and is {new.shape} {new.dtype.name}"
        for (path, old), (_, new) in zip(*leaves, strict=True)
        if old != new
    ]
    return "; ".join(told)


def _from_arrays(name: str, arrays: Any, batch_size: int, shuffle: bool, seed: int, steps: int | None) -> Batches:
    distinct = {id(leaf): leaf for leaf in leaves(arrays)}  # an auto-encoder's x is its y: it is held and gathered once
    tensors = {
        key: tf.convert_to_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf for key, leaf in distinct.items()
    }
    n = next(iter(distinct.values())).shape[0]
    per_pass = math.ceil(n / batch_size)

    def one_pass(number: tf.Tensor) -> tf.data.Dataset:
        """The rows of each batch of one pass over the data."""
        rows = tf.range(n, dtype=tf.int64)
        if shuffle:
            rows = tf.random.experimental.stateless_shuffle(rows, tf.stack([tf.constant(seed, tf.int64), number]))
        return tf.data.Dataset.range(0, n, batch_size).map(lambda first: rows[first : first + batch_size])

    def gather(rows: tf.Tensor) -> Any:
        gathered = {key: tf.gather(tensor, rows) for key, tensor in tensors.items()}
        return tf.nest.map_structure(lambda leaf: gathered.get(id(leaf)), arrays)

    def start(epoch: int, batch: int) -> tf.data.Dataset:
        passed, batch = divmod(epoch * (steps or per_pass) + batch, per_pass)
        rows = tf.data.Dataset.range(passed, tf.int64.max).flat_map(one_pass).skip(batch)
        dataset = rows.map(gather)
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
        options.experimental_optimization.apply_default_optimizations = False  # to rewrite it, it would copy the data
        options.autotune.enabled = False
        return dataset.prefetch(_BUFFER).with_options(options)

    return Batches(name, start, steps or per_pass, True, arrays=arrays)


def _from_dataset(name: str, dataset: tf.data.Dataset, steps: int | None, training: bool) -> Batches:
    size = int(dataset.cardinality())
    if size == 0:
        raise ValueError(f"`{name}` is an empty data set. Pass at least one batch.")
    unseeded = find_unseeded(dataset)
    own = dataset if reshuffles(dataset) else None
    if steps is not None and training:
        endless = dataset.repeat()
        return Batches(
            name, lambda epoch, batch: endless.skip(epoch * steps + batch), steps, True, unseeded=unseeded, dataset=own
        )
    if steps is None and size == tf.data.INFINITE_CARDINALITY:
        argument = "steps_per_epoch" if name == "x" else "validation_steps"
        raise ValueError(f"`{name}` is an endless data set: say with `{argument}` how many batches an epoch has.")

    def start(epoch: int, batch: int) -> tf.data.Dataset:
        begun = dataset if steps is None else dataset.take(steps)
        return begun.skip(batch) if batch else begun

    known = steps or (size if size > 0 else None)
    return Batches(name, start, known, False, unseeded=unseeded, dataset=own, steps_given=steps is not None)


def _from_function(name: str, function: Callable[[int], tf.data.Dataset], steps: int | None, training: bool) -> Batches:
    try:
        inspect.signature(function).bind(0)
    except TypeError as error:
        raise TypeError(f"`{name}` is a function, which must take the epoch alone: {error}.") from error

    last: tuple[int, Any] = (-1, None)

    def start(epoch: int, batch: int) -> tf.data.Dataset:
        nonlocal last
        dataset = function(epoch)
        if not isinstance(dataset, tf.data.Dataset):
            raise TypeError(
                f"`{name}` is a function of the epoch, which must return a `tf.data.Dataset`; "
                f"for epoch {epoch} it returned {type(dataset).__name__}."
            )
        _from_dataset(name, dataset, steps, training)  # for what it checks
        if dataset is last[1] and epoch != last[0] and reshuffles(dataset):
            raise ValueError(
                f"`{name}` returned one data set for the epochs {last[0]} and {epoch}, and that shuffles anew each "
                f"time: make it within the function, as with `shuffle(1000, seed=epoch)`."
            )
        last = epoch, dataset
        if training and steps is not None:
            dataset = dataset.repeat()
        dataset = dataset if steps is None else dataset.take(steps)
        return dataset.skip(batch) if batch else dataset

    return Batches(name, start, steps, False)  # without `steps`, an epoch may be longer than another
