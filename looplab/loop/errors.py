"""Errors that users see."""

from __future__ import annotations

import traceback
from collections.abc import Iterable

import keras
import tensorflow as tf

_WRAPPED = "in user code:"  # the start of AutoGraph's errors, whose tracebacks TensorFlow filters


class NoBatchError(ValueError):
    """The data of a pass has no batch."""


def raise_own(error: BaseException) -> None:
    """Raises the error of looplab that TensorFlow or Keras have wrapped in `error`, if there is one.

    They wrap each error that is raised while a step is traced, and dozens of their frames hide its cause. Errors of
    users and of other libraries stay as they are.
    """
    origin: BaseException | None = error
    while origin is not None and (_raised_in(origin) in ("tensorflow", "keras") or str(origin).startswith(_WRAPPED)):
        origin = origin.__context__
    if isinstance(origin, (TypeError, ValueError)) and _raised_in(origin) == "looplab":
        raise origin.with_traceback(None) from origin.__cause__
    if origin is not None and type(error).__name__ == "StagingError":  # AutoGraph's, for types that it cannot create
        raise origin


def raise_if_stateful(error: BaseException, layers: Iterable[keras.Layer]) -> None:
    """Explains an error about shapes if there are recurrent layers whose states have a fixed number of rows."""
    stateful = [layer for layer in layers if getattr(layer, "stateful", False) and getattr(layer, "states", None)]
    if stateful and isinstance(error, tf.errors.InvalidArgumentError) and "ncompatible shapes" in error.message:
        rows = tf.nest.flatten(stateful[0].states)[0].shape[0]
        raise ValueError(
            f"A batch has another number of rows than the states of the stateful layer '{stateful[0].name}', {rows}. "
            f"Give all batches {rows} rows: arrays that {rows} divides with `batch_size={rows}`, or a dataset with "
            f"`batch({rows}, drop_remainder=True)`."
        ) from error


def _raised_in(error: BaseException) -> str:
    """The package that raised an error. The globals name it; the file may be one that AutoGraph has generated."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    package, _, module = frames[-1].f_globals.get("__name__", "").partition(".") if frames else ("", "", "")
    return "" if package == "looplab" and module.startswith("recipes") else package
