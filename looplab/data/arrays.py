"""Arrays as users pass them, as one structure of arrays that belong together."""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab import compat

_SOURCES = (tf.data.Dataset, tf.distribute.DistributedDataset, keras.utils.PyDataset, Iterator)


def is_arrays(x: Any) -> bool:
    """Whether `x` does not yield batches itself, and is not a function that returns a dataset."""
    return not (isinstance(x, _SOURCES) or compat.is_loader(x) or callable(x))


def to_arrays(name: str, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
    """x, (x, y) or (x, y, sample_weight) as arrays; floating-point numbers have Keras's `floatx`.

    Args:
        name: What errors call x.
        x, y, sample_weight: Arrays, structures of arrays, or None.
    """
    if x is None:
        raise ValueError(f"`{name}` must be the data to run on; got None.")
    parts = {name: x, "y": y, "sample_weight": sample_weight}
    arrays = {part: converted(part, value) for part, value in parts.items()}
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
        tf.nest.map_structure(lambda a, part=part: a if a is None else _rows(a, *part), arrays)
        for part in ((0, cut), (cut, n))
    )
    return first, last


def _rows(array: Any, start: int, stop: int) -> Any:
    if isinstance(array, tf.SparseTensor):
        shape = array.shape.as_list()
        return tf.sparse.slice(array, [start, *(0 for _ in shape[1:])], [stop - start, *shape[1:]])
    return array[start:stop]


def held_out(x: Any, y: Any, sample_weight: Any, fraction: float) -> tuple[Any, Any, Any, Any]:
    """x, y and sample_weight of all but the last `fraction` of the examples, and all of these."""
    if not is_arrays(x):
        raise ValueError("`validation_split` splits arrays; pass a part of a dataset as `validation_data`.")
    train, validation = split(to_arrays("x", x, y, sample_weight), fraction)
    return (*keras.utils.unpack_x_y_sample_weight(train), validation)


def converted(part: str, value: Any) -> Any:
    """A structure of what users pass as arrays as the same structure of arrays, with tuples for lists.

    Args:
        part: What errors call it.
        value: An array, a structure of arrays, or None.
    """
    if value is None:  # an input, an output or a weight that is not there
        return None
    if isinstance(value, dict):
        return {key: converted(f"{part}[{key!r}]", inner) for key, inner in value.items()}
    if _is_structure(value):
        parts = [converted(f"{part}[{index}]", inner) for index, inner in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return _to_array(part, value)


def _is_structure(value: Any) -> bool:
    """Whether a list or tuple holds arrays, at any depth; otherwise it is one array itself."""
    return isinstance(value, (list, tuple)) and any(
        isinstance(inner, dict) or len(getattr(inner, "shape", ())) > 0 or _is_structure(inner) for inner in value
    )


def _to_array(part: str, value: Any) -> Any:
    value = _plain(value)
    if not hasattr(value, "__array__") and not isinstance(value, (list, tuple, *_OF_TENSORFLOW)):
        may_yield = part in ("x", "validation_data")
        others = ", a dataset, a generator, a `keras.utils.PyDataset` or a `DataLoader`" if may_yield else ""
        raise TypeError(f"`{part}` must be an array, a dict or tuple of arrays{others}; got {type(value).__name__}.")
    try:
        array = value if isinstance(value, _OF_TENSORFLOW) else np.asarray(value)
    except ValueError as error:
        raise TypeError(f"`{part}` must be an array; got a list whose rows differ in shape.") from error
    if len(array.shape) == 0:
        raise ValueError(f"`{part}` must have its examples along its first dimension; got a single number.")
    if isinstance(array, np.ndarray) and array.dtype.kind in "OSUMm":
        is_text = array.dtype.kind in "SU" or all(isinstance(element, (str, bytes)) for element in array.flat)
        if not is_text:
            found = "objects. Give all rows one shape and type" if array.dtype == object else f"dtype {array.dtype}"
            raise TypeError(f"`{part}` must hold numbers or strings; got an array of {found}.")
        return tf.convert_to_tensor(array, tf.string)
    if tf.as_dtype(array.dtype).is_floating and array.dtype != keras.config.floatx():
        is_numpy = isinstance(array, np.ndarray)
        array = array.astype(keras.config.floatx()) if is_numpy else tf.cast(array, keras.config.floatx())
    return array


_OF_TENSORFLOW = (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)


def _plain(value: Any) -> Any:
    """Of an array of another library, what TensorFlow or NumPy can take, as Keras converts it."""
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(value, pandas.Series):
        return value.to_numpy()[:, None]
    if pandas is not None and isinstance(value, pandas.DataFrame):
        mixes = any(getattr(dtype, "kind", "") == "f" for dtype in value.dtypes) and len({*value.dtypes}) > 1
        return (value.astype(keras.config.floatx()) if mixes else value).to_numpy()
    if hasattr(value, "detach"):  # a tensor of PyTorch's
        return value.detach().cpu()
    sparse = compat.sparse_tensor(value)
    return value if sparse is None else tf.sparse.reorder(sparse)


def changes(before: Any, after: Any) -> str:
    """Describes where two signatures of a batch differ."""
    names = ("x", "y", "sample_weight")
    parts = [dict(zip(names, unpack(signature), strict=True)) for signature in (before, after)]
    if tf.nest.map_structure(lambda _: 0, parts[0]) != tf.nest.map_structure(lambda _: 0, parts[1]):
        return f"a batch was {before}, and is {after}"
    different = "; ".join(
        f"`{'.'.join(map(str, path))}` was {old.shape} {old.dtype.name}, and is {new.shape} {new.dtype.name}"
        for (path, old), (_, new) in zip(*map(keras.tree.flatten_with_path, parts), strict=True)
        if old != new
    )
    return different or f"a batch was {before}, and is {after}"


def checksum(arrays: Any) -> int:
    """Of up to 1,000 rows of arrays, evenly apart; 0 for None."""
    dense = [leaf for leaf in leaves(arrays) if not isinstance(leaf, (tf.SparseTensor, tf.RaggedTensor))]
    total = 0
    for leaf in dense:
        rows = np.unique(np.linspace(0, len(leaf) - 1, 1000).astype(np.int64))
        total = zlib.crc32(tf.io.serialize_tensor(tf.gather(leaf, rows)).numpy(), total)
    return total
