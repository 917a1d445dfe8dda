"""A profile of some training steps, for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf

from looplab.warn import warn


class Profile:
    """Profiles training steps, inside `with`.

    Args:
        steps: The first and the last one, from 1; None profiles nothing.
        log_dir: Of the trainer.
    """

    def __init__(self, steps: tuple[int, int] | None, log_dir: Path | None):
        self._steps = steps
        self._log_dir = log_dir
        self._is_running = False
        self._start = self._done = 0

    def left(self, done: int) -> int | None:
        """Starts or stops if that is due after so many steps; returns how many are left until it is due again."""
        if self._steps is None:
            return None
        (first, last), self._done = self._steps, done
        if self._is_running and done >= last:
            self._stop()
        elif not self._is_running and first - 1 <= done < last:  # a resumed training may start between them
            tf.profiler.experimental.start(f"{self._log_dir}/train")
            self._is_running, self._start = True, done + 1
        return next((number - done for number in (first - 1, last) if number > done), None)

    def _stop(self, save: bool = True) -> None:
        self._is_running = False
        tf.profiler.experimental.stop(save)

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        ended = f"`profile_steps`: the training ended at step {self._done}"
        has_steps = self._is_running and self._done >= self._start
        if self._is_running:
            self._stop(has_steps)
        if has_steps:
            warn(f"{ended}; the profile has steps {self._start} to {self._done}.")
        elif self._steps is not None and self._done < self._steps[0] and error is None:
            warn(f"{ended}, before the first of these steps, {self._steps[0]}: no profile was written.")
