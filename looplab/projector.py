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

_SPRITE_PIXELS = 8192  # in a row or column of a projector's picture: what browsers can draw


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
        """Writes them below `folder`, in place of those of the same name."""
        # The hash tells names apart that are the same without their unfit characters.
        stem = re.sub("[^A-Za-z0-9]+", "_", self.name)[:80] + "-" + hashlib.sha256(self.name.encode()).hexdigest()[:8]
        (folder / "embeddings").mkdir(exist_ok=True)
        path = f"embeddings/{stem}"
        info = EmbeddingInfo(tensor_name=self.name, tensor_shape=self.vectors.shape, tensor_path=f"{path}.tsv")
        # As text: the projector tries to read it so first, and takes some binary files for text.
        np.savetxt(folder / info.tensor_path, self.vectors, "%.9g", "\t")
        if self.labels is not None:
            info.metadata_path = f"{path}.labels.tsv"
            (folder / info.metadata_path).write_text("".join(f"{line}\n" for line in self.labels), "utf-8")
        if self.images is not None:
            info.sprite.image_path = f"{path}.png"
            info.sprite.single_image_dim.extend([self.images.shape[2], self.images.shape[1]])
            (folder / info.sprite.image_path).write_bytes(_sprite(self.images))
        config = folder / "projector_config.pbtxt"
        known = text_format.Parse(config.read_text("utf-8"), ProjectorConfig()).embeddings if config.exists() else []
        others = [other for other in known if other.tensor_name != self.name]
        config.write_text(text_format.MessageToString(ProjectorConfig(embeddings=[*others, info])), "utf-8")


def checked(name: Any, vectors: Any, labels: Any = None, images: Any = None) -> Embeddings:
    """The arguments of `Trainer.log_embeddings` as the projector takes them: one line a label, images with channels."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"`name` must be a string that is not empty; {name!r} came.")
    # TensorBoard's page asks for a name as it stands, without quoting what has a meaning in an address.
    name = re.sub("[&#+%]", "_", " ".join(name.split()))
    vectors = _eager("vectors", vectors)
    if vectors.shape.rank != 2 or 0 in vectors.shape or not (vectors.dtype.is_floating or vectors.dtype.is_integer):
        raise ValueError(
            f"`vectors` must be numbers of shape (n, d); shape {vectors.shape} and dtype {vectors.dtype.name} came. "
            f"Flatten what has more dimensions, such as with `vectors.reshape(len(vectors), -1)`."
        )
    count = len(vectors)
    lines = None
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (count,):
            raise ValueError(f"`labels` must be one for each of the {count} vectors; shape {labels.shape} came.")
        texts = [label.decode(errors="replace") if isinstance(label, bytes) else str(label) for label in labels]
        lines = [" ".join(text.split()) or "-" for text in texts]  # the projector skips empty lines
    if images is not None:
        images = _eager("images", images)
        shape = tuple(images.shape)
        if images.dtype != tf.uint8 or shape[:1] != (count,) or 0 in shape or shape[3:] not in [(), (1,), (3,)]:
            raise ValueError(
                f"`images` must be uint8 of shape (n, height, width), or with 1 or 3 channels behind, and one for each "
                f"of the {count} vectors; shape {shape} and dtype {images.dtype.name} came."
            )
        side, (height, width) = _side(count), shape[1:3]
        if side * max(height, width) > _SPRITE_PIXELS:
            raise ValueError(
                f"`images` are {count} of {height}x{width} pixels: {side * height}x{side * width} in one picture, of "
                f"which the projector shows at most {_SPRITE_PIXELS}x{_SPRITE_PIXELS}. Pass smaller ones, or fewer "
                f"vectors: {(_SPRITE_PIXELS // max(height, width)) ** 2} of this size fit."
            )
        images = images.numpy().reshape(*shape[:3], -1)
    return Embeddings(name, tf.cast(vectors, tf.float32).numpy(), lines, images)


def _eager(name: str, value: Any) -> tf.Tensor:
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be an array; {type(value).__name__} came.") from error
    if tf.is_symbolic_tensor(tensor):
        raise TypeError(f"`{name}` has no values while a step is traced. Log embeddings in a callback, or after `fit`.")
    return tensor


def _side(count: int) -> int:
    """How many rows and columns a square has that holds so many."""
    return math.isqrt(count - 1) + 1


def _sprite(images: np.ndarray) -> bytes:
    """One PNG file of all images (n, height, width, channels), row by row in a square."""
    count, height, width, channels = images.shape
    side = _side(count)
    cells = np.zeros((side * side, height, width, channels), np.uint8)
    cells[:count] = images
    rows = cells.reshape(side, side, height, width, channels).swapaxes(1, 2)
    return tf.io.encode_png(rows.reshape(side * height, side * width, channels)).numpy()
