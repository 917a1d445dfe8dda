"""The files of a checkpoint: arrays as safetensors, everything else as JSON, and a manifest with their checksums.

Checkpoints are read without trust: nothing in them is code, no link is followed, and sizes are limited.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from looplab.state import Count

FORMAT = 1
ARRAYS, STATE, MANIFEST = "arrays.safetensors", "state.json", "manifest.json"
MAX_STATE, _MAX_MANIFEST, _MAX_HEADER = 2**25, 2**16, 2**24  # bytes; parsed, they take up to 50 times as much memory


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


def damaged(folder: Path, reason: str) -> CheckpointError:
    """The error for a checkpoint that is not as it was written."""
    return CheckpointError(f"checkpoint {folder} is damaged: {reason}.")


def write(folder: Path, state: bytes, arrays: dict[str, np.ndarray]) -> None:
    """Writes the two parts of a state (see `tree.flatten`), the first as JSON, to a folder, and flushes it to disk.

    Raises:
        OSError: The disk is full, or not writable.
        ValueError: There are too many arrays for them to be read again.
    """
    try:
        save_file(arrays, folder / ARRAYS)
    except SafetensorError as error:  # also those of the disk
        raise OSError(f"{ARRAYS}: {error}") from error
    sync(folder / ARRAYS)
    if (size := _header_size(folder)) > _MAX_HEADER:
        raise ValueError(
            f"The checkpoint cannot be written: the header of {ARRAYS} has {size} bytes, and at most {_MAX_HEADER} can "
            f"be read. Keep fewer arrays and NumPy scalars in callbacks, or join them to one array."
        )
    (folder / STATE).write_bytes(state)
    sync(folder / STATE)
    files = {name: dataclasses.asdict(_content(folder / name)) for name in (ARRAYS, STATE)}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    sync(folder / MANIFEST)
    sync(folder)


def read_state(folder: Path, verify_arrays: bool) -> Any:
    """The JSON part of a state.

    Raises:
        CheckpointError: The checkpoint is damaged, or has a newer format.
    """
    files = _manifest(folder).files
    for name in (ARRAYS, STATE) if verify_arrays else (STATE,):
        path = _regular_file(folder, name)
        if path.stat().st_size != files[name].bytes or _content(path) != files[name]:
            raise damaged(folder, f"{name} does not match its checksum")
    try:
        return json.loads(_read(folder, STATE, MAX_STATE))
    except (ValueError, RecursionError) as error:
        raise damaged(folder, f"{STATE} is not valid JSON ({error})") from error


def read_arrays(folder: Path, most: int) -> dict[str, np.ndarray]:
    """The arrays of a state, which may have `most` bytes in all.

    Raises:
        CheckpointError: They have more, or are malformed.
    """
    path = _regular_file(folder, ARRAYS)
    if path.stat().st_size > most + _MAX_HEADER or _header_size(folder) > _MAX_HEADER:
        raise damaged(folder, f"{ARRAYS} or its header is larger than this trainer can have written")
    try:
        return load_file(path)
    except (SafetensorError, AttributeError, TypeError, ValueError) as error:  # the others: no array of NumPy
        raise damaged(folder, f"{ARRAYS} is malformed ({error})") from error


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
    content = _read(folder, MANIFEST, _MAX_MANIFEST)
    try:
        version = msgspec.json.decode(content, type=_Version).format
        if version > FORMAT:
            raise NewerFormatError(
                f"checkpoint {folder} has format {version}, and this looplab reads up to {FORMAT}: install a newer one."
            )
        manifest = msgspec.json.decode(content, type=_Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise damaged(folder, f"{MANIFEST} is malformed ({error})") from error
    if version != FORMAT or manifest.files.keys() != {ARRAYS, STATE}:
        raise damaged(folder, f"{MANIFEST} has format {version} and the files {sorted(manifest.files)}")
    return manifest


def _read(folder: Path, name: str, most: int) -> bytes:
    path = _regular_file(folder, name)
    if path.stat().st_size > most:
        raise damaged(folder, f"{name} has more than {most} bytes")
    return path.read_bytes()


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
