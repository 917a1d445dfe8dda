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


class RunWriter:
    """The event files of one run, in `log_dir/train` and `log_dir/validation`; without `log_dir` it writes nothing."""

    def __init__(self, log_dir: Path | None):
        self._log_dir = log_dir
        self._writers: dict[str, _Writer] = {}

    @property
    def begun(self) -> bool:
        """Whether it has written anything."""
        return bool(self._writers)

    def steps(self, folder: str, first: int, values: dict[str, np.ndarray], began: float) -> None:
        """Writes a point of each tag for each step from `first` on; the steps ran from `began` (`time.time()`) on."""
        if self._log_dir is not None and values:
            self._writer(folder).steps(first, list(values), np.stack(list(values.values()), 1), began)

    def scalars(self, folder: str, step: int, values: dict[str, float]) -> None:
        """Writes one point of each tag."""
        self.steps(folder, step, {tag: np.array([value]) for tag, value in values.items()}, time.time())

    def images(self, folder: str, step: int, files: dict[str, Sequence[bytes]]) -> None:
        """Writes PNG files as the images of each tag."""
        if self._log_dir is not None:
            for tag, pictures in files.items():
                self._writer(folder).image(step, tag, pictures)

    def close(self) -> None:
        """Ends the files; a later write begins others, which TensorBoard shows as their continuation."""
        for writer in self._writers.values():
            writer.close()

    def _writer(self, folder: str) -> _Writer:
        assert self._log_dir is not None
        return self._writers.setdefault(folder, _Writer(self._log_dir / folder))


class _Writer:
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
        if list(tags) != self._tags:
            self._tags = list(tags)
            self._template = Event(summary=Summary(value=[_scalar(tag) for tag in tags]))
        file, event, values = self._open(), self._template, [value.tensor for value in self._template.summary.value]
        times = np.linspace(began, time.time(), len(rows) + 1)[1:]
        with np.errstate(over="ignore"):  # beyond float32 a point is infinite, as in `tf.summary`
            rows = rows.astype(np.float32)
        for index, (moment, row) in enumerate(zip(times.tolist(), rows, strict=True)):
            event.step, event.wall_time = first + index, moment
            for tensor, value in zip(values, row.tolist(), strict=True):
                tensor.float_val[0] = value
            file.write(event.SerializeToString())
        file.flush()  # so that TensorBoard shows them at once

    def image(self, step: int, tag: str, files: Sequence[bytes]) -> None:
        width, height = struct.unpack(">II", files[0][16:24])  # of the first chunk, which is always the header
        content = [str(width).encode(), str(height).encode(), *files]
        tensor = TensorProto(dtype=DT_STRING, string_val=content)
        tensor.tensor_shape.dim.add(size=len(content))
        value = Summary.Value(tag=tag, tensor=tensor, metadata=_metadata("images", DATA_CLASS_BLOB_SEQUENCE))
        file = self._open()
        file.write(Event(step=step, wall_time=time.time(), summary=Summary(value=[value])).SerializeToString())
        file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> tf.io.TFRecordWriter:
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files of a folder in the order of their names.
            moment = time.time()
            name = f"events.out.tfevents.{int(moment):010d}.{socket.gethostname()}.{os.getpid()}.{next(_count):06d}.v2"
            self._file = tf.io.TFRecordWriter(str(self.folder / name))
            self._file.write(Event(wall_time=moment, file_version="brain.Event:2").SerializeToString())
        return self._file


def _metadata(plugin: str, data_class: int) -> SummaryMetadata:
    return SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin), data_class=data_class)


def _scalar(tag: str) -> Summary.Value:
    tensor = TensorProto(dtype=DT_FLOAT, float_val=[0.0])
    return Summary.Value(tag=tag, tensor=tensor, metadata=_metadata("scalars", DATA_CLASS_SCALAR))
