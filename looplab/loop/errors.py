"""Errors that users see."""

from __future__ import annotations

import traceback

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


def _raised_in(error: BaseException) -> str:
    """The package that raised an error. The globals name it; the file may be one that AutoGraph has generated."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    package, _, module = frames[-1].f_globals.get("__name__", "").partition(".") if frames else ("", "", "")
    return "" if package == "looplab" and module.startswith("recipes") else package
