"""Errors that users see."""

from __future__ import annotations

import traceback

_WRAPPED = "in user code:"  # as AutoGraph's errors start, whose traceback TensorFlow filters


def raise_own(error: BaseException) -> None:
    """Raises an error of looplab's anew, from here, if TensorFlow or Keras have wrapped one.

    While a step is traced, they wrap each error, and dozens of their frames hide the cause. The errors of users and of
    other libraries stay as they are, of the type that they were.
    """
    origin: BaseException | None = error
    while origin is not None and (_raised_in(origin) in ("tensorflow", "keras") or str(origin).startswith(_WRAPPED)):
        origin = origin.__context__
    if isinstance(origin, (TypeError, ValueError)) and _raised_in(origin) == "looplab":
        raise origin.with_traceback(None) from origin.__cause__
    if origin is not None and type(error).__name__ == "StagingError":  # AutoGraph's, for types that it cannot make
        raise origin


def _raised_in(error: BaseException) -> str:
    """The package that an error was raised in. By the globals: AutoGraph compiles functions to files of its own."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    package, _, module = frames[-1].f_globals.get("__name__", "").partition(".") if frames else ("", "", "")
    return "" if package == "looplab" and module.startswith("recipes") else package
