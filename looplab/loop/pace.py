"""How many steps one graph call runs."""

from __future__ import annotations


class Pace:
    """How many steps the next graph call runs: a fixed number, or as many as take `seconds`.

    Args:
        steps: A number, or "auto".
        seconds: What a call should take with "auto".
        start: The steps of the first call with "auto".
    """

    def __init__(self, steps: int | str, seconds: float = 0.2, start: int = 1):
        self._is_auto = steps == "auto"
        self._seconds = seconds
        self.steps = start if self._is_auto else int(steps)

    def next(self, *left: int) -> int:
        """The number of steps of the next call, at most the given ones."""
        return min([self.steps, *left])

    def took(self, steps: int, seconds: float) -> None:
        """Adapts to a call; to at most ten times the pace, because the first call is much slower."""
        if self._is_auto and steps:
            self.steps = max(1, min(int(self._seconds * steps / max(seconds, 1e-9)), 10 * self.steps))
