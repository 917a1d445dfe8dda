"""Datasets by name: from a file, from Keras, or the digits that looplab contains."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from looplab.data.arrays import split
from looplab.paths import local_path
from looplab.warn import say

_DIGITS = tuple("0123456789")
_CLASSES = {
    "mnist": _DIGITS,
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "digits": _DIGITS,
}
# Of the bytes of all images and labels. The four files of http://yann.lecun.com/exdb/mnist have these bytes.
_PUBLISHED = {"mnist": "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"}
_SECONDS = 10.0  # to connect to a host, and between two packets


class DataError(ValueError):
    """A dataset is not available as requested."""


class Arrays(NamedTuple):
    """A dataset in memory."""

    x_train: np.ndarray
    """uint8 images, shape (n, height, width) or (n, height, width, channels)."""
    y_train: np.ndarray
    """uint8 labels, shape (n,)."""
    x_validation: np.ndarray
    """The last part of the training images, held out; without `validation_split`, the test images."""
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]
    """The names of the labels 0, 1, …"""
    name: str
    """"mnist", "cifar10" or "digits"."""
    source: str
    """The file, "keras" or "embedded"."""
    sha256: str
    """Of the bytes of all arrays."""
    fallback: str | None
    """Why it is not the requested dataset, in one line."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Which dataset a recipe learns from.

    Args:
        dataset: its name; mnist and cifar10 become digits, with a message, if neither a file nor the network has them
        data_dir: folder of DATASET.npz (default: $LOOPLAB_DATA_DIR, else Keras's cache and download)
        limit: take only the first LIMIT examples of training and of test
        validation_split: hold out this last part of the training examples to validate on (0: validate on the test set)
    """

    dataset: Literal["mnist", "cifar10", "digits"] = "mnist"
    data_dir: str | None = None
    limit: int | None = None
    validation_split: float = 0.0

    def __post_init__(self) -> None:
        if self.dataset not in _CLASSES:
            raise DataError(f"`dataset` must be one of {', '.join(_CLASSES)}; got {self.dataset!r}.")
        if self.limit is not None and self.limit < 1:
            raise DataError(f"`limit` must be at least 1; got {self.limit}.")
        if not 0 <= self.validation_split < 1:
            raise DataError(f"`validation_split` must be from 0 to below 1; got {self.validation_split}.")

    def load(self, shape: Sequence[int] = (28, 28)) -> Arrays:
        """The arrays, with images of the given shape, (height, width) or (height, width, channels).

        Images are resized; grey ones are repeated over the channels; coloured ones become their brightness.

        Raises:
            DataError: The file is missing, damaged or holds something else, or `validation_split` leaves nothing.
        """
        if min(shape) < 1:
            raise DataError(f"Images must have at least one pixel; got {'×'.join(map(str, shape))}.")
        name, fallback = self.dataset, None
        folder = self.data_dir or os.environ.get("LOOPLAB_DATA_DIR")
        if name == "digits":
            arrays, source = _digits(), "embedded"
        elif folder:
            with _data_errors():
                path = local_path("data_dir", folder) / f"{name}.npz"
            arrays, source = _read(path), str(path)
        else:
            try:
                arrays, source = _from_keras(name), "keras"
            except OSError as error:
                fallback = f"{name} cannot be downloaded ({error}): learning from 1,797 embedded digits instead"
                say(f"looplab: {fallback}. To use a file: --data-dir FOLDER_OF_{name.upper()}_NPZ")
                arrays, source, name = _digits(), "embedded", "digits"
        sha256 = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
        if sha256 != _PUBLISHED.get(name, sha256):
            warnings.warn(
                f"{source} is not the published {name}: the checksum (SHA-256) of its arrays is {sha256[:12]}…, not "
                f"{_PUBLISHED[name][:12]}…. Results cannot be compared with others.",
                stacklevel=2,
            )
        x_train, y_train, x_test, y_test = (array[: self.limit] for array in arrays)
        train = to_shape(x_train, shape), y_train
        test = validation = to_shape(x_test, shape), y_test
        if self.validation_split:
            with _data_errors():
                train, validation = split(train, self.validation_split)
        return Arrays(*train, *validation, *test, _CLASSES[name], name, source, sha256, fallback)


class Unread(Data):
    """Stands for a dataset whose examples nobody needs: one black image in each part; reads nothing."""

    def load(self, shape: Sequence[int] = (28, 28)) -> Arrays:  # noqa: D102
        part = np.zeros((1, *shape), np.uint8), np.zeros(1, np.uint8)
        return Arrays(*part, *part, *part, _CLASSES[self.dataset], self.dataset, "unread", "", None)


@contextlib.contextmanager
def _data_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataError(str(error)) from error


def read_picture(path: str | Path, shape: Sequence[int]) -> np.ndarray:
    """A PNG or JPEG file as a uint8 image of the given shape, converted as in `Data.load`.

    Raises:
        DataError: There is no such file, or it is not a picture.
    """
    try:
        picture = tf.io.decode_image(Path(path).read_bytes(), expand_animations=False).numpy()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (tf.errors.InvalidArgumentError, ValueError) as error:
        raise DataError(f"{path} is not a picture that can be read: it must be a PNG or JPEG file.") from error
    return to_shape(picture[None], shape)[0]


def to_shape(images: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """uint8 images (n, height, width[, channels]) in the given (height, width[, channels])."""
    if images.shape[1:] == tuple(shape):
        return images
    images = images if images.ndim == 4 else images[..., None]
    if images.shape[-1] in (2, 4):
        images = images[..., :-1]  # without opacity
    size, channels = shape[:2], (*shape, 1)[2]
    parts = []
    for first in range(0, len(images), 1000):  # floating-point numbers need four times the memory
        part = tf.image.resize(images[first : first + 1000], size, antialias=True)
        if part.shape[-1] == 3 and channels == 1:
            part = tf.image.rgb_to_grayscale(tf.cast(part, tf.float32))
        parts.append(np.rint(part).astype(np.uint8))
    whole = np.concatenate(parts)
    return np.broadcast_to(whole, (*whole.shape[:3], channels)).reshape(len(whole), *shape)


def _read(path: Path) -> tuple[np.ndarray, ...]:
    """The four arrays of an npz file; never unpickles."""
    if not path.is_file():
        raise DataError(f"`data_dir`: {path.parent} has no file {path.name}. Put it there, or leave out --data-dir.")
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            arrays = tuple(file[key] for key in keys)
    except Exception as error:  # NumPy and zipfile raise a dozen types for damaged files
        raise DataError(
            f"`data_dir`: {path} is damaged, or lacks some of {', '.join(keys)} ({type(error).__name__}: {error}). "
            f"Download it again."
        ) from error
    x_train, y_train, x_test, y_test = arrays
    for x, y in ((x_train, y_train), (x_test, y_test)):
        images = x.dtype == np.uint8 and x.ndim >= 3 and len(x) > 0 and x.shape[1:] == x_train.shape[1:]
        labels = np.issubdtype(y.dtype, np.integer) and y.shape in ((len(x),), (len(x), 1))
        if not (images and labels):
            raise DataError(
                f"`data_dir`: {path} must hold uint8 images (n, height, width) and one whole number for each; got "
                f"images of {x.dtype} {x.shape} with labels of {y.dtype} {y.shape}."
            )
    return x_train, y_train.reshape(-1), x_test, y_test.reshape(-1)


def _from_keras(name: str) -> tuple[np.ndarray, ...]:
    """From Keras's cache or download.

    Raises:
        OSError: The host does not answer, or the file is damaged.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SECONDS)
    try:
        (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    except Exception as error:  # Keras raises a bare Exception if a download fails
        raise OSError(str(error)) from error
    finally:
        socket.setdefaulttimeout(before)
    return x_train, y_train.reshape(-1), x_test, y_test.reshape(-1)


def _digits() -> tuple[np.ndarray, ...]:
    """1,500 digits to train on and 297 others, of 0 to 255, 8 pixels squared.

    They are the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    Learning Repository, 1998, CC BY 4.0, https://doi.org/10.24432/C50P49, as scikit-learn contains it: 8x8 counts of
    0 to 16, in `digits.npz` beside this file.
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as file:
        images, labels = np.rint(file["images"] * (255 / 16)).astype(np.uint8), file["labels"]
    return images[:1500], labels[:1500], images[1500:], labels[1500:]
