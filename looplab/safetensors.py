"""Arrays in the format of safetensors: eight bytes with the header's length, the header as JSON, the data.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from typing import IO, Any

import numpy as np
import tensorflow as tf

MOST_HEADER = 2**24  # bytes
DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64"},
}


def header(arrays: dict[str, np.ndarray]) -> bytes:
    """The header of a safetensors file, as JSON."""
    entries: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        entries[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    return text + b" " * (-len(text) % 8)


def parts(head: bytes, arrays: dict[str, np.ndarray]) -> Iterable[Any]:
    """The parts of a safetensors file."""
    yield struct.pack("<Q", len(head)) + head
    for array in arrays.values():
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def parse(file: IO[bytes], most: int) -> dict[str, np.ndarray]:
    """The arrays; ValueError, KeyError, TypeError or struct.error where the file is malformed."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MOST_HEADER:
        raise ValueError(f"its header has {length} bytes")
    entries = json.loads(file.read(length))
    names = {short: name for name, short in DTYPES.items()}
    arrays: dict[str, np.ndarray] = {}
    end = 0
    for name, entry in entries.items():
        dtype = np.dtype(tf.as_dtype(names[entry["dtype"]]).as_numpy_dtype).newbyteorder("<")
        shape = [int(size) for size in entry["shape"]]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        if min([0, *shape]) < 0 or entry["data_offsets"] != [begin, end]:
            raise ValueError(f"{name} of shape {shape} and {dtype.name} cannot be at {entry['data_offsets']}")
        if end > most:
            raise ValueError(f"it has more than {most} bytes, and is not of this trainer")
        arrays[name] = np.frombuffer(bytearray(file.read(end - begin)), dtype).reshape(shape)
    return arrays
