"""Everything that a checkpoint holds: declared once, validated and restored."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import tensorflow as tf

from looplab.checkpoint.files import MAX_STATE, CheckpointError, damaged, read_arrays, read_state
from looplab.checkpoint.tree import flatten, unflatten
from looplab.state import Count, RunState
from looplab.variables import path_of, to_numpy

_SLACK = 2**28  # bytes, for arrays of callbacks


@dataclasses.dataclass
class VariableValue:
    """The value of a variable, and its name for errors."""

    name: str
    value: Any


@dataclasses.dataclass
class Asked:
    """What a program asked for; a resumed run compares it with what the program asks for now."""

    epochs: Count
    data: dict[str, Any]
    """As in `Batches.described`."""
    made_with: dict[str, dict[str, str]]
    """The settings of the optimizer and the loss, in words."""
    callbacks: dict[str, dict[str, str]]
    """The settings of each callback, in words."""


@dataclasses.dataclass
class Snapshot:
    """The state of a run at one moment."""

    state: RunState
    asked: Asked
    stopped_by: str
    """The callback that has stopped the training; "" if none has."""
    monitored: float | None
    """The value that decides which epoch is best."""
    starts: Annotated[list[Count | None], msgspec.Meta(min_length=2, max_length=2)]
    """How often the datasets of training and validation were iterated over; None if that is unknown."""
    files: dict[str, Count]
    """The length in bytes of each file of the run, by its path in `log_dir`."""
    appended: dict[str, Count]
    """The length in bytes of each file that a callback appends to, by callback and attribute."""
    callbacks: dict[str, dict[str, Any]]
    """The attributes of each callback that the training has changed."""
    variables: dict[str, VariableValue]
    """By the path to what holds them."""


class Saved:
    """A checkpoint on disk, whose files are whole.

    Args:
        path: Its folder.
        verify_arrays: Whether to compare the arrays with their checksum, too.

    Raises:
        CheckpointError: It is not a checkpoint, or damaged, or has a newer format.
    """

    def __init__(self, path: Path, verify_arrays: bool = True):
        self.path = path
        self._tree = read_state(path, verify_arrays)
        self.snapshot = validated(path, self._tree)
        """Without the values of arrays."""

    def load(self, most: int) -> Snapshot:
        """The snapshot with all arrays, which may have `most` bytes in all.

        Raises:
            CheckpointError: They have more, or are malformed.
        """
        arrays = read_arrays(self.path, most)
        try:
            tree = unflatten(self._tree, arrays)
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise damaged(self.path, f"its state refers to arrays that it does not have ({error})") from error
        return validated(self.path, tree)


def encoded(path: Path, snapshot: Snapshot, most: int) -> tuple[bytes, dict[str, np.ndarray]]:
    """A snapshot as JSON and arrays, to be written to `path`.

    Raises:
        CheckpointError: It is malformed.
        TypeError: It has something that a checkpoint cannot hold.
        ValueError: It is too large to be read again, or has more than `most` bytes of arrays.
    """
    tree, arrays = flatten(snapshot)
    validated(path, tree)  # one that cannot be read must not replace one that can
    state, size = json.dumps(tree).encode(), sum(array.nbytes for array in arrays.values())
    if len(state) > MAX_STATE or size > most:
        sizes = {
            f"{key}.{name}": len(json.dumps(value))
            + sum(array.nbytes for at, array in arrays.items() if at.startswith(f"/callbacks/{key}/{name}"))
            for key, attributes in tree["callbacks"].items()
            for name, value in attributes.items()
        }
        raise ValueError(
            f"The checkpoint cannot be written: it would have {size} bytes of arrays and {len(state)} of everything "
            f"else, and at most {most} and {MAX_STATE} can be read. The largest attribute of a callback is "
            f"{max(sizes, key=sizes.__getitem__, default=None)}. Keep fewer numbers in it, or keep them in one array."
        )
    return state, arrays


def validated(path: Path, tree: Any) -> Snapshot:
    """The snapshot in what a checkpoint at `path` holds.

    Raises:
        CheckpointError: It is malformed.
    """
    try:
        snapshot = msgspec.convert(tree, Snapshot)
    except (msgspec.ValidationError, RecursionError) as error:
        raise damaged(path, f"its state is malformed: {error}") from error
    if snapshot.state.epoch > snapshot.state.epochs:
        raise damaged(path, f"its state is malformed: it is in epoch {snapshot.state.epoch} of {snapshot.state.epochs}")
    return snapshot


def most_bytes(variables: dict[str, Any]) -> int:
    """The most that the arrays of a checkpoint may have: callbacks may hold copies of weights, and other arrays."""
    return 16 * sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables.values()) + _SLACK


def values_of(variables: dict[str, Any]) -> dict[str, VariableValue]:
    """The values of variables, copied."""
    return {path: VariableValue(path_of(variable), to_numpy(variable)) for path, variable in variables.items()}


def check(variables: dict[str, Any], saved: dict[str, VariableValue], checkpoint: Path) -> None:
    """Checks that the values belong to these variables.

    Raises:
        CheckpointError: They do not.
    """
    here = {path: _signature(variable) for path, variable in variables.items()}
    there = {path: _signature(value.value) for path, value in saved.items()}
    for path in [*here, *there]:
        if here.get(path) != there.get(path):
            has = f"{saved[path].name}, {there[path]}" if path in there else "nothing"
            needs = f"{path_of(variables[path])}, {here[path]}" if path in here else "nothing"
            where = "`metrics`" if path.startswith("metrics/") else path
            raise CheckpointError(
                f"checkpoint {checkpoint} is of another architecture: at {where} it has {has}, and this trainer has "
                f"{needs}. Create the trainer as it was; to start from its weights alone, use `load_weights`."
            )


def assign(variables: dict[str, Any], saved: dict[str, VariableValue]) -> None:
    """Assigns the values to those variables that have the same path, shape and dtype."""
    for path, variable in variables.items():
        if path in saved and _signature(saved[path].value) == _signature(variable):
            variable.assign(saved[path].value)


def _signature(value: Any) -> str:
    """The shape and dtype of a variable or an array."""
    has_dtype = hasattr(value, "shape") and hasattr(value, "dtype")
    return f"{tuple(value.shape)} {tf.as_dtype(value.dtype).name}" if has_dtype else "something else"
