"""Everything that a checkpoint holds: declared once, validated and restored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import tensorflow as tf

from looplab.checkpoint import files
from looplab.checkpoint.files import CheckpointError
from looplab.state import Count, RunState
from looplab.variables import path_of, plain, to_numpy

_REPLICA = re.compile(r"/replica-(\d+)$")  # ends the path of what each replica has of its own


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


def of_replicas(values: dict[str, VariableValue]) -> dict[str, VariableValue]:
    """Those of the values that a replica may have on its own."""
    return {path: value for path, value in values.items() if _REPLICA.search(path)}


def check(variables: dict[str, Any], saved: Saved, replicas: int) -> None:
    """Checks that the values of a checkpoint belong to these variables, of any number of replicas.

    Args:
        variables: Those of this process.
        saved: The checkpoint.
        replicas: How many replicas there are now, on all workers.

    Raises:
        CheckpointError: They do not.
    """
    values = _of_these_replicas(variables, saved.snapshot.variables, replicas)
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


def assign(variables: dict[str, Any], saved: dict[str, VariableValue], replicas: int) -> None:
    """Assigns the values to those variables that have the same path, shape and dtype; `replicas` as for `check`."""
    saved = _of_these_replicas(variables, saved, replicas)
    for path, variable in variables.items():
        if path in saved and _signature(saved[path].value) == _signature(variable):
            variable.assign(saved[path].value)


def replicas_of(paths: Iterable[str]) -> int:
    """How many replicas variables with these paths have."""
    return 1 + max((int(found[1]) for path in paths if (found := _REPLICA.search(path))), default=0)


def _of_these_replicas(
    variables: dict[str, Any], saved: dict[str, VariableValue], replicas: int
) -> dict[str, VariableValue]:
    """Saved values by the paths of these variables, of which there may be another number of replicas.

    What each replica has of its own is combined as TensorFlow does when it reads the whole variable: the sums or means
    of metrics, and otherwise the value of the first replica.
    """
    here, there, found = _by_whole(variables), _by_whole(saved), dict(saved)
    for whole in here.keys() & there.keys():
        variable, values = plain(variables[here[whole][0]]), [saved[path].value for path in there[whole]]
        if {_signature(value) for value in values} != {_signature(variable)}:
            continue
        for path in there[whole]:
            del found[path]
        if len(there[whole]) == (1 if here[whole] == [whole] else replicas):
            found |= {path: saved[path] for path in here[whole]}
            continue
        first, is_sum = values[0], False
        if variable.synchronization == tf.VariableSynchronization.ON_READ:
            is_sum = variable.aggregation == tf.VariableAggregation.SUM
            if is_sum or variable.aggregation == tf.VariableAggregation.MEAN:
                combine = np.sum if is_sum else np.mean
                first = combine(values, axis=0, dtype=values[0].dtype)
        name = saved[there[whole][0]].name
        for path in here[whole]:
            is_first = path in (whole, f"{whole}/replica-0")
            found[path] = VariableValue(name, first if is_first or not is_sum else np.zeros_like(first))
    return found


def _by_whole(paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths of each variable, one for each replica, by that of the whole variable."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(_REPLICA.sub("", path), []).append(path)
    return found


def _signature(value: Any) -> str:
    """The shape and dtype of a variable or an array."""
    has_dtype = hasattr(value, "shape") and hasattr(value, "dtype")
    return f"{tuple(value.shape)} {tf.as_dtype(value.dtype).name}" if has_dtype else "something else"
