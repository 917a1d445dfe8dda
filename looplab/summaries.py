"""What TensorBoard shows of a run: scalars of many steps in one go, images, a graph, hyperparameters, embeddings."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, DATA_CLASS_SCALAR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.plugins.hparams.api import hparams_pb
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from looplab.projector import Embeddings
from looplab.warn import warn

_MOST_BYTES = 2**20  # of a file of hyperparameters: a larger one is no such
_FOLDERS = ("train", "validation")
_count = itertools.count()


class RunWriter:
    """The event files of one run, in `log_dir/train` and `log_dir/validation`; without `log_dir` it writes nothing."""

    def __init__(self, log_dir: Path | None):
        self._log_dir = log_dir
        self._writers: dict[str, _Writer] = {}
        self._has_graph = False

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

    def graph(self, folder: str, graph: tf.Graph | None) -> None:
        """Writes the first graph that comes; TensorBoard shows one of a folder."""
        if self._log_dir is not None and graph is not None and not self._has_graph:
            self._has_graph = True
            content = graph.as_graph_def(add_shapes=True).SerializeToString()
            self._writer(folder).write(Event(wall_time=time.time(), graph_def=content))

    def hparams(self, values: dict[str, Any]) -> None:
        """Writes hyperparameters, and those of earlier calls again, to `log_dir` itself.

        TensorBoard takes those of a folder as the hyperparameters of all folders below it, and keeps the first that it
        finds in a folder's files: so each call replaces the file of the one before.
        """
        if self._log_dir is not None:
            before = self._hparams_files()
            shown = dict(itertools.chain(*(file.items() for file in before.values())))
            now = shown | {name: _hparam(value) for name, value in values.items()}
            if len(before) == 1 and now == shown:
                return
            writer = self._writer("")
            # By default runs of the same hyperparameters would be one row, with the means of their metrics.
            summary = hparams_pb(now, trial_id="")
            writer.write(Event(wall_time=time.time(), summary=summary))
            writer.close()
            for file in before:
                file.unlink()

    def _hparams_files(self) -> dict[Path, dict[str, Any]]:
        """The event files in `log_dir` itself that have hyperparameters and nothing else, and these."""
        assert self._log_dir is not None
        files = [file for file in sorted(self._log_dir.glob("events.out.tfevents.*")) if not file.is_symlink()]
        read = {file: _read_hparams(file) for file in files if file.stat().st_size < _MOST_BYTES}
        return {file: values for file, values in read.items() if values is not None}

    def embeddings(self, folder: str, embeddings: Embeddings) -> None:
        """Writes vectors, and what to show at each, for the projector; they replace those of the same name."""
        if self._log_dir is not None:
            self._writer(folder).begin()  # the projector looks into folders that have event files
            embeddings.write(self._log_dir / folder)

    def close(self) -> None:
        """Ends the files; a later write begins others, which TensorBoard shows as their continuation."""
        for writer in self._writers.values():
            writer.close()

    def files(self) -> list[Path]:
        """The event files of steps and epochs, also those of earlier processes."""
        folders = () if self._log_dir is None else (self._log_dir / folder for folder in _FOLDERS)
        own = (folder for folder in folders if not folder.is_symlink())
        files = (file for folder in own for file in folder.glob("events.out.tfevents.*"))
        return sorted(file for file in files if file.is_file() and not file.is_symlink())

    def sizes(self) -> dict[str, int]:
        """How many bytes each of them has, by its path in `log_dir`."""
        assert self._log_dir is not None
        return {str(file.relative_to(self._log_dir)): file.stat().st_size for file in self.files()}

    def remove(self) -> None:
        """Removes all event files, also those of hyperparameters."""
        for file in [*self.files(), *self._hparams_files()]:
            file.unlink()

    def rewind(self, sizes: dict[str, int]) -> None:
        """Removes all that was written since `sizes` told; what is written from now on goes to new files."""
        self.close()
        assert self._log_dir is not None
        for file in self.files():
            name = str(file.relative_to(self._log_dir))
            if name not in sizes:
                file.unlink()
            elif file.stat().st_size > sizes[name]:
                os.truncate(file, sizes[name])
            elif file.stat().st_size < sizes[name]:
                warn(f"{file} was longer when it was saved: points are missing.")
        if missing := [name for name in sizes if not (self._log_dir / name).exists()]:
            warn(f"{self._log_dir} lacks {', '.join(missing)}: points are missing.")
        self._writers.clear()

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
        self.path: Path | None = None
        self._file: tf.io.TFRecordWriter | None = None
        self._template = Event()
        self._tags: Sequence[str] = ()

    def steps(self, first: int, tags: Sequence[str], rows: np.ndarray, began: float) -> None:
        if list(tags) != self._tags:
            self._tags = list(tags)
            self._template = Event(summary=Summary(value=[_scalar(tag) for tag in tags]))
        event, values = self._template, [value.tensor for value in self._template.summary.value]
        times = np.linspace(began, time.time(), len(rows) + 1)[1:]
        with np.errstate(over="ignore"):  # beyond float32 a point is infinite, as in `tf.summary`
            rows = rows.astype(np.float32)
        with self._writing() as file:
            for index, (moment, row) in enumerate(zip(times.tolist(), rows, strict=True)):
                event.step, event.wall_time = first + index, moment
                for tensor, value in zip(values, row.tolist(), strict=True):
                    tensor.float_val[0] = value
                file.write(event.SerializeToString())

    def image(self, step: int, tag: str, files: Sequence[bytes]) -> None:
        width, height = struct.unpack(">II", files[0][16:24])  # of the first chunk, which is always the header
        content = [str(width).encode(), str(height).encode(), *files]
        tensor = TensorProto(dtype=DT_STRING, string_val=content)
        tensor.tensor_shape.dim.add(size=len(content))
        value = Summary.Value(tag=tag, tensor=tensor, metadata=_metadata("images", DATA_CLASS_BLOB_SEQUENCE))
        self.write(Event(step=step, wall_time=time.time(), summary=Summary(value=[value])))

    def write(self, event: Event) -> None:
        with self._writing() as file:
            file.write(event.SerializeToString())

    def begin(self) -> None:
        """Makes the file, without anything in it, if there was none yet."""
        if self.path is None:
            with self._writing():
                pass

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[tf.io.TFRecordWriter]:
        """Within it records can be written; at its end TensorBoard sees them."""
        try:
            file = self._open()
            yield file
            file.flush()
        except tf.errors.OpError as error:
            file, self._file = self._file, None  # half a record may be in it: what follows goes to another
            with contextlib.suppress(tf.errors.OpError):
                if file is not None:
                    file.close()
            raise OSError(f"The event file {self.path} could not be written: {error.message}") from error

    def _open(self) -> tf.io.TFRecordWriter:
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files of a folder in the order of their names.
            moment = time.time()
            name = f"events.out.tfevents.{int(moment):010d}.{socket.gethostname()}.{os.getpid()}.{next(_count):06d}.v2"
            self.path = self.folder / name
            self._file = tf.io.TFRecordWriter(str(self.path))
            self._file.write(Event(wall_time=moment, file_version="brain.Event:2").SerializeToString())
        return self._file


def _read_hparams(file: Path) -> dict[str, Any] | None:
    """The hyperparameters in an event file; None where it has none, or anything else."""
    shown: dict[str, Any] | None = None
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            plugin = value.metadata.plugin_data
            data = HParamsPluginData.FromString(plugin.content) if plugin.plugin_name == PLUGIN_NAME else None
            if data is None or data.WhichOneof("data") != "session_start_info":
                return None
            hparams = data.session_start_info.hparams
            shown = (shown or {}) | {name: getattr(v, v.WhichOneof("kind")) for name, v in hparams.items()}
    return shown


def _metadata(plugin: str, data_class: int) -> SummaryMetadata:
    return SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin), data_class=data_class)


def _scalar(tag: str) -> Summary.Value:
    tensor = TensorProto(dtype=DT_FLOAT, float_val=[0.0])
    return Summary.Value(tag=tag, tensor=tensor, metadata=_metadata("scalars", DATA_CLASS_SCALAR))


def _hparam(value: Any) -> bool | int | float | str:
    """As TensorBoard can show it; it leaves out numbers that are not finite."""
    if getattr(value, "shape", None) == ():
        value = np.asarray(value).item()
    plain = isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else str(value)
