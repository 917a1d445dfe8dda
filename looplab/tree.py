"""A state, which is a tree of dicts, lists and tuples, as JSON and arrays: what it may hold, and how it is parted."""

from __future__ import annotations

from typing import Any

import numpy as np

from looplab.safetensors import DTYPES


def plain(value: Any) -> bool:
    """Whether a state can have it: numbers, strings, None, arrays, and dicts, lists and tuples of such.

    Of dicts, lists and tuples, those of a subclass are not plain: they would come back as another class.
    """
    if isinstance(value, dict):
        return type(value) is dict and all(isinstance(key, (str, int)) and plain(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(plain, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.name in DTYPES
    return value is None or type(value) in (bool, int, float, str)


def flatten(state: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """A state as JSON has it, and its arrays, each under the path that leads to it; with "~" where two have one path.

    Arrays are brought to the byte order of safetensors.
    """
    arrays: dict[str, np.ndarray] = {}
    return _flatten("", state, arrays), arrays


def _flatten(path: str, value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, (np.ndarray, np.generic)) and plain(value):
        while path in arrays:  # dicts can have the keys 1 and "1", or "a/b" and "a"
            path += "~"
        arrays[path] = np.asarray(value, value.dtype.newbyteorder("<"))
        return {"$array" if isinstance(value, np.ndarray) else "$scalar": path}
    if type(value) is dict:
        inner = {key: _flatten(f"{path}/{key}", part, arrays) for key, part in value.items()}
        simple = all(isinstance(key, str) and not key.startswith("$") for key in inner)
        return inner if simple else {"$items": [[key, part] for key, part in inner.items()]}
    if type(value) in (list, tuple):
        parts = [_flatten(f"{path}/{index}", part, arrays) for index, part in enumerate(value)]
        return parts if type(value) is list else {"$tuple": parts}
    if not plain(value):
        raise TypeError(f"A checkpoint cannot hold {path.strip('/')}, of type {type(value).__name__}.")
    return value


def unflatten(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The state that `flatten` was given."""
    if isinstance(tree, list):
        return [unflatten(part, arrays) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if "$array" in tree:
        return arrays[tree["$array"]]
    if "$scalar" in tree:
        return arrays[tree["$scalar"]][()]
    if "$tuple" in tree:
        return tuple(unflatten(part, arrays) for part in tree["$tuple"])
    if "$items" in tree:
        return {key: unflatten(part, arrays) for key, part in tree["$items"]}
    return {key: unflatten(part, arrays) for key, part in tree.items()}
