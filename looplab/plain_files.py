"""A state as plain files: written with checksums, and read without trust.

Arrays are in the format of safetensors, all else is JSON, and a manifest has the checksums of both. Nothing that is
read is ever run, no name in a file leads to another file, and no number in one makes the memory grow without bound.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from looplab import safetensors
from looplab.tree import unflatten

_FORMAT = 1
_ARRAYS, _STATE, _MANIFEST = "arrays.safetensors", "state.json", "manifest.json"
_MOST_BYTES = {_MANIFEST: 2**16, _STATE: 2**28}  # a hostile file shall not fill the memory
_MOST_VALUES = 2**22  # of JSON, of which three bytes can become a dict of eighty
_MOST_UNASKED = 2**32  # larger files are gone through once it is known that the trainer has as much
_SAY_NOTHING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES)  # of whether a file is whole
_MALFORMED = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


class CheckpointError(ValueError):
    """A checkpoint is damaged, of another format, or of another trainer."""


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
                return unflatten(self.tree, safetensors.parse(file, most))
        except (*_MALFORMED, struct.error) as error:
            raise damaged(self.path, f"{_ARRAYS} is malformed ({error})") from error


def write(folder: Path, tree: Any, arrays: dict[str, np.ndarray]) -> None:
    """Writes a state that `flatten` made to a folder, whose files and names are on the disk then.

    Raises:
        ValueError: It is so large that it could not be read again; nothing was written.
    """
    header, state = safetensors.header(arrays), json.dumps(tree).encode()
    for name, size, most, unit in [
        (f"the header of {_ARRAYS}", len(header), safetensors.MOST_HEADER, "bytes"),
        (_STATE, len(state), _MOST_BYTES[_STATE], "bytes"),
        (_STATE, _count_values(state), _MOST_VALUES, "values"),
    ]:
        if size > most:
            raise ValueError(
                f"The checkpoint cannot be written: {name} would have {size} {unit}, and {most} are read at most. The "
                f"largest part is {_largest_part(tree)}. Keep its numbers in one NumPy array, or keep fewer."
            )
    written = {_ARRAYS: _write_file(folder / _ARRAYS, safetensors.parts(header, arrays))}
    written[_STATE] = _write_file(folder / _STATE, [state])
    manifest = json.dumps({"format": _FORMAT, "files": written}, indent=1)
    _write_file(folder / _MANIFEST, [manifest.encode()])
    sync(folder)


def _largest_part(tree: Any) -> str:
    """The path to what has the longest text: down through dicts, to where no part has a tenth of the whole."""
    path: list[str] = []
    least = len(json.dumps(tree)) / 10
    while type(tree) is dict and tree:
        sizes = {key: len(json.dumps(part)) for key, part in tree.items()}
        largest = max(sizes, key=sizes.__getitem__)
        if largest.startswith("$") or sizes[largest] < least:  # such keys are those of `flatten`
            break
        path.append(largest)
        tree = tree[largest]
    return "/".join(path)


def _count_values(content: bytes) -> int:
    """At most how many values, and dicts and lists of such, a JSON text has; the commas in its texts count too."""
    return sum(map(content.count, (b",", b"[", b"{")))


def read_tree(path: Path) -> dict[str, Any]:
    """The state without its arrays.

    Raises:
        CheckpointError: It is damaged.
    """
    return _state(path)[0]


def _write_file(path: Path, parts: Iterable[Any]) -> dict[str, Any]:
    """Writes a file and brings it to the disk; its size and checksum."""
    with open(path, "xb") as file:
        summed = _summed(parts, file.write)
        file.flush()
        os.fsync(file.fileno())
    return summed


def delete(path: Path) -> None:
    """Removes whatever has this name, if anything does; a link, and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
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
        if error.errno in _SAY_NOTHING:
            raise
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
    content = _read(path / _STATE, files[_STATE])
    if _count_values(content) > _MOST_VALUES:
        raise damaged(path, f"{_STATE} has more than the {_MOST_VALUES} values that it may have")
    tree = _json(path, _STATE, content)
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
