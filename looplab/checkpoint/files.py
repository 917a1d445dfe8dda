"""The files of a checkpoint: arrays as safetensors, everything else as JSON, and a manifest with their checksums.

Checkpoints are read without trust: nothing in them is code, no link is followed, and large JSON is not parsed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from looplab.checkpoint.tree import join
from looplab.state import Count

FORMAT = 1
ARRAYS, STATE, MANIFEST = "arrays.safetensors", "state.json", "manifest.json"
_MAX_JSON = 2**25  # bytes; parsed, it takes up to 50 times as much memory


class CheckpointError(ValueError):
    """A checkpoint is damaged, of another format, or of another trainer."""


class NewerFormatError(CheckpointError):
    """A checkpoint was written by a newer looplab."""


@dataclasses.dataclass
class _Content:
    bytes: Count
    sha256: str


@dataclasses.dataclass
class _Version:
    format: int


@dataclasses.dataclass
class _Manifest(_Version):
    files: dict[str, _Content]
    monitored: float | None


def damaged(folder: Path, reason: str) -> CheckpointError:
    """The error for a checkpoint that is not as it was written."""
    return CheckpointError(f"checkpoint {folder} is damaged: {reason}.")


def write(folder: Path, tree: Any, arrays: dict[str, np.ndarray], monitored: float | None) -> None:
    """Writes the two parts of a state (see `tree.flatten`) to a folder, and flushes it to disk.

    Raises:
        OSError: The disk is full, or not writable.
        ValueError: The state is too large to be read again.
    """
    (folder / STATE).write_text(json.dumps(tree))
    try:
        save_file(arrays, folder / ARRAYS)
    except SafetensorError as error:  # also those of the disk
        raise OSError(f"{ARRAYS}: {error}") from error
    for name, size in {STATE: (folder / STATE).stat().st_size, f"the header of {ARRAYS}": _header_size(folder)}.items():
        if size > _MAX_JSON:
            raise ValueError(
                f"The checkpoint cannot be written: {name} would have {size} bytes, and at most {_MAX_JSON} can be "
                f"read. Keep fewer numbers and less text in callbacks, or join numbers to one NumPy array."
            )
    files = {name: _content(folder / name) for name in (ARRAYS, STATE)}
    manifest = dataclasses.asdict(_Manifest(FORMAT, files, monitored))
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (folder / ARRAYS, folder / STATE, folder / MANIFEST, folder):
        sync(path)


def read(folder: Path) -> Any:
    """The state that was written.

    Raises:
        CheckpointError: The checkpoint is damaged, or has a newer format.
    """
    for name, content in _manifest(folder).files.items():
        path = _regular_file(folder, name)
        if path.stat().st_size != content.bytes or _content(path) != content:
            raise damaged(folder, f"{name} does not match its checksum")
    if _header_size(folder) > _MAX_JSON:
        raise damaged(folder, f"the header of {ARRAYS} has more than {_MAX_JSON} bytes")
    try:
        with safe_open(folder / ARRAYS, "numpy") as file:
            return _json(folder, STATE, functools.partial(join, functools.cache(file.get_tensor)))
    except (SafetensorError, AttributeError, TypeError) as error:
        raise damaged(folder, f"{STATE} and {ARRAYS} do not belong together ({error})") from error


def monitored_in(folder: Path) -> float | None:
    """The monitored value of a checkpoint, without reading the rest of it.

    Raises:
        CheckpointError: The checkpoint is damaged, or has a newer format.
    """
    return _manifest(folder).monitored


def delete(path: Path) -> None:
    """Removes a file, a folder, or a link itself, if there is one at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest(folder: Path) -> _Manifest:
    tree = _json(folder, MANIFEST)
    try:
        version = msgspec.convert(tree, _Version).format
        if version > FORMAT:
            raise NewerFormatError(
                f"checkpoint {folder} has format {version}, and this looplab reads up to {FORMAT}: install a newer one."
            )
        manifest = msgspec.convert(tree, _Manifest)
    except msgspec.ValidationError as error:
        raise damaged(folder, f"{MANIFEST} is malformed ({error})") from error
    if version != FORMAT or manifest.files.keys() != {ARRAYS, STATE}:
        raise damaged(folder, f"{MANIFEST} has format {version} and the files {sorted(manifest.files)}")
    return manifest


def _json(folder: Path, name: str, join_part: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    path = _regular_file(folder, name)
    if path.stat().st_size > _MAX_JSON:
        raise damaged(folder, f"{name} has more than {_MAX_JSON} bytes")
    try:
        return json.loads(path.read_bytes(), object_hook=join_part)
    except (ValueError, RecursionError) as error:
        raise damaged(folder, f"{name} is malformed ({error})") from error


def _regular_file(folder: Path, name: str) -> Path:
    """The path of a file in a checkpoint: a link could lead anywhere, and a pipe or device could block."""
    path = folder / name
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        raise damaged(folder, f"{name} is missing, or not a regular file")
    return path


def _content(path: Path) -> _Content:
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return _Content(file.tell(), checksum)


def _header_size(folder: Path) -> int:
    with open(folder / ARRAYS, "rb") as file:
        return int.from_bytes(file.read(8), "little")
