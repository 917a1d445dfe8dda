"""What TensorBoard shows of a run: scalars of many steps in one go, images, a graph, hyperparameters, embeddings."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, DATA_CLASS_SCALAR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING

from looplab import hparams
from looplab.lock import FOLDERS, FolderLock
from looplab.projector import Embeddings
from looplab.warn import warn

_count = itertools.count()


class RunWriter:
    """The event files of one run, in `log_dir/train` and `log_dir/validation`; without `log_dir` it writes nothing.

    A file stays open until the writer is garbage collected or the run is rewound, so that each process has one in each
    folder. All that was written is on its way to the disk, and visible to TensorBoard, when a method returns.

    Whoever writes must be within `owning`.
    """

    def __init__(self, log_dir: Path | None):
        self._log_dir = log_dir
        self._lock = None if log_dir is None else FolderLock(log_dir)
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
            before = hparams.files(self._log_dir)
            shown = dict(itertools.chain(*(file.items() for file in before.values())))
            now = shown | {name: hparams.plain(value) for name, value in values.items()}
            if len(before) == 1 and now == shown:
                return
            writer = self._writer("")
            writer.write(Event(wall_time=time.time(), summary=hparams.summary(now)))
            writer.close()
            for file in before:
                file.unlink()

    def embeddings(self, folder: str, embeddings: Embeddings) -> None:
        """Writes vectors, and what to show at each, for the projector; they replace those of the same name."""
        if self._log_dir is not None:
            self._writer(folder).begin()  # the projector looks into folders that have event files
            embeddings.write(self._log_dir / folder)

    @property
    def owned(self) -> bool:
        """Whether this process is within `owning`."""
        return self._lock is not None and self._lock.held

    @contextlib.contextmanager
    def owning(self) -> Iterator[None]:
        """Within it, nobody else writes to the folder; before, another process or trainer may have.

        Raises:
            InUseError: Another process is within it, or the folder is not writable.
        """
        with self._lock or contextlib.nullcontext():
            self._close_deleted()
            for writer in self._writers.values():
                writer.resume()
            try:
                yield
            finally:
                self._close_deleted()
                for writer in self._writers.values():
                    writer.pause()

    def files(self) -> list[Path]:
        """The event files of steps and epochs, also those of earlier processes."""
        folders = () if self._log_dir is None else (self._log_dir / folder for folder in FOLDERS)
        own = (folder for folder in folders if not folder.is_symlink())
        files = (file for folder in own for file in folder.glob("events.out.tfevents.*"))
        return sorted(file for file in files if file.is_file() and not file.is_symlink())

    def sizes(self) -> dict[str, int]:
        """How many bytes each of them has, by its path in `log_dir`."""
        assert self._log_dir is not None
        return {str(file.relative_to(self._log_dir)): file.stat().st_size for file in self.files()}

    def remove(self) -> None:
        """Removes all event files, also those of hyperparameters."""
        assert self._log_dir is not None
        for file in [*self.files(), *hparams.files(self._log_dir)]:
            file.unlink()

    def rewind(self, sizes: dict[str, int]) -> None:
        """Removes all that was written since `sizes` were taken; what is written from now on goes to new files."""
        assert self._log_dir is not None
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
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

    def _writer(self, folder: str) -> _Writer:
        assert self._log_dir is not None
        assert self._lock is not None
        deleted = self._close_deleted()
        if self._lock.renew() and not deleted:
            warn(f"`log_dir` {self._log_dir} was deleted or moved; what was in it is lost. It is created again.")
        return self._writers.setdefault(folder, _Writer(self._log_dir / folder))

    def _close_deleted(self) -> bool:
        """Closes files that are no longer on the disk, and returns whether there were any."""
        deleted = [folder for folder, writer in self._writers.items() if writer.is_deleted()]
        for folder in deleted:
            self._writers[folder].close()
        if FOLDERS[0] in deleted:
            self._has_graph = False
        if deleted:
            warn(
                f"`log_dir` {self._log_dir}: the event files in {' and '.join(deleted)} were deleted or moved while "
                f"the run was using them. Their points are lost, and so is all that was deleted with them, such as "
                f"checkpoints and hyperparameters. The run continues in new files."
            )
        return bool(deleted)


class _Writer:
    """Writes one event file into `folder`, created at the first write.

    An event file is a TFRecord file of `Event` messages. Writing them here costs some 6 µs a step for all scalars
    together; `tf.summary.scalar` costs 40 µs (in a graph) to 630 µs (eagerly) for each.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._path = folder  # of the file, once there is one
        self._file: tf.io.TFRecordWriter | None = None
        self._size = 0  # at the last pause
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
        """Creates the file, without anything in it, if none is open."""
        with self._writing():
            pass

    def close(self) -> None:
        """Ends the file; a later write begins another, which TensorBoard shows as its continuation."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def is_deleted(self) -> bool:
        """Whether an open file is no longer on the disk."""
        return self._file is not None and not self._path.exists()

    def pause(self) -> None:
        """Lets others write to the folder."""
        if self._file is not None:
            self._size = self._path.stat().st_size

    def resume(self) -> None:
        """Closes the file if others have changed it, or begun a later one: TensorBoard reads no earlier one again."""
        if self._file is not None:
            last = max(self.folder.glob("events.out.tfevents.*"), default=None)
            if last != self._path or self._path.stat().st_size != self._size:
                self.close()

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
            raise OSError(f"The event file {self._path} could not be written: {error.message}") from error

    def _open(self) -> tf.io.TFRecordWriter:
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files of a folder in the order of their names.
            moment = time.time()
            name = f"events.out.tfevents.{int(moment):010d}.{socket.gethostname()}.{os.getpid()}.{next(_count):06d}.v2"
            self._path = self.folder / name
            self._file = tf.io.TFRecordWriter(os.fsencode(self._path))
            self._file.write(Event(wall_time=moment, file_version="brain.Event:2").SerializeToString())
        return self._file


def _metadata(plugin: str, data_class: int) -> SummaryMetadata:
    return SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin), data_class=data_class)


def _scalar(tag: str) -> Summary.Value:
    tensor = TensorProto(dtype=DT_FLOAT, float_val=[0.0])
    return Summary.Value(tag=tag, tensor=tensor, metadata=_metadata("scalars", DATA_CLASS_SCALAR))
