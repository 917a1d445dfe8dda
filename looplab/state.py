"""Where a run is: each counter and position that decides how it continues, declared once."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import msgspec
import numpy as np

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


@dataclasses.dataclass
class Means:
    """Means of scalars over steps, each weighted by the number of examples in its batch.

    They are summed one step at a time, so that they do not depend on how many steps a graph call runs.
    """

    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    weight: float = 0.0

    def add(self, weights: np.ndarray, scalars: dict[str, np.ndarray]) -> None:
        """Adds steps: all arrays have shape (steps,). A batch without examples has no values, and does not count."""
        for weight in weights.tolist():
            self.weight += weight
        for name, values in scalars.items():
            total = self.sums.get(name, 0.0)
            for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
                if weight:
                    total += value * weight
            self.sums[name] = total

    def result(self) -> dict[str, float]:
        """The means so far; NaN before the first example."""
        return {name: total / self.weight if self.weight else math.nan for name, total in self.sums.items()}


@dataclasses.dataclass
class Progress:
    """How far a pass over the data is."""

    batches: Count = 0
    """Batches done."""
    ended: bool = False
    """Whether the data has no more."""
    faults: Count = 0
    """Steps that were skipped since the last sound one, also in earlier epochs."""
    means: Means = dataclasses.field(default_factory=Means)
    """Of what the steps returned."""


@dataclasses.dataclass
class RunState:
    """The state of a run, apart from its variables, its callbacks and the length of its files."""

    seed: int
    """Of the order of the data and of `seed_generator`."""
    steps: Count = 0
    """Training steps since the trainer was created."""
    epochs: Count = 0
    """Completed epochs."""
    test_steps: Count = 0
    """Validation steps that TensorBoard shows."""
    skipped_steps: Count = 0
    """Training steps that were not applied, because their numbers were not finite."""
    fits: Count = 0
    """Completed calls of `fit`."""
    epoch: Count = 0
    """The running epoch of the running `fit`, from 0."""
    in_epoch: bool = False
    """Whether `on_epoch_begin` was called for it."""
    progress: Progress = dataclasses.field(default_factory=Progress)
    """Of the running epoch."""
    logs: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of the last completed epoch."""
    updates: dict[str, Count] = dataclasses.field(default_factory=dict)
    """How many updates each optimizer, by path, had made when the running `fit` started."""

    def replace_by(self, other: RunState) -> None:
        """Takes over all fields of another state."""
        vars(self).update(vars(other))
