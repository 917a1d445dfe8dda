"""Data sets by name: from a file, from Keras, or the digits that come with the package."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import socket
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from looplab.arrays import split
from looplab.paths import local_path
from looplab.warn import say

# Where Keras has its data sets: the host that it fetches each from, and the name under which it caches it.
_KERAS = {
    "mnist": ("storage.googleapis.com", "mnist.npz"),
    "cifar10": ("www.cs.toronto.edu", "cifar-10-batches-py-target"),
}
_SECONDS = 10.0


class DataError(ValueError):
    """A data set cannot be had as asked for."""


class Arrays(NamedTuple):
    """A data set in memory."""

    x_train: np.ndarray
    """uint8 images, shape (n, height, width) or (n, height, width, channels)."""
    y_train: np.ndarray
    """uint8 labels, shape (n,)."""
    x_validation: np.ndarray
    """The last of the training images, held out; without `validation_split`, those of the test."""
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]
    """What the labels 0, 1, … mean."""
    name: str
    """"mnist", "cifar10" or "digits": which it is in the end."""
    source: str
    """The file, or where else it came from."""
    sha256: str
    """Of the bytes of all that it has."""
    fallback: str | None
    """Why it is not the data set that was asked for, in one line."""


# Of the bytes of all images and labels. The four files of http://yann.lecun.com/exdb/mnist have these bytes.
_PUBLISHED = {"mnist": "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"}
_DIGITS = tuple("0123456789")
_CLASSES = {
    "mnist": _DIGITS,
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "digits": _DIGITS,
}


@dataclasses.dataclass(frozen=True)
class Data:
    """Which data set a recipe learns from.

    Args:
        dataset: its name; mnist and cifar10 become digits, and say so, where neither a file nor the network has them
        data_dir: folder of <dataset>.npz (default: $LOOPLAB_DATA_DIR, else Keras's cache and download)
        limit: take only the first LIMIT examples of training and of test
        validation_split: hold out this last part of the training examples to validate on (0: validate on the test set)
    """

    dataset: Literal["mnist", "cifar10", "digits"] = "mnist"
    data_dir: str | None = None
    limit: int | None = None
    validation_split: float = 0.0

    def __post_init__(self) -> None:
        if self.dataset not in _CLASSES:
            raise DataError(f"`dataset` must be one of {', '.join(_CLASSES)}; {self.dataset!r} came.")
        if self.limit is not None and self.limit < 1:
            raise DataError(f"`limit` must be at least 1; {self.limit} came.")
        if not 0 <= self.validation_split < 1:
            raise DataError(f"`validation_split` must be from 0 to below 1; {self.validation_split} came.")

    def load(self, shape: Sequence[int] = (28, 28)) -> Arrays:
        """The arrays, each image in the given shape, (height, width) or (height, width, channels).

        Images of another size are scaled, grey ones repeated over the channels, and of coloured ones the brightness
        is taken where grey is asked for.

        Raises:
            DataError: The folder has no such file, the file is damaged or holds something else, or
                `validation_split` leaves nothing.
        """
        if min(shape) < 1:
            raise DataError(f"Images must have at least one pixel; {'×'.join(map(str, shape))} came.")
        folder = self.data_dir or os.environ.get("LOOPLAB_DATA_DIR")
        name, fallback = self.dataset, None
        if name == "digits":
            arrays, source = _digits(), "embedded"
        elif folder:
            try:
                path = local_path("data_dir", folder) / f"{name}.npz"
            except ValueError as error:
                raise DataError(str(error)) from error
            arrays, source = _read(path), str(path)
        else:
            try:
                arrays, source = _from_keras(name), "keras"
            except OSError as error:
                fallback = f"{name} cannot be fetched ({error}): learning from 1,797 embedded digits instead"
                say(f"looplab: {fallback}. To use a file: --data-dir FOLDER_OF_{name.upper()}_NPZ")
                arrays, source, name = _digits(), "embedded", "digits"
        sha256 = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
        if sha256 != _PUBLISHED.get(name, sha256):
            warnings.warn(
                f"{source} holds another data set than the published {name}: the checksum (SHA-256) of its arrays is "
                f"{sha256[:12]}…, not {_PUBLISHED[name][:12]}…. What is learned from it is not to be compared.",
                stacklevel=2,
            )
        x_train, y_train, x_test, y_test = (array[: self.limit] for array in arrays)
        x_train, x_test = to_shape(x_train, shape), to_shape(x_test, shape)
        x_validation, y_validation = x_test, y_test
        if self.validation_split:
            try:
                (x_train, y_train), (x_validation, y_validation) = split((x_train, y_train), self.validation_split)
            except ValueError as error:
                raise DataError(str(error)) from error
        training, held_out = (x_train, y_train), (x_validation, y_validation)
        return Arrays(*training, *held_out, x_test, y_test, _CLASSES[name], name, source, sha256, fallback)


class Unread(Data):
    """Stands for a data set of which no example is needed: it has a black image of each kind, and reads nothing."""

    def load(self, shape: Sequence[int] = (28, 28)) -> Arrays:  # noqa: D102
        part = np.zeros((1, *shape), np.uint8), np.zeros(1, np.uint8)
        return Arrays(*part, *part, *part, _CLASSES[self.dataset], self.dataset, "unread", "", None)


def read_picture(path: str | Path, shape: Sequence[int]) -> np.ndarray:
    """A PNG or JPEG file as a uint8 image of the given shape, as `Data.load` makes them.

    Raises:
        DataError: There is no such file, or it is no picture.
    """
    try:
        picture = tf.io.decode_image(Path(path).read_bytes(), expand_animations=False).numpy()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (tf.errors.InvalidArgumentError, ValueError) as error:
        raise DataError(f"{path} is no picture that can be read: it must be a PNG or JPEG file.") from error
    return to_shape(picture[None], shape)[0]


def to_shape(images: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """uint8 images (n, height, width[, channels]) in the given (height, width[, channels])."""
    if images.shape[1:] == tuple(shape):
        return images
    images = images if images.ndim == 4 else images[..., None]
    height, width, channels = (*shape, 1)[:3]
    if images.shape[-1] in (2, 4):  # the last is how opaque a pixel is
        images = images[..., :-1]
    parts = [images[first : first + 1000] for first in range(0, len(images), 1000)]  # floats need four times the room
    if images.shape[1:3] != (height, width):
        parts = [tf.image.resize(part, (height, width), antialias=True).numpy() for part in parts]
    if images.shape[-1] == 3 and channels == 1:
        parts = [tf.image.rgb_to_grayscale(tf.cast(part, tf.float32)).numpy() for part in parts]
    whole = np.concatenate([part if part.dtype == np.uint8 else np.uint8(np.rint(part)) for part in parts])
    return np.broadcast_to(whole, (*whole.shape[:3], channels)).reshape(len(whole), *shape)


def _read(path: Path) -> tuple[np.ndarray, ...]:
    """The four arrays of an npz file; never unpickles."""
    if not path.is_file():
        raise DataError(f"`data_dir`: {path.parent} has no file {path.name}. Put it there, or leave out --data-dir.")
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
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
    host, file = _KERAS[name]
    cached = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "datasets" / file
    if not cached.exists():
        _connect(host)
    with _socket_timeout(_SECONDS):
        try:
            (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
        except Exception as error:  # Keras raises a bare Exception where a download fails
            raise OSError(str(error)) from error
    return x_train, y_train.reshape(-1), x_test, y_test.reshape(-1)


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


def _digits() -> tuple[np.ndarray, ...]:
    """1,500 digits to train on and 297 others, of 0 to 255, 8 pixels squared.

    They are the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    Learning Repository, 1998, CC BY 4.0, https://doi.org/10.24432/C50P49, as scikit-learn ships it: 8x8 counts of
    0 to 16, in `digits.npz` beside this file.
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        images, labels = np.rint(file["images"] * (255 / 16)).astype(np.uint8), file["labels"]
    return images[:1500], labels[:1500], images[1500:], labels[1500:]
