"""How many examples a batch has, and how much each of them weighs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab.data.arrays import unpack

Report = Callable[[tf.Tensor, Sequence[str]], None]
"""Reports faults of the running step: a vector of bools, and a message for each."""


def examples(batch: Any, report: Report | None = None, signature: Any = None) -> tf.Tensor | int | None:
    """How many examples a batch has: the leading dimension of y; without y, the one that the inputs share.

    Scalars have none. If several dimensions differ, unknown ones count, because those of tables and matrices that are
    the same in each batch are known. A batch of scalars alone is one example. None if all dimensions are known and
    there is no majority: then all batches have the same number.

    Args:
        batch: x, (x, y), (x, y, sample_weight), or any other structure, which is x.
        report: Called if only the running step can show whether all unknown dimensions are equal.
        signature: That of the batch, which shows which dimensions are known; by default the batch itself.
    """
    x, y, _ = unpack(batch)
    known_x, known_y, _ = unpack(batch if signature is None else signature)
    for parts, known in ((y, known_y), (x, known_x)):
        pairs = zip(tf.nest.flatten(parts), tf.nest.flatten(known), strict=True)
        leaves = [(leaf, spec.shape) for leaf, spec in pairs if leaf is not None and spec.shape.rank != 0]
        unknown = [leaf for leaf, shape in leaves if shape.rank is None or shape[0] is None]
        counts = [tf.cast(tf.shape(leaf)[0], tf.int32) for leaf in unknown]
        if counts:
            if report is not None and len(counts) > 1:
                differ = tf.reduce_any(tf.not_equal(tf.stack(counts[1:]), counts[0]))
                report(tf.reshape(differ, [1]), ["the parts of the batch differ in their number of examples"])
            return counts[0]
        sizes = Counter(shape[0] for _, shape in leaves).most_common(2)
        if len(sizes) == 1 or (sizes and sizes[0][1] > sizes[1][1]):
            return sizes[0][0]
    return None if leaves else 1


def align(weights: Any, shape: tf.TensorShape, what: str) -> tf.Tensor:
    """Sample weights with the rank of the values that they multiply: (n,) becomes (n, 1) for values (n, T).

    Args:
        weights: For the leading dimensions of the values.
        shape: That of the values.
        what: What the values are, for errors.
    """
    weights = tf.convert_to_tensor(weights)
    if shape.rank is None or weights.shape.rank in (None, 0):
        return weights
    common = min(shape.rank, weights.shape.rank)
    fits = all(w in (None, 1) or s in (None, w) for w, s in zip(weights.shape[:common], shape[:common], strict=True))
    if not fits or any(size != 1 for size in weights.shape[common:]) or shape.rank == 0:
        raise ValueError(
            f"`sample_weight` of shape {weights.shape} does not fit {what}, of shape {shape}. Pass one weight for each "
            f"example, shape (n,), or one for each of these values."
        )
    if weights.shape.rank > shape.rank:
        return tf.squeeze(weights, [*range(shape.rank, weights.shape.rank)])
    for _ in range(shape.rank - weights.shape.rank):
        weights = tf.expand_dims(weights, -1)
    return weights


@dataclasses.dataclass(frozen=True)
class ClassWeights:
    """The weight of each class; other classes weigh 1.

    Args:
        classes: Whole numbers, in ascending order.
        weights: One for each class.
    """

    classes: tuple[int, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, given: Any) -> ClassWeights | None:
        """From what `fit` takes: a dict by class, or a sequence in the order of the classes.

        Raises:
            ValueError: A class is not a whole number, or a weight is negative or not finite.
        """
        if given is None or len(given) == 0:
            return None
        items = given.items() if isinstance(given, Mapping) else enumerate(np.asarray(given).tolist())
        try:
            pairs = sorted((_whole(label), float(weight)) for label, weight in items)
            is_valid = all(0 <= weight < math.inf for _, weight in pairs)
        except (TypeError, ValueError):
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"`class_weight` must be a dict from classes, which are whole numbers, to finite weights of at least "
                f"0, or a sequence of such weights; got {given!r}."
            )
        return cls(*zip(*pairs, strict=True))

    def weigh(self, batch: Any, targets: str, report: Report) -> tuple[Any, Any, Any]:
        """The batch with each target's weight, times its `sample_weight`.

        Args:
            targets: What the loss takes, as `plausible.targets_of` names it.
            report: For faults that only the targets' values show.

        Raises:
            ValueError: y is not one class for each example or position.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        if not isinstance(y, tf.Tensor):
            raise ValueError(
                f"`class_weight` needs y to be one tensor of classes; got {tf.nest.map_structure(lambda _: '*', y)}. "
                f"For several outputs, pass `sample_weight`."
            )
        labels = self._labels(y, targets, report)
        classes, flat = tf.constant(self.classes, tf.int64), tf.reshape(labels, [-1])
        index = tf.minimum(tf.searchsorted(classes, flat), len(self.classes) - 1)
        weights = tf.gather(tf.constant(self.weights, keras.config.floatx()), index)
        weights = tf.reshape(tf.where(tf.equal(tf.gather(classes, index), flat), weights, 1), tf.shape(labels))
        weights.set_shape(labels.shape)
        if sample_weight is not None:
            what = f"the classes of y, of shape {y.shape}"
            weights *= tf.cast(align(sample_weight, weights.shape, what), weights.dtype)
        return x, y, weights

    def _labels(self, y: tf.Tensor, targets: str, report: Report) -> tf.Tensor:
        """The class at each position as int64: rounded as in Keras, or the largest of a distribution."""
        if y.shape.rank is None:
            raise ValueError("`class_weight` needs targets of known rank, which the dataset's signature does not have.")
        if y.shape.rank > 1 and y.shape[-1] == 1:
            y = tf.squeeze(y, -1)
        elif y.shape.rank > 1 and targets != "labels":
            is_one_hot = targets in ("one-hot", "fractions") or (targets != "bits" and y.dtype.is_floating)
            if not is_one_hot:
                raise ValueError(
                    f"`class_weight` needs one class for each example; y of shape {y.shape} has {y.shape[-1]} numbers "
                    f"for each, which `loss` compares one by one. If each number is the class of a position, give y a "
                    f"last dimension of 1; otherwise pass `sample_weight`."
                )
            total = tf.reduce_sum(tf.cast(y, tf.float32), -1)
            message = "`class_weight` needs one class for each example, and a row of y does not sum to 1"
            report(tf.reshape(tf.reduce_any(tf.abs(total - 1) > 1e-3), [1]), [message])
            return tf.argmax(y, -1)
        return tf.cast(tf.round(y), tf.int64) if y.dtype.is_floating else tf.cast(y, tf.int64)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)
