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

    def left(self, done: int) -> int | None:
        """Starts or stops if that is due after so many steps; returns how many are left until it is due again."""
        if self._steps is None:
            return None
        first, last = self._steps
        if self._is_running and done >= last:
            self._stop()
        elif done == first - 1:
            tf.profiler.experimental.start(f"{self._log_dir}/train")
            self._is_running = True
        return next((number - done for number in (first - 1, last) if number > done), None)

    def _stop(self) -> None:
        self._is_running = False
        tf.profiler.experimental.stop()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_running:
            self._stop()
            warn("`profile_steps`: the training ended before the last of these steps, and the profile with it.")
