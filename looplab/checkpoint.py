"""Commits all state of a run to a folder, whole or not at all, and finds the newest whole one again."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import stat
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import tensorflow as tf

_FORMAT = 1
_ARRAYS, _STATE, _MANIFEST = "arrays.safetensors", "state.json", "manifest.json"
_MOST_BYTES = {_MANIFEST: 2**16, _STATE: 2**24}  # a hostile file shall not fill the memory
_MOST_HEADER = 2**24
_MOST_UNASKED = 2**32  # larger files are gone through once it is known that the trainer has as much
_MALFORMED = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
_NAME = re.compile(r"step-(\d{1,18})-epoch-(\d{1,18})")
_UNFINISHED = ".unfinished-"
_EVERY = re.compile(r"(?:(\d+) )?(step|epoch|second)s?")
# https://github.com/huggingface/safetensors#format: eight bytes with the header's length, the header as JSON, the data.
_DTYPES = {
    **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64"},
}


class CheckpointError(ValueError):
    """A checkpoint is damaged, of another format, or of another trainer."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When a trainer saves all its state to `log_dir/checkpoints`, and what it keeps there.

    Args:
        every: A whole number of steps, "epoch", or a number with its unit: "500 steps", "2 epochs", "600 seconds".
        keep: How many of the newest stay.
        monitor: A name in the logs of an epoch, such as "val_loss": the one that is best by it stays too, for
            `Trainer.restore("best")`. For that, checkpoints must fall on the ends of epochs.
        mode: Whether the "min" or the "max" of `monitor` is best; "auto" asks the metric of that name.

    Raises:
        ValueError: An argument is none of these.
    """

    every: int | str = "epoch"
    keep: int = 2
    monitor: str | None = None
    mode: Literal["auto", "min", "max"] = "auto"

    def __post_init__(self) -> None:
        _ = self.interval
        if isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1:
            raise ValueError(f"`keep` must be a whole number of at least 1; {self.keep!r} came.")
        if self.monitor is not None and not isinstance(self.monitor, str):
            raise ValueError(f"`monitor` must be a name in the logs of an epoch, or None; {self.monitor!r} came.")
        if self.mode not in ("auto", "min", "max"):
            raise ValueError(f'`mode` must be "auto", "min" or "max"; {self.mode!r} came.')

    @property
    def interval(self) -> tuple[int, str]:
        """`every` as a number and its unit: "step", "epoch" or "second"."""
        text = f"{self.every} steps" if isinstance(self.every, int) and not isinstance(self.every, bool) else self.every
        match = _EVERY.fullmatch(text) if isinstance(text, str) else None
        if match is None or match[1] == "0" or (match[1] or "1").strip("0") == "":
            raise ValueError(
                f'`every` must be a whole number of steps of at least 1, "epoch", or such as "2 epochs" or '
                f'"600 seconds"; {self.every!r} came.'
            )
        return int(match[1] or 1), match[2]


class Checkpoints:
    """The checkpoints of one run.

    Each is a folder `step-<steps>-epoch-<epochs>` of plain files: arrays in the format of safetensors, the rest of the
    state as JSON, and a manifest with the checksums of both. It is written under another name, its files and then the
    folder are brought to the disk, and it is renamed last: a folder of that name is whole, or the disk has damaged it.
    Nothing that is read is ever run, and no name in a file leads to another file.
    """

    def __init__(self, folder: Path, settings: Checkpoint):
        self.folder = folder
        self._number, self._unit = settings.interval
        self._keep = settings.keep
        self._lower_is_better: bool | None = None
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "looplab-checkpoint")
        self._pending: concurrent.futures.Future | None = None
        self._clock = time.monotonic()

    # When.

    def steps_left(self, steps: int) -> int | None:
        """How many steps after `steps` the next one is due, if steps are what it is due by."""
        return self._number - steps % self._number if self._unit == "step" else None

    def due_after_step(self, steps: int) -> bool:
        """Whether one is due when `steps` were done."""
        if self._unit == "second":
            return time.monotonic() - self._clock >= self._number
        return self._unit == "step" and steps % self._number == 0

    def due_after_epoch(self, epochs: int) -> bool:
        """Whether one is due when `epochs` were done."""
        return self._unit == "epoch" and epochs % self._number == 0

    # Writing.

    def prefer(self, lower: bool) -> None:
        """Says that of the monitored values the lower, or else the higher, are better: the best one stays."""
        self._lower_is_better = lower

    def commit(self, steps: int, epochs: int, state: dict[str, Any], durable: Iterable[Path] = ()) -> None:
        """Writes a state, in a thread of its own; first waits for the one before, and raises its error.

        Args:
            steps, epochs: How many were done; they are the checkpoint's name.
            state: Dicts, lists and tuples of arrays, numbers, strings and None. It must not change any more. Under
                "monitored" it has the value by which the best one is told, or None.
            durable: Files that the state speaks of, which are brought to the disk before it.

        Raises:
            OSError: The one before could not be written.
            TypeError: The state has something else in it.
        """
        path = self.folder / f"step-{steps}-epoch-{epochs}"
        self.wait()
        # Where it is there already, nothing was done since: such as at the beginning of a second `fit`.
        if not path.exists():
            tree, arrays = flatten(state)
            self._pending = self._writer.submit(self._write, path, tree, arrays, list(durable))
        self._clock = time.monotonic()

    def wait(self) -> None:
        """Waits until what was committed is on the disk.

        Raises:
            OSError: It could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread; what was committed is written."""
        self._writer.shutdown()

    def drop_newer(self, path: Path) -> None:
        """Removes those newer than `path`, which is gone on from: they are damaged, and would push out whole ones."""
        paths = self.paths()
        for newer in paths[: paths.index(path)]:
            self._remove(newer)

    def clean(self) -> None:
        """Removes what a killed process left unfinished."""
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            _delete(path)

    def _write(self, path: Path, tree: Any, arrays: dict[str, np.ndarray], durable: list[Path]) -> None:
        unfinished = self.folder / f"{_UNFINISHED}{path.name}"
        try:
            _delete(unfinished)
            unfinished.mkdir(parents=True)
            _sync(self.folder.parent)
            for file in durable:
                _sync(file)
            text = json.dumps(tree).encode()
            written = {_ARRAYS: _write_file(unfinished / _ARRAYS, _safetensors(arrays))}
            written[_STATE] = _write_file(unfinished / _STATE, [text])
            manifest = json.dumps({"format": _FORMAT, "files": written}, indent=1)
            _write_file(unfinished / _MANIFEST, [manifest.encode()])
            _sync(unfinished)
            os.rename(unfinished, path)
            _sync(self.folder)
            self._retain()
        except OSError as error:
            with contextlib.suppress(OSError):
                _delete(unfinished)
            raise OSError(
                f"The checkpoint {path} could not be written: {error.strerror or error}. Earlier ones are as they "
                f"were. Make room or give access, and go on with `resume`."
            ) from error

    def _retain(self) -> None:
        """Removes all but the newest, and the best."""
        paths = self.paths()
        for path in set(paths[self._keep :]) - {self.best()}:
            self._remove(path)

    def _remove(self, path: Path) -> None:
        """A folder that is half removed must not have the name of a whole one."""
        removed = self.folder / f"{_UNFINISHED}removed-{path.name}"
        _delete(removed)
        os.rename(path, removed)
        _delete(removed)

    # Reading.

    def paths(self) -> list[Path]:
        """All of them, the newest first."""
        found = [(match, path) for path in self.folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][2])), reverse=True)]

    def best(self) -> Path | None:
        """The whole one with the best monitored value, the newest of equals; None where none has one."""
        if self._lower_is_better is None:
            return None
        best, best_value = None, math.inf
        for path in self.paths():
            try:
                value = _state(path)[0].get("monitored")
            except CheckpointError:
                continue
            if isinstance(value, float) and (value := value if self._lower_is_better else -value) < best_value:
                best, best_value = path, value
        return best

    def newest(self, check: Callable[[Saved], None] = lambda saved: None) -> tuple[Saved | None, list[str]]:
        """The newest whole one, or None where there is none; and what is wrong with each newer one, which is skipped.

        Args:
            check: Raises a CheckpointError, too, where it finds something wrong.

        Raises:
            CheckpointError: There are some, but none is whole; or the newest is of a newer format.
        """
        skipped: list[str] = []
        for path in self.paths():
            try:
                saved = Saved(path)
                check(saved)
                return saved, skipped
            except NewerFormatError:
                raise
            except CheckpointError as error:
                skipped.append(str(error))
        if skipped:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole: {' '.join(skipped)} To train from the beginning, "
                f"pass another `log_dir`, or remove this one."
            )
        return None, []


class NewerFormatError(CheckpointError):
    """A checkpoint was written by a newer looplab."""


class Saved:
    """A checkpoint on the disk, found whole.

    Args:
        path: Its folder.

    Raises:
        CheckpointError: It is no checkpoint, or damaged, or of a newer format.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tree, self._arrays = _state(path)
        """The state without its arrays, in whose places are their names."""
        if self._arrays["bytes"] <= _MOST_UNASKED:
            _verify(path / _ARRAYS, self._arrays)

    def load(self, most: int) -> dict[str, Any]:
        """The state, whose arrays may have `most` bytes in all.

        Raises:
            CheckpointError: They have more, or are malformed.
        """
        if self._arrays["bytes"] > most:
            raise damaged(self.path, f"{_ARRAYS} has {self._arrays['bytes']} bytes, and this trainer's {most} at most")
        if self._arrays["bytes"] > _MOST_UNASKED:
            _verify(self.path / _ARRAYS, self._arrays)
        try:
            with _open(self.path / _ARRAYS) as file:
                return _unflatten(self.tree, _parse_safetensors(file, most))
        except (*_MALFORMED, struct.error) as error:
            raise damaged(self.path, f"{_ARRAYS} is malformed ({error})") from error


def plain(value: Any) -> bool:
    """Whether a state can have it: numbers, strings, None, arrays, and dicts, lists and tuples of such."""
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and plain(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(plain, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.name in _DTYPES
    return value is None or type(value) in (bool, int, float, str)


def flatten(state: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """A state as JSON has it, and its arrays, each under the path that leads to it."""
    arrays: dict[str, np.ndarray] = {}
    return _flatten("", state, arrays), arrays


def _flatten(path: str, value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, (np.ndarray, np.generic)) and plain(value):
        arrays[path] = np.asarray(value)
        return {"$array" if isinstance(value, np.ndarray) else "$scalar": path}
    if type(value) is dict:
        inner = {key: _flatten(f"{path}/{key}", part, arrays) for key, part in value.items()}
        simple = all(isinstance(key, str) and not key.startswith("$") for key in inner)
        return inner if simple else {"$items": [[key, part] for key, part in inner.items()]}
    if type(value) in (list, tuple):
        parts = [_flatten(f"{path}/{index}", part, arrays) for index, part in enumerate(value)]
        return parts if type(value) is list else {"$tuple": parts}
    if not plain(value):
        raise TypeError(f"A checkpoint cannot hold {path.strip('/')}, of type {type(value).__name__}.")
    return value


def _unflatten(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(tree, list):
        return [_unflatten(part, arrays) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if "$array" in tree:
        return arrays[tree["$array"]]
    if "$scalar" in tree:
        return arrays[tree["$scalar"]][()]
    if "$tuple" in tree:
        return tuple(_unflatten(part, arrays) for part in tree["$tuple"])
    if "$items" in tree:
        return {key: _unflatten(part, arrays) for key, part in tree["$items"]}
    return {key: _unflatten(part, arrays) for key, part in tree.items()}


# Files.


def _write_file(path: Path, parts: Iterable[Any]) -> dict[str, Any]:
    """Writes a file and brings it to the disk; its size and checksum."""
    with open(path, "xb") as file:
        summed = _summed(parts, file.write)
        file.flush()
        os.fsync(file.fileno())
    return summed


def _delete(path: Path) -> None:
    """Removes whatever has this name, if anything does; a link, and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path) -> IO[bytes]:
    """A file to read: no link, and nothing that one would wait for."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise damaged(path.parent, f"{path.name} is no file")
        return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise damaged(path.parent, f"{path.name} cannot be read: {error.strerror}") from error


def _read_at_most(path: Path) -> bytes:
    with _open(path) as file:
        content = file.read(_MOST_BYTES[path.name] + 1)
    if len(content) > _MOST_BYTES[path.name]:
        raise damaged(path.parent, f"{path.name} is longer than the {_MOST_BYTES[path.name]} bytes that it may have")
    return content


def _read(path: Path, expected: dict[str, Any]) -> bytes:
    """The content of a file that is as its manifest says."""
    content = _read_at_most(path)
    if _summed([content]) != expected:
        raise damaged(path.parent, f"{path.name} is not as its checksum says")
    return content


def _verify(path: Path, expected: dict[str, Any]) -> None:
    """Goes through a file, which may be larger than the memory, for its checksum."""
    with _open(path) as file:
        if os.fstat(file.fileno()).st_size != expected["bytes"]:
            raise damaged(path.parent, f"{path.name} has not the {expected['bytes']} bytes that it was written with")
        if _summed(iter(lambda: file.read(2**20), b"")) != expected:
            raise damaged(path.parent, f"{path.name} is not as its checksum says")


def _summed(parts: Iterable[Any], write: Callable[[Any], Any] = len) -> dict[str, Any]:
    """How many bytes the parts have, and their checksum; each is given to `write`."""
    size, checksum = 0, hashlib.sha256()
    for part in parts:
        write(part)
        checksum.update(part)
        size += len(part)
    return {"bytes": size, "sha256": checksum.hexdigest()}


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file, by name."""
    if path.is_symlink():
        raise damaged(path, "it is a symbolic link")
    manifest = _json(path, _MANIFEST, _read_at_most(path / _MANIFEST))
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version > _FORMAT:
        raise NewerFormatError(
            f"checkpoint {path} has format {version}, and this looplab reads up to {_FORMAT}: install a newer one."
        )
    try:
        files = {name: {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])} for name, f in manifest["files"].items()}
        if version != _FORMAT or set(files) != {_ARRAYS, _STATE}:
            raise ValueError(f"format {version!r} with the files {sorted(files)}")
    except _MALFORMED as error:
        raise damaged(path, f"{_MANIFEST} is malformed ({error})") from error
    return files


def _state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state without its arrays; and size and checksum of the file of these."""
    files = _manifest(path)
    tree = _json(path, _STATE, _read(path / _STATE, files[_STATE]))
    if not isinstance(tree, dict):
        raise damaged(path, f"{_STATE} holds no state")
    return tree, files[_ARRAYS]


def _json(path: Path, name: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{name} is no JSON ({error})") from error


def damaged(path: Path, reason: str) -> CheckpointError:
    """What to raise where a checkpoint is not as it was written."""
    return CheckpointError(f"checkpoint {path} is damaged: {reason}.")


def _safetensors(arrays: dict[str, np.ndarray]) -> Iterable[Any]:
    """The parts of a safetensors file."""
    header: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for array in arrays.values():
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _parse_safetensors(file: IO[bytes], most: int) -> dict[str, np.ndarray]:
    """The arrays; ValueError, KeyError, TypeError or struct.error where the file is malformed."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MOST_HEADER:
        raise ValueError(f"its header has {length} bytes")
    header = json.loads(file.read(length))
    names = {short: name for name, short in _DTYPES.items()}
    arrays: dict[str, np.ndarray] = {}
    end = 0
    for name, entry in header.items():
        dtype = np.dtype(tf.as_dtype(names[entry["dtype"]]).as_numpy_dtype)
        shape = [int(size) for size in entry["shape"]]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        if min([0, *shape]) < 0 or entry["data_offsets"] != [begin, end]:
            raise ValueError(f"{name} of shape {shape} and {dtype.name} cannot be at {entry['data_offsets']}")
        if end > most:
            raise ValueError(f"it has more than {most} bytes, and is not of this trainer")
        arrays[name] = np.frombuffer(bytearray(file.read(end - begin)), dtype).reshape(shape)
    return arrays
