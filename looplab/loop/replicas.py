"""How the replicas of a step share a batch: each counts by its number of examples, and draws its own numbers."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from looplab.compat import KERAS_TRAINER
from looplab.variables import whole

_APART = 0x9E3779B1  # odd and large: seeds of people differ by less
_whole: Counter[int] = Counter()  # by the identity of an optimizer, in how many replicas it gets the gradients of all


def share(examples: tf.Tensor | int) -> tuple[Any, Any]:
    """The part of the batch's examples that this replica has, and how many the batch has.

    Args:
        examples: How many this replica has; if the graph fixes their number, all have as many.
    """
    context = tf.distribute.get_replica_context()
    if isinstance(examples, int):
        return 1 / context.num_replicas_in_sync, examples * context.num_replicas_in_sync
    total = context.all_reduce(tf.distribute.ReduceOp.SUM, examples)
    return tf.cast(examples, tf.float32) / tf.cast(tf.maximum(total, 1), tf.float32), total


def weighed(value: tf.Tensor, part: Any, reduce: Callable[..., Any], values: Any, **options: Any) -> tf.Tensor:
    """The reduced value of a loss on this replica, so that the mean over all examples is the value of the batch.

    A sum is divided by this replica's part of the examples. A mean over what weights or a mask select counts by how
    much they select here.

    Args:
        value: What Keras returns for the replica.
        part: Of the examples, as `share` returns it.
        reduce: Keras's function that reduces `values`, with the `options` weights, mask, reduction and dtype.
    """
    reduction, mask, weights = options["reduction"], options.get("mask"), options.get("sample_weight")
    is_weighted = reduction == "mean_with_sample_weight"
    if reduction in (None, "none"):
        return value
    if values.shape == (0,):  # which Keras does not reduce
        value = tf.reduce_sum(value)
    if reduction == "sum":
        return tf.math.divide_no_nan(value, tf.cast(part, value.dtype))
    if mask is None and (weights is None or not is_weighted):
        return value
    selecting = {**options, "reduction": "sum", "sample_weight": weights if is_weighted else None}
    own = tf.cast(reduce(tf.ones_like(values), **selecting), tf.float32)
    total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, own)
    return value * tf.cast(tf.math.divide_no_nan(own, total * part), value.dtype)


def shared(gradients: Sequence[Any], part: Any) -> list[Any]:
    """The gradients of the mean over the batch, from those of the mean over the examples of each replica."""

    def scaled(gradient: Any) -> Any:
        if isinstance(gradient, tf.IndexedSlices):
            return tf.IndexedSlices(scaled(gradient.values), gradient.indices, gradient.dense_shape)
        return None if gradient is None else gradient * tf.cast(part, gradient.dtype)

    return added([scaled(gradient) for gradient in gradients], part)[0]


def added(gradients: Sequence[Any], part: Any, *others: tf.Tensor) -> tuple[list[Any], *tuple[tf.Tensor, ...]]:
    """The sums of gradients and of other numbers over all replicas, in one reduction.

    Args:
        gradients: Those of this replica times its `part`; None where there is none.
        part: Of the examples, as `share` returns it.
        others: Numbers of this replica.
    """
    known = [counted(gradient, part) for gradient in gradients if gradient is not None]
    sums = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, [*known, *others])
    rest = iter(sums)
    return [None if gradient is None else next(rest) for gradient in gradients], *rest


def counted(value: Any, part: Any) -> Any:
    """`value`, or zeros if this replica has no examples, of which it computes anything."""
    strategy = tf.distribute.get_strategy()
    if isinstance(value, tf.IndexedSlices) and isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        value = tf.convert_to_tensor(value)  # workers add up numbers of one shape alone
    if isinstance(value, tf.IndexedSlices):
        return tf.IndexedSlices(counted(value.values, part), value.indices, value.dense_shape)
    return tf.where(part > 0, value, tf.zeros_like(value)) if tf.is_tensor(part) else value


def in_scope_of_model(create: Callable[..., None]) -> Callable[..., None]:
    """A trainer's constructor that runs in the scope in which its Keras model was created, if it is called in none."""

    @functools.wraps(create)
    def created(trainer: Any, *args: Any, **options: Any) -> None:
        model, here = options.get("model", args[0] if args else None), tf.distribute.get_strategy()
        strategy = model.distribute_strategy if isinstance(model, KERAS_TRAINER) else here
        is_elsewhere = strategy is not here and not tf.distribute.has_strategy()
        with strategy.scope() if is_elsewhere else contextlib.nullcontext():
            create(trainer, *args, **options)

    return created


def is_mean_of_rows(metric: keras.Metric, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a metric is updated with one number of a replica, such as its loss, which must count by its part."""
    is_plain = type(metric) is keras.metrics.Mean and len(args) == 1 and not kwargs
    return is_plain and tf.convert_to_tensor(args[0]).shape.rank == 0


def own(variables: Iterable[Any]) -> list[Any]:
    """Those that each replica changes on its own and no gradient does: moving statistics, sums of metrics, states.

    Only those of floating dtypes, which may become NaN.
    """
    wholes = ((variable, whole(variable)) for variable in variables)
    changeable = [(v, one) for v, one in wholes if isinstance(one, tf.distribute.DistributedValues)]
    return [variable for variable, one in changeable if not one.trainable and one.dtype.is_floating]


def settle(
    changed: Iterable[Any], before: Mapping[int, tf.Tensor], weights: Collection[int], rows: Any, total: Any
) -> None:
    """Ends the changes that a step made to variables on each replica.

    A weight, such as a moving mean, becomes the mean over all replicas by their rows, which is what one device computes
    from a mean over rows; Keras would let those of the replicas drift apart. What belongs to the replica, such as the
    sums of a metric, becomes what it was if the replica has no examples, of which the step computes NaN.

    Args:
        changed: The variables, the same on all replicas.
        before: By identity, their values before the step; those that the step created have none.
        weights: The identities of those that are weights.
        rows, total: How many examples this replica has, and how many all have.
    """
    wholes, parts = [], []
    for variable in changed:
        kind = whole(variable)
        if kind.synchronization == tf.VariableSynchronization.ON_READ or id(variable) not in weights:
            parts.append(variable)
        elif kind.aggregation == tf.VariableAggregation.NONE:
            wholes.append(variable)
    if wholes:
        # In float64, the mean of equal numbers is that number.
        sums = [counted(tf.cast(variable, tf.float64) * tf.cast(rows, tf.float64), rows) for variable in wholes]
        sums = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, sums)
        for variable, value in zip(wholes, sums, strict=True):
            variable.assign(tf.cast(value / tf.cast(total, tf.float64), variable.dtype))

    def undo() -> None:
        for variable in parts:
            if id(variable) in before:
                variable.assign(before[id(variable)])

    if parts and tf.is_tensor(rows):
        tf.cond(rows > 0, lambda: None, undo)


def own_seed(seed: tf.Tensor) -> tf.Tensor:
    """The seed of this replica's random numbers, from one that all replicas draw, of shape (2,).

    The state of the generator stays equal on all of them, so that a run can resume on another number of replicas.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return seed
    return seed + tf.cast(context.replica_id_in_sync_group, seed.dtype) * tf.constant([_APART, 0], seed.dtype)


@contextlib.contextmanager
def applying_whole(optimizer: Any) -> Iterator[None]:
    """Inside it, an optimizer gets the gradients of all replicas, so that it clips them as a whole.

    Keras's optimizers add the gradients of the replicas up, after they have clipped those of each. They do so in
    threads that TensorFlow starts, so the optimizer itself is marked.
    """
    parts = [optimizer, *getattr(optimizer, "optimizers", ())]
    marked = {id(getattr(part, "inner_optimizer", part)) for part in parts}
    _whole.update(marked)
    try:
        yield
    finally:
        _whole.subtract(marked)


def is_whole(optimizer: Any) -> bool:
    """Whether an optimizer gets the gradients of all replicas."""
    return _whole[id(optimizer)] > 0
