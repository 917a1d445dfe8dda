"""What the time of a training is spent on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

REMEDIES = {
    "data": "waiting for data: cache it, or prepare it in parallel "
    "(`workers` of a PyDataset, `num_parallel_calls` of `map`)",
    "logging": "logging: log fewer values",
    "callbacks": "callbacks: let them do less, or act less often",
    "checkpoints": "checkpoints: save less often (`Checkpoint(every=...)`)",
    "validation": "validation: validate less often (`validation_freq`), or on fewer batches (`validation_steps`)",
}
"""What should take little of a training's time, and what helps otherwise."""

_LARGE, _LONG = 0.1, 1.0  # a share, and seconds


class Costs:
    """The seconds that one call of `fit` spends on each activity, as seen by the thread that calls it, inside `with`.

    Measuring takes a microsecond per graph call, and with data that is not in memory about as long per step.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = dict.fromkeys(("steps", *REMEDIES, "tracing", "other"), 0.0)
        """By activity; "other" is what is left in the laps."""
        self.warnings: list[str] = []
        """What took a second and a tenth of the last lap although it should not, each with its remedy."""
        self._clock = clock
        self._thread: int | None = threading.get_ident()  # None once it has ended
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
        """Ends a lap, and returns the share of each activity in it; together they are 1."""
        (start, before), now = self._before, self._clock()
        lap = max(now - start, 1e-9)
        self.seconds["other"] += max(0.0, lap - sum(self.seconds.values()) + sum(before.values()))
        self._before = now, dict(self.seconds)
        shares = {name: (self.seconds[name] - before[name]) / lap for name in before}
        large = [name for name in REMEDIES if shares[name] > max(_LARGE, _LONG / lap)]
        self.warnings = [f"looplab: {shares[name]:.0%} of the epoch went to {REMEDIES[name]}." for name in large]
        return shares

    def __enter__(self) -> Costs:
        return self

    def __exit__(self, *_: Any) -> None:
        self.lap()
        self._thread = None
