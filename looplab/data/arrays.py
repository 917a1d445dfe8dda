"""Arrays as users pass them, as one structure of arrays that belong together."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def is_arrays(x: Any) -> bool:
    """Whether `x` is neither a dataset nor a function that returns one."""
    return not isinstance(x, tf.data.Dataset) and not callable(x)


def to_arrays(name: str, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
    """x, (x, y) or (x, y, sample_weight) as arrays; floating-point numbers have Keras's `floatx`.

    Args:
        name: What errors call x.
        x, y, sample_weight: Arrays, structures of arrays, or None.
    """
    if x is None:
        raise ValueError(f"`{name}` must be the data to run on; got None.")
    parts = {name: x, "y": y, "sample_weight": sample_weight}
    arrays = {part: _to_arrays(part, value) for part, value in parts.items()}
    lengths = {part: {leaf.shape[0] for leaf in leaves(value)} for part, value in arrays.items() if value is not None}
    if len(set.union(*lengths.values())) > 1:
        found = ", ".join(f"`{part}` has {' and '.join(map(str, sorted(n)))}" for part, n in lengths.items())
        raise ValueError(f"All parts of the data must have the same number of examples; {found}.")
    if lengths[name] <= {0}:
        raise ValueError(f"`{name}` is empty: it has 0 examples. Pass at least one.")
    return keras.utils.pack_x_y_sample_weight(*arrays.values())


def unpack(batch: Any) -> tuple[Any, Any, Any]:
    """The x, y and sample_weight of a batch; None for what it does not have. A batch of another structure is x."""
    if isinstance(batch, (list, tuple)) and not 1 <= len(batch) <= 3:
        return batch, None, None
    return keras.utils.unpack_x_y_sample_weight(batch)


def leaves(arrays: Any) -> list[Any]:
    """The arrays in a structure, without those that are None."""
    return [leaf for leaf in tf.nest.flatten(arrays) if leaf is not None]


def split(arrays: Any, fraction: float) -> tuple[Any, Any]:
    """All but the last `fraction` of the examples, and the last `fraction`, before any shuffling, as in Keras."""
    n = leaves(arrays)[0].shape[0]
    cut = math.floor(n * (1 - fraction))
    if not 0 < cut < n:
        raise ValueError(
            f"`validation_split={fraction}` of {n} examples leaves {cut} to train on and {n - cut} to validate on. "
            f"Both must be at least 1."
        )
    first, last = (
        tf.nest.map_structure(lambda a, part=part: a if a is None else a[part], arrays)
        for part in (slice(cut), slice(cut, n))
    )
    return first, last


def held_out(x: Any, y: Any, sample_weight: Any, fraction: float) -> tuple[Any, Any, Any, Any]:
    """x, y and sample_weight of all but the last `fraction` of the examples, and all of these."""
    if not is_arrays(x):
        raise ValueError("`validation_split` splits arrays; pass a part of a dataset as `validation_data`.")
    train, validation = split(to_arrays("x", x, y, sample_weight), fraction)
    return (*keras.utils.unpack_x_y_sample_weight(train), validation)


def _to_arrays(part: str, value: Any) -> Any:
    if value is None:  # an output without a target or a weight
        return None
    if isinstance(value, dict):
        return {key: _to_arrays(f"{part}[{key!r}]", inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)) and any(len(getattr(inner, "shape", ())) > 0 for inner in value):
        return tuple(_to_arrays(f"{part}[{index}]", inner) for index, inner in enumerate(value))
    if not hasattr(value, "__array__") and not isinstance(value, (list, tuple, tf.RaggedTensor)):
        raise TypeError(
            f"`{part}` must be an array, a dict or tuple of arrays, a `tf.data.Dataset`, or a function of the epoch "
            f"that returns one; got {type(value).__name__}. Turn a generator function into a dataset: "
            f"`tf.data.Dataset.from_generator(make_batches, output_signature=...)`."
        )
    try:
        array = value if isinstance(value, (tf.Tensor, tf.RaggedTensor)) else np.asarray(value)
    except ValueError as error:
        raise TypeError(f"`{part}` must be an array; got a list whose rows differ in shape.") from error
    if len(array.shape) == 0:
        raise ValueError(f"`{part}` must have its examples along its first dimension; got a single number.")
    if isinstance(array, np.ndarray) and array.dtype == object:
        if not all(isinstance(element, (str, bytes)) for element in array.flat):
            raise TypeError(
                f"`{part}` must hold numbers or strings; got an array of objects. Give all rows one shape and type."
            )
        return tf.convert_to_tensor(array, tf.string)
    if tf.as_dtype(array.dtype).is_floating and array.dtype != keras.config.floatx():
        array = tf.cast(array, keras.config.floatx()) if tf.is_tensor(array) else array.astype(keras.config.floatx())
    return array
