"""When a trainer saves its state, and what it keeps."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Literal

import keras

from looplab import checks
from looplab.compat import direction

_EVERY = re.compile(r"(?:(\d+) )?(step|epoch|second)s?")


@checks.named
@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When a trainer saves all its state to `log_dir/checkpoints`, and what it keeps there.

    Args:
        every: A whole number of steps, "epoch", or a number with its unit: "500 steps", "2 epochs", "600 seconds".
        keep: How many of the newest checkpoints to keep.
        monitor: A name in the logs of an epoch, such as "val_loss". The best epoch by this value is saved, whatever
            `every` is, and kept, for `Trainer.restore("best")`.
        mode: Whether the "min" or the "max" of `monitor` is best; "auto" asks the metric with that name.

    Raises:
        ValueError: An argument has another value.

    Example:
        >>> import looplab
        >>> looplab.Checkpoint(every=500, keep=3, monitor="val_loss")
        Checkpoint(every=500, keep=3, monitor='val_loss', mode='auto')
        >>> looplab.Checkpoint(every="10 minutes")
        Traceback (most recent call last):
        ValueError: `every` must be a whole number of steps (at least 1), "epoch", or ...; got '10 minutes'.
    """

    every: int | str = "epoch"
    keep: int = 2
    monitor: str | None = None
    mode: Literal["auto", "min", "max"] = "auto"

    def __post_init__(self) -> None:
        _ = self.interval
        checks.whole(1, "keep", self.keep)
        if self.monitor is not None and not isinstance(self.monitor, str):
            raise ValueError(f"`monitor` must be a name in the logs of an epoch, or None; got {self.monitor!r}.")
        if self.mode not in ("auto", "min", "max"):
            raise ValueError(f'`mode` must be "auto", "min" or "max"; got {self.mode!r}.')
        if self.mode != "auto" and self.monitor is None:
            raise ValueError(f"`mode` is {self.mode!r}, but there is no `monitor`. Name what should be best.")

    @property
    def interval(self) -> tuple[int, str]:
        """`every` as a number and its unit: "step", "epoch" or "second"."""
        is_number = isinstance(self.every, int) and not isinstance(self.every, bool)
        text = f"{self.every} steps" if is_number else self.every
        match = _EVERY.fullmatch(text) if isinstance(text, str) else None
        if match is None or int(match[1] or 1) == 0:
            raise ValueError(
                f'`every` must be a whole number of steps (at least 1), "epoch", or a number with its unit, such as '
                f'"2 epochs" or "600 seconds"; got {self.every!r}.'
            )
        return int(match[1] or 1), match[2]


def lower_is_better(monitor: str, mode: str, metrics: Iterable[keras.Metric]) -> bool:
    """Whether a lower value in the logs is better: by `mode`, or if that is "auto", by the metric with its name.

    Raises:
        ValueError: `mode` is "auto", and no loss or metric with that name has a direction.
    """
    name = monitor.removeprefix("val_")
    if mode != "auto":
        return mode == "min"
    if "loss" in name:
        return True
    for metric in metrics:
        if metric.name == name and direction(metric) in ("up", "down"):
            return direction(metric) == "down"
    raise ValueError(
        f'`monitor` is {monitor!r}, but it is unknown whether lower is better. Pass `mode="min"` or "max".'
    )
