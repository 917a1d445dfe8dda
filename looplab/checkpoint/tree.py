"""Splits a state, a tree of dicts, lists and tuples, into JSON and arrays, and joins them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

_FLOAT8 = {"float8_e4m3fn", "float8_e5m2"}  # which safetensors cannot read as NumPy arrays: stored as uint8
_DTYPES = _FLOAT8 | {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("bfloat16", "float16", "float32", "float64", "complex64"),
}


def is_plain(value: Any) -> bool:
    """Whether a state can hold a value: numbers, strings, None, arrays, and dicts, lists and tuples of these.

    Subclasses of dict, list and tuple are not plain, because they would be restored as another class.
    """
    if type(value) is dict:
        return all(isinstance(key, (str, int)) and is_plain(inner) for key, inner in value.items())
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.name in _DTYPES
    return value is None or type(value) in (bool, int, float, str)


def flatten(state: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Splits a state into what JSON can hold, and its arrays by path."""
    arrays: dict[str, np.ndarray] = {}
    return _flatten("", state, arrays), arrays


def join(array_at: Callable[[str], np.ndarray], part: dict[str, Any]) -> Any:
    """What an object in the JSON that `flatten` made stands for; `array_at` returns the array with a path."""
    if "$array" in part:
        array = array_at(part["$array"])
        if part.get("dtype") in _FLOAT8:
            array = array.view(tf.as_dtype(part["dtype"]).as_numpy_dtype)
        return array[()] if part.get("scalar") else array
    if "$tuple" in part:
        return tuple(part["$tuple"])
    return dict(part["$items"]) if "$items" in part else part


def same(one: Any, other: Any) -> bool:
    """Whether two plain values are equal to the bit; NaN equals itself."""
    (tree, arrays), (other_tree, other_arrays) = flatten(one), flatten(other)
    return repr(tree) == repr(other_tree) and all(
        (array.dtype, array.shape, array.tobytes()) == (twin.dtype, twin.shape, twin.tobytes())
        for array, twin in zip(arrays.values(), other_arrays.values(), strict=True)
    )


def _flatten(path: str, value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if type(value) is dict:
        parts = {key: _flatten(f"{path}/{key}", part, arrays) for key, part in value.items()}
        is_json = all(isinstance(key, str) and not key.startswith("$") for key in parts)
        return parts if is_json else {"$items": list(parts.items())}
    if type(value) in (list, tuple):
        items = [_flatten(f"{path}/{index}", part, arrays) for index, part in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, (np.ndarray, np.generic)):
        return _reference(path, value, arrays)
    return value


def _reference(path: str, value: np.ndarray | np.generic, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Adds an array, contiguous and little-endian as in safetensors, and returns what refers to it."""
    while path in arrays:  # dicts can have the keys 1 and "1", or "a/b" and "a"
        path += "~"
    array = np.asarray(value, value.dtype.newbyteorder("<"), order="C")
    reference: dict[str, Any] = {"$array": path}
    if array.dtype.name in _FLOAT8:
        reference["dtype"], array = array.dtype.name, array.view(np.uint8)
    if isinstance(value, np.generic):
        reference["scalar"] = True
    arrays[path] = array
    return reference
