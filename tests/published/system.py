"""What a published training system consists of here."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import looplab

BATCH, BATCHES = 8, 10

# Without biases, there are half as many variables, and a step is traced faster.
Dense = functools.partial(keras.layers.Dense, use_bias=False)
Conv2D = functools.partial(keras.layers.Conv2D, use_bias=False)
Conv2DTranspose = functools.partial(keras.layers.Conv2DTranspose, use_bias=False)


class System(NamedTuple):
    """A published training step, as a Keras model and as a `looplab.Trainer`."""

    name: str
    source: str
    """The page that describes it."""
    model: Callable[[], keras.Model]
    """Creates the compiled Keras model."""
    trainer: Callable[..., looplab.Trainer]
    """Creates a trainer with the same step, networks and optimizers, and these options."""
    data: Callable[[], tf.data.Dataset]
    """Creates the data of one epoch."""
    validation: Callable[[], tf.data.Dataset] | None = None
    """Creates the validation data, if a step of evaluation belongs to the system."""
    means: tuple[str, ...] = ()
    """The logs that are values of a batch, no metrics: Keras's epoch has the last one, looplab's has their mean."""
    differing: tuple[str, ...] = ()
    """The logs that differ from Keras's on purpose."""
    tolerance: float = 0.0
    """By how much the weights may differ from those of Keras's `fit`."""
    reason: str = ""
    """Why logs or weights may differ."""


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Random numbers for all batches, of this shape for each example."""
    return np.random.default_rng(seed).normal(size=(BATCH * BATCHES, *shape)).astype("float32")


def images(*shape: int, seed: int = 0) -> np.ndarray:
    """Random numbers from 0 to 1 for all batches, of this shape for each example."""
    return np.random.default_rng(seed).uniform(size=(BATCH * BATCHES, *shape)).astype("float32")


def labels(classes: int, *shape: int, seed: int = 1) -> np.ndarray:
    """Random classes for all batches, of this shape for each example."""
    return np.random.default_rng(seed).integers(classes, size=(BATCH * BATCHES, *shape)).astype("int32")


def batches(examples: Any) -> tf.data.Dataset:
    """A dataset of batches, from a structure of arrays."""
    return tf.data.Dataset.from_tensor_slices(examples).batch(BATCH, drop_remainder=True)
