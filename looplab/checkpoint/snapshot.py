"""Everything that a checkpoint holds: declared once, validated and restored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import tensorflow as tf

from looplab.checkpoint import files
from looplab.checkpoint.files import CheckpointError
from looplab.state import Count, RunState
from looplab.variables import path_of, to_numpy


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
    starts: Annotated[list[Count | None], msgspec.Meta(min_length=2, max_length=2)]
    """How often the datasets of training and validation were iterated over; None if that is unknown."""
    files: dict[str, Count]
    """The length in bytes of each event file of the run, by its path in `log_dir`."""
    appended: dict[str, Count]
    """The length in bytes of each file that a callback appends to, by callback and attribute."""
    callbacks: dict[str, dict[str, Any]]
    """The attributes of each callback that the training has changed."""
    variables: dict[str, VariableValue]
    """By the path to what holds them."""


class Saved(NamedTuple):
    """A checkpoint on disk, and what it holds."""

    path: Path
    snapshot: Snapshot


def read(path: Path) -> Saved:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: It is not a checkpoint, or damaged, or has a newer format.
    """
    tree = files.read(path)
    try:
        snapshot = msgspec.convert(tree, Snapshot)
    except (msgspec.ValidationError, RecursionError) as error:
        raise files.damaged(path, f"its state is malformed: {error}") from error
    state = snapshot.state
    if state.epoch > state.epochs:
        raise files.damaged(path, f"its state is malformed: it is in epoch {state.epoch} of {state.epochs}")
    return Saved(path, snapshot)


def values_of(variables: dict[str, Any]) -> dict[str, VariableValue]:
    """The values of variables, copied."""
    return {path: VariableValue(path_of(variable), to_numpy(variable)) for path, variable in variables.items()}


def check(variables: dict[str, Any], saved: Saved) -> None:
    """Checks that the values of a checkpoint belong to these variables.

    Raises:
        CheckpointError: They do not.
    """
    values = saved.snapshot.variables
    here = {path: _signature(variable) for path, variable in variables.items()}
    there = {path: _signature(value.value) for path, value in values.items()}
    for path in [*here, *there]:
        if here.get(path) != there.get(path):
            has = f"{values[path].name}, {there[path]}" if path in there else "nothing"
            needs = f"{path_of(variables[path])}, {here[path]}" if path in here else "nothing"
            where = "`metrics`" if path.startswith("metrics/") else path
            raise CheckpointError(
                f"checkpoint {saved.path} is of another architecture: at {where} it has {has}, and this trainer has "
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
