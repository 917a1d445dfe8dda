"""What the time of a training is spent on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

REMEDIES = {
    "data": "waiting for data: prefetch or cache it",
    "logging": "logging: log fewer values",
    "callbacks": "callbacks: act on fewer batches",
    "checkpoints": "saving: save less often",
    "validation": "validation: pass `validation_freq`",
}
"""What should take little of a training's time, and what helps otherwise."""

_LARGE, _LONG = 0.1, 1.0  # a share, and seconds


class Costs:
    """The seconds that one call of `fit` spends on each activity, as seen by the thread that calls it.

    Measuring takes a microsecond per graph call, and with data that is not in memory about as long per step.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = {"steps": 0.0} | dict.fromkeys(REMEDIES, 0.0)
        """By activity; tracing and what is left belong to none."""
        self.lap_seconds = 0.0
        self.shares: dict[str, float] = {}
        """Of each activity in the last lap."""
        self._clock = clock
        self._thread = threading.get_ident()
        self._is_running = False
        self._before = self._clock(), dict(self.seconds)

    @contextlib.contextmanager
    def of(self, activity: str) -> Iterator[None]:
        """Counts the time inside it as that of an activity, unless it already counts as that of another."""
        if self._is_running or threading.get_ident() != self._thread:
            yield
            return
        self._is_running, start = True, self._clock()
        try:
            yield
        finally:
            self.seconds[activity] += self._clock() - start
            self._is_running = False

    def waited(self, seconds: float) -> None:
        """Moves the time that steps have waited for data from them."""
        if not self._is_running and threading.get_ident() == self._thread:
            self.seconds["steps"] -= seconds
            self.seconds["data"] += seconds

    def lap(self) -> dict[str, float]:
        """Ends a lap, and returns its shares."""
        start, before = self._before
        self._before = now, seconds = self._clock(), dict(self.seconds)
        self.lap_seconds = now - start
        self.shares = {name: (seconds[name] - before[name]) / self.lap_seconds for name in seconds}
        return self.shares

    @property
    def warning(self) -> str:
        """What took a second and a tenth of the last lap although it should not, and the remedy; "" for nothing."""
        least = max(_LARGE, _LONG / max(self.lap_seconds, 1e-9))
        large = {name: share for name in REMEDIES if (share := self.shares.get(name, 0)) > least}
        return ", ".join(f"{share:.0%} {REMEDIES[name]}" for name, share in large.items())
