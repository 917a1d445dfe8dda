"""Data sets by name: from a file, from Keras, or the digits that come with the package."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import socket
import threading
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import keras
import numpy as np

_HOST = "storage.googleapis.com"  # where Keras has its data sets
_SECONDS = 10.0


class DataError(ValueError):
    """A data set cannot be had as asked for."""


class Arrays(NamedTuple):
    """A data set in memory."""

    x_train: np.ndarray
    """uint8 images, shape (n, height, width)."""
    y_train: np.ndarray
    """uint8 labels, shape (n,)."""
    x_test: np.ndarray
    y_test: np.ndarray
    name: str
    """"mnist" or "digits": which it is in the end."""
    source: str
    """The file, or where else it came from."""
    sha256: str
    """Of the bytes of all four arrays."""
    fallback: str | None
    """Why it is not the data set that was asked for, in one line."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Which data set a recipe learns from.

    Args:
        dataset: its name; mnist becomes digits, and says so, where neither a file nor the network has it
        data_dir: folder of <dataset>.npz (default: $LOOPLAB_DATA_DIR, else Keras's cache and download)
        limit: take only the first LIMIT examples of training and of validation
    """

    dataset: Literal["mnist", "digits"] = "mnist"
    data_dir: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        known = typing.get_args(typing.get_type_hints(type(self))["dataset"])
        if self.dataset not in known:
            raise DataError(f"`dataset` must be one of {', '.join(known)}; {self.dataset!r} came.")
        if self.limit is not None and self.limit < 1:
            raise DataError(f"`limit` must be at least 1; {self.limit} came.")

    def load(self, image_size: int = 28) -> Arrays:
        """The arrays; the embedded digits are scaled up to `image_size` pixels squared.

        Raises:
            DataError: The folder has no such file, or the file is damaged or holds something else.
        """
        folder = self.data_dir or os.environ.get("LOOPLAB_DATA_DIR")
        if self.dataset == "digits":
            arrays, source, fallback = _digits(image_size), "embedded", None
        elif folder:
            path = Path(folder) / f"{self.dataset}.npz"
            arrays, source, fallback = _read(path), str(path), None
        else:
            try:
                arrays, source, fallback = _from_keras(self.dataset), "keras", None
            except OSError as error:
                fallback = f"{self.dataset} cannot be fetched ({error}): learning from 1,797 embedded digits instead"
                arrays, source = _digits(image_size), "embedded"
        name = "digits" if source == "embedded" else self.dataset
        if fallback:
            print(f"looplab: {fallback}. To use a file: --data-dir FOLDER_OF_{self.dataset.upper()}_NPZ", flush=True)
        sha256 = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
        x_train, y_train, x_test, y_test = (array[: self.limit] for array in arrays)
        return Arrays(x_train, y_train, x_test, y_test, name, source, sha256, fallback)


def _read(path: Path) -> tuple[np.ndarray, ...]:
    """The four arrays of an npz file; never unpickles."""
    if not path.is_file():
        raise DataError(f"`data_dir`: {path.parent} has no file {path.name}. Put it there, or leave out --data-dir.")
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = tuple(file[key] for key in keys)
    except Exception as error:  # NumPy and zipfile raise a dozen kinds for damaged files
        told = f"{type(error).__name__}: {error}"
        raise DataError(
            f"`data_dir`: {path} is damaged, or not of {', '.join(keys)} ({told}). Fetch it again."
        ) from error
    x_train, y_train, x_test, y_test = arrays
    for x, y in ((x_train, y_train), (x_test, y_test)):
        images = x.dtype == np.uint8 and x.ndim >= 3 and len(x) > 0 and x.shape[1:] == x_train.shape[1:]
        labels = np.issubdtype(y.dtype, np.integer) and y.shape in ((len(x),), (len(x), 1))
        if not (images and labels):
            raise DataError(
                f"`data_dir`: {path} must hold uint8 images (n, height, width) and one whole number for each; "
                f"images of {x.dtype} {x.shape} with labels of {y.dtype} {y.shape} came."
            )
    return x_train, y_train.reshape(-1), x_test, y_test.reshape(-1)


def _from_keras(name: str) -> tuple[np.ndarray, ...]:
    """From Keras's cache, or its download; OSError where the network has it not within seconds."""
    cached = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "datasets" / f"{name}.npz"
    if not cached.exists():
        _connect(_HOST)
    with _socket_timeout(_SECONDS):
        try:
            (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
        except Exception as error:  # Keras raises a bare Exception where a download fails
            raise OSError(str(error)) from error
    return x_train, y_train, x_test, y_test


def _connect(host: str) -> None:
    """OSError unless `host` answers; in a thread, because a look-up of its name has no timeout of its own."""
    outcome: list[OSError | None] = []

    def attempt() -> None:
        try:
            socket.create_connection((host, 443), _SECONDS).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if not outcome:
        raise TimeoutError(f"{host} did not answer in {_SECONDS:.0f} s")
    if outcome[0] is not None:
        raise OSError(f"no connection to {host}") from outcome[0]


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _digits(size: int) -> tuple[np.ndarray, ...]:
    """1,500 digits to train on and 297 others, of 0 to 255, smoothly scaled up.

    They are the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    Learning Repository, 1998, CC BY 4.0, https://doi.org/10.24432/C50P49, as scikit-learn ships it: 8x8 counts of
    0 to 16, in `digits.npz` beside this file.
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    scaled = keras.ops.image.resize(images[..., None] * np.float32(255 / 16), (size, size), interpolation="bilinear")
    images = np.rint(keras.ops.convert_to_numpy(scaled)[..., 0]).astype(np.uint8)
    return images[:1500], labels[:1500], images[1500:], labels[1500:]
