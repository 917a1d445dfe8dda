"""What a user passes as arrays, as one structure of arrays that go together."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def is_arrays(x: Any) -> bool:
    """Whether `x` is neither a data set nor a function that returns one."""
    return not isinstance(x, tf.data.Dataset) and not callable(x)


def to_arrays(name: str, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
    """(x, y, sample_weight) as arrays, without what is None: floating numbers as Keras's `floatx`, lists as tuples."""
    parts = {name: x, "y": y, "sample_weight": sample_weight}
    arrays = {part: _to_arrays(part, value) for part, value in parts.items() if value is not None or part == name}
    lengths = {part: {leaf.shape[0] for leaf in tf.nest.flatten(value)} for part, value in arrays.items()}
    if len(set.union(*lengths.values())) > 1:
        told = ", ".join(f"`{part}` has {' and '.join(map(str, sorted(n)))}" for part, n in lengths.items())
        raise ValueError(f"All parts of the data must have the same number of examples; {told}.")
    if lengths[name] <= {0}:
        raise ValueError(f"`{name}` is empty: it has 0 examples. Pass at least one.")
    return keras.utils.pack_x_y_sample_weight(arrays[name], arrays.get("y"), arrays.get("sample_weight"))


def split(arrays: Any, fraction: float) -> tuple[Any, Any]:
    """(all but the last `fraction` of the examples, the last `fraction`), before any shuffling, as Keras does it."""
    n = tf.nest.flatten(arrays)[0].shape[0]
    cut = math.floor(n * (1 - fraction))
    if not 0 < cut < n:
        raise ValueError(
            f"`validation_split={fraction}` of {n} examples leaves {cut} to train on and {n - cut} to validate on. "
            f"Both must be at least 1."
        )
    return tuple(tf.nest.map_structure(lambda a, part=part: a[part], arrays) for part in (slice(cut), slice(cut, n)))


def held_out(x: Any, y: Any, sample_weight: Any, fraction: float) -> tuple[Any, Any, Any, Any]:
    """x, y and sample_weight of all but the last `fraction` of the examples, and all of these.

    Raises:
        ValueError: They are no arrays, or none would be left on one side.
    """
    if not is_arrays(x):
        raise ValueError("`validation_split` splits arrays; of a data set, pass a part as `validation_data`.")
    train, validation = split(to_arrays("x", x, y, sample_weight), fraction)
    return (*keras.utils.unpack_x_y_sample_weight(train), validation)


def _to_arrays(part: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_arrays(f"{part}[{key!r}]", inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)) and any(len(getattr(inner, "shape", ())) > 0 for inner in value):
        return tuple(_to_arrays(f"{part}[{index}]", inner) for index, inner in enumerate(value))
    if not hasattr(value, "__array__") and not isinstance(value, (list, tuple, tf.RaggedTensor)):
        raise TypeError(
            f"`{part}` must be an array, a dict or tuple of arrays, a `tf.data.Dataset`, or a function of the epoch "
            f"that returns one; {type(value).__name__} came. Wrap any other iterable as "
            f"`tf.data.Dataset.from_generator(lambda: iterable, output_signature=...)`."
        )
    try:
        array = value if isinstance(value, (tf.Tensor, tf.RaggedTensor)) else np.asarray(value)
    except ValueError as error:
        raise TypeError(f"`{part}` must be an array; a list with rows of several shapes came.") from error
    if array.dtype == object:
        raise TypeError(f"`{part}` must hold numbers; an array of objects came. Give all its rows one shape and type.")
    if len(array.shape) == 0:
        raise ValueError(f"`{part}` must have its examples along its first dimension; a single number came.")
    if tf.as_dtype(array.dtype).is_floating and array.dtype != keras.config.floatx():
        array = tf.cast(array, keras.config.floatx()) if tf.is_tensor(array) else array.astype(keras.config.floatx())
    return array
