"""Hyperparameters as TensorBoard's HPARAMS tab reads them."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.api import hparams_pb

FILE = "events.out.tfevents.0000000000.hparams"
"""The event file in `log_dir` with the hyperparameters of the run. It sorts first: of several event files in a folder,
TensorBoard reads only the last one as it grows."""


def event(values: dict[str, Any]) -> Event:
    """The hyperparameters of a run, which is a row of its own even if another run has the same ones."""
    plain = {name: _plain(value) for name, value in values.items()}
    # The default `trial_id`, a hash of the values, would merge runs with equal values into one row.
    return Event(wall_time=time.time(), summary=hparams_pb(plain, trial_id=""))


def _plain(value: Any) -> bool | int | float | str:
    """A value that TensorBoard can show; it would leave out numbers that are not finite."""
    if getattr(value, "shape", None) == ():
        value = np.asarray(value).item()
    is_shown = isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
    return value if is_shown else str(value)
