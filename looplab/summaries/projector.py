"""Vectors for TensorBoard's projector, with labels and small pictures."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from google.protobuf import text_format
from tensorboard.plugins.projector import EmbeddingInfo, ProjectorConfig

from looplab.callbacks import tile, write_png

_MOST_PIXELS = 8192  # on each side of the picture of all images: browsers draw no larger one


class Embeddings(NamedTuple):
    """Vectors under a name, and what to show at each."""

    name: str
    vectors: np.ndarray
    """float32, shape (n, d)."""
    labels: list[str] | None
    """One line each."""
    images: np.ndarray | None
    """uint8, shape (n, height, width, channels)."""

    def write(self, folder: Path) -> None:
        """Writes them to `folder`, in place of those with the same name."""
        (folder / "embeddings").mkdir(exist_ok=True)
        path = f"embeddings/{hashlib.sha256(self.name.encode()).hexdigest()[:16]}"  # the name may not fit a file
        info = EmbeddingInfo(tensor_name=self.name, tensor_shape=self.vectors.shape, tensor_path=f"{path}.tsv")
        # As text: the projector tries to read text first, and mistakes some binary files for it.
        np.savetxt(folder / info.tensor_path, self.vectors, "%.9g", "\t")
        if self.labels is not None:
            info.metadata_path = f"{path}.labels.tsv"
            (folder / info.metadata_path).write_text("".join(f"{line}\n" for line in self.labels), "utf-8")
        if self.images is not None:
            info.sprite.image_path = f"{path}.png"
            info.sprite.single_image_dim.extend([self.images.shape[2], self.images.shape[1]])
            side = _side(len(self.images))
            square = np.pad(self.images, [(0, side**2 - len(self.images)), (0, 0), (0, 0), (0, 0)])
            write_png(folder / info.sprite.image_path, tile(square, side))
        config = folder / "projector_config.pbtxt"
        known = text_format.Parse(config.read_text("utf-8"), ProjectorConfig()).embeddings if config.exists() else []
        others = [other for other in known if other.tensor_name != self.name]
        config.write_text(text_format.MessageToString(ProjectorConfig(embeddings=[*others, info])), "utf-8")


def checked(name: Any, vectors: Any, labels: Any = None, images: Any = None) -> Embeddings:
    """The arguments of `Trainer.log_embeddings` as the projector needs them."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"`name` must be a string that is not empty; got {name!r}.")
    name = re.sub("[&#+%]", "_", " ".join(name.split()))  # TensorBoard's page does not quote these in addresses
    vectors = _eager("vectors", vectors)
    if vectors.shape.rank != 2 or 0 in vectors.shape or not (vectors.dtype.is_floating or vectors.dtype.is_integer):
        raise ValueError(
            f"`vectors` must be numbers of shape (n, d); got shape {vectors.shape} and dtype {vectors.dtype.name}. "
            f"Flatten other dimensions, for example with `vectors.reshape(len(vectors), -1)`."
        )
    vectors = tf.cast(vectors, tf.float32).numpy()
    labels = None if labels is None else _lines(labels, len(vectors))
    images = None if images is None else _pictures(images, len(vectors))
    return Embeddings(name, vectors, labels, images)


def _lines(labels: Any, count: int) -> list[str]:
    """One line for each label."""
    labels = np.asarray(labels)
    if labels.shape != (count,):
        raise ValueError(f"`labels` must be one for each of the {count} vectors; got shape {labels.shape}.")
    texts = [label.decode(errors="replace") if isinstance(label, bytes) else str(label) for label in labels]
    return [" ".join(text.split()) or "-" for text in texts]  # the projector skips empty lines


def _pictures(images: Any, count: int) -> np.ndarray:
    """Images with a dimension of channels."""
    images = _eager("images", images)
    shape = tuple(images.shape)
    if images.dtype != tf.uint8 or shape[:1] != (count,) or 0 in shape or shape[3:] not in [(), (1,), (3,)]:
        raise ValueError(
            f"`images` must be uint8, one for each of the {count} vectors, of shape (n, height, width), "
            f"(n, height, width, 1) or (n, height, width, 3); got shape {shape} and dtype {images.dtype.name}."
        )
    side, (height, width) = _side(count), shape[1:3]
    if side * max(height, width) > _MOST_PIXELS:
        raise ValueError(
            f"`images` are {count} of {height}x{width} pixels: {side * height}x{side * width} in one picture, of "
            f"which the projector shows at most {_MOST_PIXELS}x{_MOST_PIXELS}. Pass smaller ones, or fewer "
            f"vectors: {(_MOST_PIXELS // max(height, width)) ** 2} of this size fit."
        )
    return images.numpy().reshape(*shape[:3], -1)


def _eager(name: str, value: Any) -> tf.Tensor:
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be an array; got {type(value).__name__}.") from error
    if tf.is_symbolic_tensor(tensor):
        raise TypeError(f"`{name}` has no values while a step is traced. Log embeddings in a callback, or after `fit`.")
    return tensor


def _side(count: int) -> int:
    """The number of rows and columns of the smallest square with `count` cells."""
    return math.isqrt(count - 1) + 1
