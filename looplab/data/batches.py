"""What users pass as data, as batches whose order is a function of the seed and the epoch."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from looplab import checks
from looplab.compat import is_loader, of_one_replica
from looplab.data import sources
from looplab.data.arrays import is_arrays, leaves, to_arrays
from looplab.data.iteration import Batches
from looplab.data.randomness import draws_at_start, find_unseeded, reshuffles
from looplab.data.resident import Resident, gather, number_of, rows_of
from looplab.data.sharing import Policy, check_sparse, is_by_row, shared
from looplab.warn import warn

_BUFFER = 4  # batches that are prepared while the graph computes


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
    workers: int = 1,
) -> Batches:
    """Batches from arrays, or from what yields batches: see `_from_source`.

    Args:
        name: What errors call `x`: "x" or "validation_data".
        batch_size: That of arrays; 32 by default.
        steps: Batches in an epoch; by default as many as there are. Never more than Keras is set to run in a pass.
        training_from: The first epoch of a training, which starts at the first batch. With `steps`, the next epochs
            continue where the data stopped, and start it again at its end. None: one evaluation, which ends at its end.
        strategy: Whose replicas share each batch.
        workers: How many processes share the data.

    Raises:
        TypeError: `x` is none of these.
        ValueError: The parts differ in length, are empty, or do not belong together.
    """
    training, first_epoch = training_from is not None, training_from or 0
    if is_arrays(x):
        arrays, batch_size = to_arrays(name, x, y, sample_weight), batch_size or 32
        steps = _limited(name, steps, math.ceil(leaves(arrays)[0].shape[0] / batch_size))
        batches = _from_arrays(name, arrays, batch_size, seed if shuffle else None, steps, training_from, strategy)
    else:
        _require_no_arrays(name, x, y=y, sample_weight=sample_weight, batch_size=batch_size)
        steps = _limited(name, steps, sources.length(x))
        batches = _from_source(name, x, steps, training_from, seed if shuffle else None)
        if isinstance(x, tf.data.Dataset) and not is_by_row(x, workers, not training):
            batches = dataclasses.replace(batches, steps=steps)  # a worker may have more of them

    plain = batches.start(first_epoch, 0)
    check_sparse(name, plain.element_spec, strategy.num_replicas_in_sync)
    matters = isinstance(plain, tf.data.Dataset) and (training or workers > 1)
    unseeded = find_unseeded(shared(plain, workers, not training)) if matters else ""
    if unseeded and workers > 1:
        checks.unseeded(name, unseeded, workers=workers)

    def distributed(data: Any) -> Any:
        if isinstance(data, tf.data.Dataset):
            data = strategy.experimental_distribute_dataset(shared(data, workers, not training))
        return sources.ReadOnce(data) if batches.is_read_once else data

    first = distributed(plain)

    def start(epoch: int, batch: int = 0) -> Any:
        if (epoch, batch) == (first_epoch, 0):
            return first
        whole = batches.start(epoch, 0) if batch and workers > 1 else None
        if isinstance(whole, tf.data.Dataset) and not is_by_row(whole, workers, not training):
            return sources.ReadOnce(distributed(whole), batch)  # of which each worker has read a part
        return distributed(batches.start(epoch, batch))

    return dataclasses.replace(
        batches,
        start=start,
        # That of one replica: a resumed run may have more of them, or fewer.
        described={
            "signature": str(tf.nest.map_structure(of_one_replica, first.element_spec)),
            **batches.described,
            "steps_per_epoch": batches.steps,
        },
        element_spec=first.element_spec,
        unseeded=unseeded,
    )


def _require_no_arrays(name: str, x: Any, **others: Any) -> None:
    if given := [f"`{other}`" for other, value in others.items() if value is not None]:
        raise ValueError(
            f"{', '.join(given)} must not be given if `{name}` yields batches itself; `{name}` is a "
            f"{type(x).__name__}. Let its elements be batches: x, (x, y) or (x, y, sample_weight)."
        )


def _limited(name: str, steps: int | None, size: int | None) -> int | None:
    """`steps`, or the most batches that Keras is set to run in a pass, if a pass would have more.

    Args:
        size: The number of batches in the data, None if it is unknown.
    """
    most, whole = keras.config.max_steps_per_epoch(), steps or size
    if most is None or (whole is not None and whole <= most):
        return steps
    warn(f"`{name}` is limited to {most} batches by `keras.config.set_max_steps_per_epoch`.")
    return most


def _from_arrays(
    name: str,
    arrays: Any,
    batch_size: int,
    seed: int | None,
    steps: int | None,
    training_from: int | None,
    strategy: tf.distribute.Strategy,
) -> Batches:
    resident = Resident(arrays, batch_size, seed)
    length = steps or resident.batches

    def start(epoch: int, batch: int) -> Any:
        first = number_of(epoch, batch, length, resident.batches, training_from or 0)
        return resident.at(first) if strategy.num_replicas_in_sync == 1 else _pipeline(resident, first)

    described = {"examples": resident.rows, "batch_size": batch_size, "shuffle": seed is not None}
    steps = min(length, resident.batches) if training_from is None else length
    return Batches(name, start, steps, True, described, arrays=arrays)


def _pipeline(resident: Resident, first: int) -> tf.data.Dataset:
    """The batches of arrays from one on, as a dataset that replicas can share."""

    def one_pass(number: tf.Tensor) -> tf.data.Dataset:
        order = resident.order_of(number)
        return tf.data.Dataset.range(resident.batches).map(lambda batch: rows_of(order, batch, resident.batch_size))

    first_pass, first_batch = divmod(first, resident.batches)
    rows = tf.data.Dataset.range(first_pass, tf.int64.max).flat_map(one_pass).skip(first_batch)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = Policy.DATA
    options.experimental_optimization.apply_default_optimizations = False  # they would copy the arrays
    options.autotune.enabled = False
    gathered = rows.map(lambda rows: gather(resident.layout, resident.tensors, rows))
    return gathered.prefetch(_BUFFER).with_options(options)


def _from_source(name: str, x: Any, steps: int | None, training_from: int | None, seed: int | None) -> Batches:
    """Batches from a dataset, a PyDataset, a loader, an iterator, or a function of the epoch."""
    if isinstance(x, tf.data.Dataset):
        return _from_dataset(name, x, steps, training_from)
    if isinstance(x, keras.utils.PyDataset):
        return _from_py_dataset(name, x, steps, training_from, seed)
    if isinstance(x, tf.distribute.DistributedDataset):
        return _from_distributed(name, x, steps, training_from)
    if isinstance(x, Iterator):
        return _from_iterator(name, x, steps, training_from)
    if is_loader(x):
        size = sources.length(x)
        if steps is None and size == sources.ENDLESS:
            raise ValueError(_endless(name, type(x).__name__))
        failures: list[Exception] = []
        batches = _from_dataset(name, sources.dataset_of(name, x, failures), steps, training_from)
        sampler = sources.sampler_of(x)
        inexact = f"is read in an order that no checkpoint can hold ({sampler})" if sampler else ""
        return dataclasses.replace(batches, steps=steps or size, inexact=inexact, failures=failures)
    return _from_function(name, x, steps, training_from is not None)


def _from_iterator(name: str, iterator: Iterator[Any], steps: int | None, training_from: int | None) -> Batches:
    failures: list[Exception] = []
    dataset = sources.dataset_of(name, iterator, failures)
    is_kept = name == "validation_data" and steps is None  # each evaluation needs all batches
    if is_kept:
        dataset = dataset.cache()

    def start(epoch: int, batch: int) -> tf.data.Dataset:
        epochs = epoch - (training_from or 0)
        if steps is None and epochs:
            return dataset.take(0)  # the first epoch has read all
        used = epochs * (steps or 0) + batch
        return dataset.skip(used) if used else dataset

    inexact = "" if is_kept else f"is an iterator ({type(iterator).__name__}), whose position no checkpoint can hold"
    continues = training_from is not None
    return Batches(name, start, steps, continues, inexact=inexact, is_read_once=not is_kept, failures=failures)


def _from_py_dataset(
    name: str, batches: keras.utils.PyDataset, steps: int | None, training_from: int | None, seed: int | None
) -> Batches:
    source = sources.PyDatasetSource(name, batches, steps, seed, training_from)
    hooks = sources.overridden_hooks(batches)
    return Batches(
        name,
        source.start,
        source.steps,
        continues=False,
        described={"batches": source.size, "shuffle": seed is not None},
        inexact=f"has its own {' and '.join(hooks)}, and no checkpoint can hold what they change" if hooks else "",
        failures=source.failures,
        on_begin=source.on_begin,
        on_end=source.on_end,
    )


def _from_distributed(name: str, dataset: Any, steps: int | None, training_from: int | None) -> Batches:
    # Its `cardinality` is that of the dataset on each worker, and unlike that of `tf.data.Dataset`, not a method.
    if steps is None and int(dataset.cardinality) == tf.data.INFINITE_CARDINALITY:
        raise ValueError(_endless(name, "distributed dataset"))
    continues = steps is not None and training_from is not None

    def start(epoch: int, batch: int) -> Any:
        used = ((epoch - (training_from or 0)) * steps if steps and continues else 0) + batch
        return sources.ReadOnce(dataset, used) if used else dataset

    return Batches(name, start, steps, continues, inexact="is distributed already, so that its order is unknown")


def _from_dataset(name: str, dataset: tf.data.Dataset, steps: int | None, training_from: int | None) -> Batches:
    size = _size(name, dataset, steps)
    continues = steps is not None and training_from is not None
    source = dataset.repeat() if continues else dataset if steps is None else dataset.take(steps)
    first = training_from or 0
    return Batches(
        name,
        start=lambda epoch, batch: source.skip(((epoch - first) * steps if continues else 0) + batch),
        steps=steps or size,
        continues=continues,
        dataset=dataset if reshuffles(dataset) else None,
        draws_several=continues or (steps is not None and not draws_at_start(dataset)),
    )


def _from_function(name: str, function: Callable[[int], tf.data.Dataset], steps: int | None, training: bool) -> Batches:
    if inspect.isgeneratorfunction(function):
        raise TypeError(
            f"`{name}` is a generator function: pass the generator that it returns, as in `fit(make_batches())`, or a "
            f"function of the epoch that returns a `tf.data.Dataset`."
        )
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
        raise ValueError(_endless(name, "dataset"))
    return size if size > 0 else None


def _endless(name: str, kind: str) -> str:
    argument = "steps_per_epoch" if name == "x" else "validation_steps"
    return f"`{name}` is an endless {kind}: pass as `{argument}` how many batches an epoch has."
