"""For tests: a reader of event files."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader


def read_scalars(folder: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The scalars in the event files of one folder, such as `log_dir/train`, in the order of writing.

    Returns:
        By tag, (steps, values): int64 and float32, of the same shape (points,).
    """
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for step, tag, tensor in _values(folder, "scalars"):
        points[tag].append((step, float(tf.make_ndarray(tensor))))
    return {
        tag: (np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], np.float32))
        for tag, pairs in points.items()
    }


def read_images(folder: str | Path) -> dict[str, list[tuple[int, list[bytes]]]]:
    """The images likewise: by tag, (step, PNG files) in the order of writing."""
    points: dict[str, list[tuple[int, list[bytes]]]] = defaultdict(list)
    for step, tag, tensor in _values(folder, "images"):
        points[tag].append((step, list(tensor.string_val[2:])))  # after width and height
    return dict(points)


def _values(folder, plugin):
    plugins: dict[str, str] = {}  # TensorBoard asks for metadata with the first point of a tag alone
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                plugins.setdefault(value.tag, value.metadata.plugin_data.plugin_name)
                if plugins[value.tag] == plugin:
                    yield event.step, value.tag, value.tensor
