"""What TensorBoard shows of a run: scalars, images, a graph, hyperparameters and embeddings."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.plugins.hparams.api import hparams_pb
from tensorboard.plugins.image import metadata as image
from tensorboard.plugins.scalar import metadata as scalar

from looplab.summaries.lock import FOLDERS, HPARAMS, FolderLock
from looplab.summaries.projector import Embeddings
from looplab.warn import warn

_count = itertools.count()


@dataclasses.dataclass
class _EventFile:
    """An open event file, which is a TFRecord file of `Event` messages."""

    path: Path
    records: tf.io.TFRecordWriter
    has_graph: bool = False


class RunWriter:
    """The event files of one run, in `log_dir/train` and `log_dir/validation`; without `log_dir` it writes nothing.

    Each folder has one open file. It is closed when the run is rewound or somebody else has written to the folder.
    TensorBoard sees what a method wrote when the method returns. Methods that write must be called inside `owning`.
    """

    def __init__(self, log_dir: Path | None):
        self.has_written = False
        """Whether it has written anything."""
        self._log_dir = log_dir
        self._lock = None if log_dir is None else FolderLock(log_dir)
        self._open: dict[str, _EventFile] = {}  # by folder
        self._hparams: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}  # when this process last owned the folder

    def steps(self, folder: str, first: int, values: dict[str, np.ndarray], started: float) -> None:
        """Writes a point of each tag for each step from `first` on; the steps ran from `started` (`time.time()`) on."""
        if values:
            self._write(folder, _points(first, values, started))

    def scalars(self, folder: str, step: int, values: dict[str, float]) -> None:
        """Writes one point of each tag."""
        self.steps(folder, step, {tag: np.array([value]) for tag, value in values.items()}, time.time())

    def epoch(self, folder: str, epoch: int, values: dict[str, Any]) -> None:
        """Writes the values of an epoch, arrays as one point for each entry."""
        entries = ((f"epoch_{name}", value) for name, value in values.items())
        tags = {"/".join([tag, *map(str, at)]): part for tag, value in entries for at, part in np.ndenumerate(value)}
        self.scalars(folder, epoch, tags)

    def images(self, folder: str, step: int, contents: dict[str, Sequence[bytes]]) -> None:
        """Writes images by tag; `image_content` makes their contents."""
        self._write(folder, (_image(step, tag, content) for tag, content in contents.items()))

    def graph(self, folder: str, graph: tf.Graph | None) -> None:
        """Writes the first graph that it gets; TensorBoard shows one for each folder."""
        file = self._open.get(folder)
        if self._log_dir is not None and graph is not None and not (file and file.has_graph):
            content = graph.as_graph_def(add_shapes=True).SerializeToString()
            self._write(folder, [Event(wall_time=time.time(), graph_def=content)])
            self._open[folder].has_graph = True

    def hparams(self, values: dict[str, Any]) -> None:
        """Writes hyperparameters, together with those of earlier calls, in place of what the run had before.

        TensorBoard shows those in `log_dir` itself for all folders in it, and of several files only the first.
        """
        if self._log_dir is not None:
            self._hparams |= values
            # The default `trial_id`, a hash of the values, would merge runs with equal values into one row.
            summary = hparams_pb({name: _shown(value) for name, value in self._hparams.items()}, trial_id="")
            self._write("", [Event(wall_time=time.time(), summary=summary)])
            self._close("")

    def embeddings(self, folder: str, embeddings: Embeddings) -> None:
        """Writes vectors for the projector, in place of those with the same name."""
        if self._log_dir is not None:
            self._write(folder, [])  # the projector ignores folders without event files
            embeddings.write(self._log_dir / folder)

    @property
    def owned(self) -> bool:
        """Whether this process is inside `owning`."""
        return self._lock is not None and self._lock.held

    @contextlib.contextmanager
    def owning(self) -> Iterator[None]:
        """Inside it, no other process or trainer writes to the folder.

        Raises:
            InUseError: Another process is inside it, or the folder is not writable.
        """
        with self._lock or contextlib.nullcontext():
            self._close_deleted()
            if self.sizes() != self._sizes:  # others have written, and TensorBoard reads only the last file of a folder
                self._close(*self._open)
            try:
                yield
            finally:
                self._close_deleted()
                self._sizes = self.sizes()

    def files(self) -> list[Path]:
        """The event files of steps and epochs, also those of earlier processes."""
        folders = [] if self._log_dir is None else [self._log_dir / folder for folder in FOLDERS]
        files = [file for folder in folders if not folder.is_symlink() for file in folder.glob("events.out.tfevents.*")]
        return sorted(file for file in files if file.is_file() and not file.is_symlink())

    def sizes(self) -> dict[str, int]:
        """The size of each of them in bytes, by its path in `log_dir`."""
        return {f"{file.parent.name}/{file.name}": file.stat().st_size for file in self.files()}

    def rewind(self, sizes: dict[str, int]) -> None:
        """Removes everything that was written since `sizes` was taken; what follows is written to new files."""
        if self._log_dir is None:
            return
        self._close(*self._open)
        found = self.sizes()
        for name, size in found.items():
            if name not in sizes:
                (self._log_dir / name).unlink()
            elif size > sizes[name]:
                os.truncate(self._log_dir / name, sizes[name])
        if damaged := [name for name, size in sizes.items() if found.get(name, -1) < size]:
            warn(f"`log_dir` {self._log_dir}: points are missing; {', '.join(damaged)} was deleted or shortened.")

    def remove(self) -> None:
        """Removes all event files of the run."""
        if self._log_dir is None:
            return
        self.rewind({})
        (self._log_dir / HPARAMS).unlink(missing_ok=True)

    def _write(self, folder: str, events: Iterable[Event]) -> None:
        if self._log_dir is None or self._lock is None:
            return
        self._close_deleted(self._lock.renew())
        self.has_written = True
        try:
            if folder not in self._open:
                self._open[folder] = _new_file(self._log_dir / folder, HPARAMS if folder == "" else None)
            records = self._open[folder].records
            for event in events:
                records.write(event.SerializeToString())
            records.flush()
        except tf.errors.OpError as error:
            self._close(folder)  # it may end in half a record
            raise OSError(
                f"The event file in {self._log_dir / folder} could not be written: {error.message}"
            ) from error

    def _close(self, *folders: str) -> None:
        for folder in folders:
            with contextlib.suppress(KeyError, tf.errors.OpError):
                self._open.pop(folder).records.close()

    def _close_deleted(self, was_deleted: bool = False) -> None:
        """Closes files that are no longer on the disk; warns about them, and about a deleted log folder."""
        deleted = [folder for folder, file in self._open.items() if not file.path.exists()]
        if deleted or was_deleted:
            self._close(*deleted)
            warn(
                f"`log_dir` {self._log_dir}, or a part of it, was deleted or moved while the run was using it. The "
                f"points, checkpoints and hyperparameters in it are lost; the run continues in new files."
            )


def image_content(images: tf.Tensor) -> tf.Tensor:
    """Images in the form that events have: their width, height and PNG files, as strings.

    Args:
        images: uint8, shape (n, height, width, channels).
    """
    return tf.concat([tf.as_string(tf.shape(images)[2:0:-1]), tf.io.encode_png(images)], 0)


def _shown(value: Any) -> bool | int | float | str:
    """A hyperparameter that TensorBoard can show; it would leave out numbers that are not finite."""
    if getattr(value, "shape", None) == ():
        value = np.asarray(value).item()
    is_shown = isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
    return value if is_shown else str(value)


def _new_file(folder: Path, name: str | None) -> _EventFile:
    folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    # TensorBoard reads the files of a folder in the order of their names.
    new = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{next(_count):06d}.v2"
    path = folder / (name or new)
    path.unlink(missing_ok=True)  # if it is a link, the file that it points to stays as it is
    file = _EventFile(path, tf.io.TFRecordWriter(os.fsencode(path)))
    file.records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    return file


def _points(first: int, values: dict[str, np.ndarray], started: float) -> Iterator[Event]:
    """One event for each step, with the scalars of all tags; the same object each time.

    This takes about 6 µs a step; `tf.summary.scalar` takes 40 µs (in a graph) to 630 µs (eagerly) for each scalar.
    """
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, as in `tf.summary`
        rows = np.stack(list(values.values()), 1).astype(np.float32)
    times = np.linspace(started, time.time(), len(rows) + 1)[1:]
    zero, metadata = TensorProto(dtype=DT_FLOAT, float_val=[0.0]), scalar.create_summary_metadata("", "")
    event = Event(summary=Summary(value=[Summary.Value(tag=tag, tensor=zero, metadata=metadata) for tag in values]))
    tensors = [value.tensor for value in event.summary.value]
    for step, moment, row in zip(itertools.count(first), times.tolist(), rows.tolist(), strict=False):
        event.step, event.wall_time = step, moment
        for tensor, value in zip(tensors, row, strict=True):
            tensor.float_val[0] = value
        yield event


def _image(step: int, tag: str, content: Sequence[bytes]) -> Event:
    tensor = TensorProto(dtype=DT_STRING, string_val=content)
    tensor.tensor_shape.dim.add(size=len(content))
    value = Summary.Value(tag=tag, tensor=tensor, metadata=image.create_summary_metadata("", ""))
    return Event(step=step, wall_time=time.time(), summary=Summary(value=[value]))
