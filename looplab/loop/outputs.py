"""What evaluations and predictions return."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf


def ordered(names: Iterable[str], metrics: Iterable[keras.Metric]) -> list[str]:
    """The names of values in Keras's order: that of the metrics, then the alphabet."""
    inner = [one for metric in metrics for one in getattr(metric, "metrics", [metric])]
    order = [metric.name for metric in inner]
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def listed(values: dict[str, Any], names: list[str]) -> Any:
    """The values as Keras returns them without `return_dict`: a list, or the only value."""
    return [values[name] for name in names] if len(names) > 1 else values[names[0]]


def joined(*parts: Any) -> Any:
    """The rows of all parts as one array, or as a `tf.RaggedTensor` if the parts have several lengths."""
    shapes = [tuple(part.shape) for part in parts]
    if len({shape[1:] for shape in shapes}) > 1 and not any(isinstance(part, tf.RaggedTensor) for part in parts):
        if len({*map(len, shapes)}) > 1:
            raise ValueError(f"`predict_step` must return outputs of one rank; got shapes {shapes[:5]}.")
        lengths = [{*sizes} for sizes in zip(*shapes, strict=True)]
        ragged = max(axis for axis, sizes in enumerate(lengths) if axis > 0 and len(sizes) > 1)
        parts = tuple(tf.RaggedTensor.from_tensor(part, ragged_rank=ragged) for part in parts)
    if any(isinstance(part, tf.SparseTensor) for part in parts):
        return tf.sparse.to_dense(tf.sparse.concat(0, list(parts))).numpy()
    whole = tf.concat(parts, 0)
    return whole.numpy() if isinstance(whole, tf.Tensor) else whole
