"""Event files for TensorBoard: the scalars of many steps in one go, and images."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, DATA_CLASS_SCALAR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING

_count = itertools.count()


class Writer:
    """Writes one event file into `folder`, made at the first write.

    An event file is a TFRecord file of `Event` messages. Writing them here costs some 6 µs a step for all scalars
    together; `tf.summary.scalar` costs 40 µs (in a graph) to 630 µs (eagerly) for each.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: tf.io.TFRecordWriter | None = None
        self._template = Event()
        self._tags: Sequence[str] = ()

    def steps(self, first: int, tags: Sequence[str], rows: np.ndarray, began: float) -> None:
        """Writes `rows`, shape (steps, tags), at the steps from `first`, which ran from `began` (`time.time()`) on."""
        if list(tags) != self._tags:
            self._tags = list(tags)
            self._template = Event(summary=Summary(value=[_scalar(tag) for tag in tags]))
        event, values = self._template, [value.tensor for value in self._template.summary.value]
        times = np.linspace(began, time.time(), len(rows) + 1)[1:]
        for index, (moment, row) in enumerate(zip(times.tolist(), rows.astype(np.float32), strict=True)):
            event.step, event.wall_time = first + index, moment
            for tensor, value in zip(values, row.tolist(), strict=True):
                tensor.float_val[0] = value
            self._write(event)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one point of each tag."""
        self.steps(step, list(values), np.array([list(values.values())]), time.time())

    def image(self, step: int, tag: str, files: Sequence[bytes]) -> None:
        """Writes PNG files as the images of one tag."""
        width, height = struct.unpack(">II", files[0][16:24])  # of the first chunk, which is always the header
        content = [str(width).encode(), str(height).encode(), *files]
        tensor = TensorProto(dtype=DT_STRING, string_val=content)
        tensor.tensor_shape.dim.add(size=len(content))
        value = Summary.Value(tag=tag, tensor=tensor, metadata=_metadata("images", DATA_CLASS_BLOB_SEQUENCE))
        self._write(Event(step=step, wall_time=time.time(), summary=Summary(value=[value])))

    def flush(self) -> None:
        """Lets TensorBoard see all that was written."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Ends the file; a later write begins another, which TensorBoard shows as its continuation."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, event: Event) -> None:
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files of a folder in the order of their names.
            moment = time.time()
            name = f"events.out.tfevents.{int(moment):010d}.{socket.gethostname()}.{os.getpid()}.{next(_count):06d}.v2"
            self._file = tf.io.TFRecordWriter(str(self.folder / name))
            self._file.write(Event(wall_time=moment, file_version="brain.Event:2").SerializeToString())
        self._file.write(event.SerializeToString())


def _metadata(plugin: str, data_class: int) -> SummaryMetadata:
    return SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin), data_class=data_class)


def _scalar(tag: str) -> Summary.Value:
    tensor = TensorProto(dtype=DT_FLOAT, float_val=[0.0])
    return Summary.Value(tag=tag, tensor=tensor, metadata=_metadata("scalars", DATA_CLASS_SCALAR))
