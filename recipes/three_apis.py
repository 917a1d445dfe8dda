"""One network on MNIST as a sequential, a functional and a subclassed model, which train to the same bits.

python -m looplab.recipes.three_apis --api subclass    8 s on two cores; test accuracy 97.80%
"""

from typing import Literal

import keras
from keras import layers

import looplab
from looplab.recipes.images import classifier, falling_adam


def parts(classes=10, **options):
    """The layers, in order."""
    return [
        layers.Conv2D(32, 3, 2, activation="relu", **options, name="conv_1"),
        layers.MaxPooling2D(3, **options, name="pooling"),
        layers.BatchNormalization(**options, name="normalization_1"),
        layers.Conv2D(64, 3, activation="relu", **options, name="conv_2"),
        layers.BatchNormalization(**options, name="normalization_2"),
        layers.Dropout(0.3, **options, name="dropout"),
        layers.GlobalAveragePooling2D(**options, name="average"),
        layers.Dense(classes, dtype="float32", name="classes"),
    ]


def sequential():
    """From images (batch, 28, 28, 3) in [0, 1] to a logit for each class."""
    return keras.Sequential([layers.Input((28, 28, 3)), *parts()], name="sequential")


def functional():
    """The same layers, as a functional model."""
    x = images = layers.Input((28, 28, 3))
    for layer in parts():
        x = layer(x)
    return keras.Model(images, x, name="functional")


@keras.saving.register_keras_serializable("looplab")
class Subclass(keras.Model):
    """The same layers, as a class."""

    def __init__(self, name="subclass", **kwargs):
        super().__init__(name=name, **kwargs)
        self.parts = parts(dtype=self.dtype_policy)

    def call(self, x):
        for layer in self.parts:
            x = layer(x)
        return x


def three_apis(
    data: looplab.Data = looplab.Data("mnist"),
    api: Literal["sequential", "functional", "subclass"] = "sequential",
    learning_rate: float = 1e-2,
    epochs: int = 1,
    batch_size: int = 128,
    **trainer_options,
) -> looplab.Recipe:
    """A small convolutional network, of 20 thousand parameters, on handwritten digits, in one of Keras's three APIs.

    Args:
        api: how the model is written
        learning_rate: initial learning rate of Adam, which decays to 0
        epochs: passes over the training images
        batch_size: images per step
    """
    model = {"sequential": sequential, "functional": functional, "subclass": Subclass}[api]()
    arrays = data.load((28, 28, 3))
    optimizer = falling_adam(learning_rate, arrays, epochs, batch_size)
    return classifier(model, arrays, epochs, batch_size, from_logits=True, optimizer=optimizer, **trainer_options)


if __name__ == "__main__":
    looplab.main(three_apis)
