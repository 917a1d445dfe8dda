"""Hyperparameters as TensorBoard's HPARAMS tab reads them: an event file for all folders below its own."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.api import hparams_pb
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

_MOST_BYTES = 2**20  # of a file of hyperparameters: a larger one has something else


def summary(values: dict[str, Any]) -> Summary:
    """Hyperparameters of one run; those of another run with the same values stay apart."""
    return hparams_pb(values, trial_id="")  # the default, a hash, would show both as one row with their mean metrics


def plain(value: Any) -> bool | int | float | str:
    """A value as TensorBoard can show it; it leaves out numbers that are not finite."""
    if getattr(value, "shape", None) == ():
        value = np.asarray(value).item()
    shown = isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
    return value if shown else str(value)


def files(log_dir: Path) -> dict[Path, dict[str, Any]]:
    """The event files in `log_dir` itself that have hyperparameters and nothing else, and these."""
    found = [file for file in sorted(log_dir.glob("events.out.tfevents.*")) if not file.is_symlink()]
    read = {file: _read(file) for file in found if file.stat().st_size < _MOST_BYTES}
    return {file: values for file, values in read.items() if values is not None}


def _read(file: Path) -> dict[str, Any] | None:
    """The hyperparameters in an event file; None where it has none, or anything else."""
    shown: dict[str, Any] | None = None
    for event in EventFileLoader(os.fsencode(file)).Load():
        for value in event.summary.value:
            plugin = value.metadata.plugin_data
            data = HParamsPluginData.FromString(plugin.content) if plugin.plugin_name == PLUGIN_NAME else None
            if data is None or data.WhichOneof("data") != "session_start_info":
                return None
            hparams = data.session_start_info.hparams
            shown = (shown or {}) | {name: getattr(v, v.WhichOneof("kind")) for name, v in hparams.items()}
    return shown
