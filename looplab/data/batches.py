"""What users pass as data, as batches whose order is a function of the seed and the epoch."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from looplab.data.arrays import is_arrays, to_arrays, unpack
from looplab.data.randomness import draws_at_start, find_unseeded, reshuffles
from looplab.data.resident import Resident, gather, rows_of
from looplab.warn import warn

_BUFFER = 4  # batches that are prepared while the graph computes


@dataclasses.dataclass
class _Iterations:
    """How often a dataset that shuffles in each iteration was iterated over; None if an iteration drew several orders.

    TensorFlow draws the orders of such a dataset one after another: a resumed run has to draw those before its own.
    """

    done: int | None = 0
    """In this process."""
    missing: int | None = 0
    """In the run that this process continues, in addition."""


_iterations: weakref.WeakKeyDictionary[tf.data.Dataset, _Iterations] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Batches:
    """Data as batches, epoch after epoch."""

    name: str
    """What errors call it."""
    start: Callable[..., Any]
    """`start(epoch, batch=0)`: the batches of that epoch, from that batch; both count from 0. Can be iterated over."""
    steps: int | None
    """Batches in an epoch; None if only the end of the data shows it."""
    continues: bool
    """Whether one iterator runs through all epochs; otherwise each epoch has its own."""
    described: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What a resumed run must not change, as JSON holds it."""
    element_spec: Any = None
    """The signature of a batch."""
    arrays: Any = None
    """x, (x, y) or (x, y, sample_weight), if they were passed as arrays."""
    unseeded: str = ""
    """What is random in it without a seed; "" if nothing is."""
    dataset: tf.data.Dataset | None = None
    """The user's dataset, if it shuffles in each iteration."""
    draws_several: bool = False
    """Whether an iteration may draw several orders of `dataset`, or none; nobody counts them."""

    @property
    def starts(self) -> int | None:
        """How often the run has iterated over its dataset, if that shuffles in each iteration; None if unknown."""
        count = _Iterations() if self.dataset is None else _iterations.get(self.dataset, _Iterations())
        return None if count.done is None or count.missing is None else count.done + count.missing

    def iterate(self, epoch: int, batch: int = 0) -> Iterator:
        """An iterator over `start(epoch, batch)`, in the order that it has in this run; warns if that is unknown."""
        if self.dataset is not None:
            count = _iterations.setdefault(self.dataset, _Iterations())
            if count.missing is None:
                warn(
                    f"`{self.name}` shuffles in each iteration and is not read to its end, so a resumed run cannot "
                    f"restore its order: pass reshuffle_each_iteration=False to `shuffle`."
                )
            for _ in range(count.missing or 0):
                skipped = iter(self.dataset)
                if not draws_at_start(self.dataset):
                    collections.deque(skipped, maxlen=0)
            starts = self.starts
            count.done = None if starts is None or self.draws_several else starts + 1
            count.missing = 0
        return iter(self.start(epoch, batch))

    def resume(self, starts: int | None) -> None:
        """Lets the next iteration continue a run that has iterated over its dataset `starts` times.

        Raises:
            ValueError: This process has iterated over it more often.
        """
        if self.dataset is not None:
            count = _iterations.setdefault(self.dataset, _Iterations())
            if starts is None:
                count.missing = None
            elif count.done is None or count.done > starts:
                raise ValueError(
                    f"`{self.name}` is a dataset that shuffles in each iteration, and this process has already used "
                    f"the order that the resumed run needs. Create the dataset again, or pass "
                    f"reshuffle_each_iteration=False to `shuffle`."
                )
            else:
                count.missing = starts - count.done


def limited(name: str, *data: Any, steps: int | None = None, **options: Any) -> Batches:
    """The batches of `from_arguments`, at most as many as Keras is set to run in a pass."""
    batches, most = from_arguments(name, *data, steps=steps, **options), keras.config.max_steps_per_epoch()
    if most is None or (batches.steps is not None and batches.steps <= most):
        return batches
    warn(f"`{name}` is limited to {most} batches by `keras.config.set_max_steps_per_epoch`.")
    return from_arguments(name, *data, steps=most, **options)


def from_arguments(
    name: str,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    batch_size: int | None = None,
    *,
    shuffle: bool = False,
    seed: int = 0,
    steps: int | None = None,
    training_from: int | None = None,
    strategy: tf.distribute.Strategy,
) -> Batches:
    """Batches from arrays, from a `tf.data.Dataset`, or from a function of the epoch that returns one.

    Args:
        name: What errors call `x`: "x" or "validation_data".
        batch_size: That of arrays; 32 by default.
        steps: Batches in an epoch; by default as many as there are.
        training_from: The first epoch of a training. With `steps`, its data continues in the next epoch where it
            stopped, and starts again at its end. None: the data is for one evaluation, and ends at its end.

    Raises:
        TypeError: `x` is none of these.
        ValueError: The parts differ in length, are empty, or do not belong together.
    """
    training = training_from is not None
    if is_arrays(x):
        arrays = to_arrays(name, x, y, sample_weight)
        replicas = strategy.num_replicas_in_sync
        batches = _from_arrays(name, arrays, batch_size or 32, bool(shuffle), seed, steps, training, replicas)
    else:
        others = {"y": y, "sample_weight": sample_weight, "batch_size": batch_size}
        if given := [f"`{other}`" for other, value in others.items() if value is not None]:
            raise ValueError(
                f"{', '.join(given)} must not be given if `{name}` is a dataset; `{name}` is a {type(x).__name__}. "
                f"Let the dataset's elements be batches: x, (x, y) or (x, y, sample_weight)."
            )
        source = _from_dataset if isinstance(x, tf.data.Dataset) else _from_function
        batches = source(name, x, steps, training)

    first_epoch = training_from or 0
    plain = batches.start(first_epoch, 0)

    def distributed(data: Any) -> Any:
        return data if isinstance(data, Resident) else strategy.experimental_distribute_dataset(data)

    first = distributed(plain)

    def start(epoch: int, batch: int = 0) -> Any:
        return first if (epoch, batch) == (first_epoch, 0) else distributed(batches.start(epoch, batch))

    return dataclasses.replace(
        batches,
        start=start,
        described={"signature": str(first.element_spec), **batches.described, "steps_per_epoch": batches.steps},
        element_spec=first.element_spec,
        unseeded="" if isinstance(plain, Resident) else find_unseeded(plain),
    )


def changes(before: Any, after: Any) -> str:
    """Describes where two signatures of a batch differ."""
    names = ("x", "y", "sample_weight")
    parts = [dict(zip(names, unpack(signature), strict=True)) for signature in (before, after)]
    if tf.nest.map_structure(lambda _: 0, parts[0]) != tf.nest.map_structure(lambda _: 0, parts[1]):
        return f"a batch was {before}, and is {after}"
    return "; ".join(
        f"`{'.'.join(map(str, path))}` was {old.shape} {old.dtype.name}, and is {new.shape} {new.dtype.name}"
        for (path, old), (_, new) in zip(*map(keras.tree.flatten_with_path, parts), strict=True)
        if old != new
    )


def _from_arrays(
    name: str, arrays: Any, batch_size: int, shuffle: bool, seed: int, steps: int | None, training: bool, replicas: int
) -> Batches:
    resident = Resident(arrays, batch_size, seed if shuffle else None)
    length = steps or resident.batches

    def start(epoch: int, batch: int) -> Any:
        first = epoch * length + batch
        return resident.at(first) if replicas == 1 else _pipeline(resident, first)

    described = {"examples": resident.rows, "batch_size": batch_size, "shuffle": shuffle}
    steps = length if training else min(length, resident.batches)
    return Batches(name, start, steps, True, described, arrays=arrays)


def _pipeline(resident: Resident, first: int) -> tf.data.Dataset:
    """The batches of arrays from one on, as a dataset that replicas can share."""

    def one_pass(number: tf.Tensor) -> tf.data.Dataset:
        order = resident.order_of(number)
        return tf.data.Dataset.range(resident.batches).map(lambda batch: rows_of(order, batch, resident.batch_size))

    first_pass, first_batch = divmod(first, resident.batches)
    rows = tf.data.Dataset.range(first_pass, tf.int64.max).flat_map(one_pass).skip(first_batch)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    options.experimental_optimization.apply_default_optimizations = False  # they would copy the arrays
    options.autotune.enabled = False
    gathered = rows.map(lambda rows: gather(resident.layout, resident.tensors, rows))
    return gathered.prefetch(_BUFFER).with_options(options)


def _from_dataset(name: str, dataset: tf.data.Dataset, steps: int | None, training: bool) -> Batches:
    size = _size(name, dataset, steps)
    continues = steps is not None and training
    source = dataset.repeat() if continues else dataset if steps is None else dataset.take(steps)
    return Batches(
        name,
        start=lambda epoch, batch: source.skip((epoch * steps if continues else 0) + batch),
        steps=steps or size,
        continues=continues,
        dataset=dataset if reshuffles(dataset) else None,
        draws_several=continues or (steps is not None and not draws_at_start(dataset)),
    )


def _from_function(name: str, function: Callable[[int], tf.data.Dataset], steps: int | None, training: bool) -> Batches:
    try:
        inspect.signature(function).bind(0)
    except TypeError as error:
        raise TypeError(f"`{name}` is a function, which must take only the epoch: {error}.") from error
    last: tuple[int, Any] = (-1, None)

    def start(epoch: int, batch: int) -> tf.data.Dataset:
        nonlocal last
        dataset = function(epoch)
        if not isinstance(dataset, tf.data.Dataset):
            raise TypeError(
                f"`{name}` is a function of the epoch, which must return a `tf.data.Dataset`; "
                f"for epoch {epoch} it returned {type(dataset).__name__}."
            )
        _size(name, dataset, steps)
        if dataset is last[1] and epoch != last[0] and reshuffles(dataset):
            raise ValueError(
                f"`{name}` returned one dataset for the epochs {last[0]} and {epoch}, which shuffles in each "
                f"iteration: create it within the function, as with `shuffle(1000, seed=epoch)`."
            )
        last = epoch, dataset
        if steps is not None:
            dataset = (dataset.repeat() if training else dataset).take(steps)
        return dataset.skip(batch)

    return Batches(name, start, steps, False)  # without `steps`, epochs may differ in length


def _size(name: str, dataset: tf.data.Dataset, steps: int | None) -> int | None:
    """The number of batches in a dataset, None if that is unknown.

    Raises:
        ValueError: There are none, or there is no end.
    """
    size = int(dataset.cardinality())
    if size == 0:
        raise ValueError(f"`{name}` is an empty dataset. Pass at least one batch.")
    if steps is None and size == tf.data.INFINITE_CARDINALITY:
        argument = "steps_per_epoch" if name == "x" else "validation_steps"
        raise ValueError(f"`{name}` is an endless dataset: pass as `{argument}` how many batches an epoch has.")
    return size if size > 0 else None
