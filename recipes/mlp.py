"""A functional network of dense layers on MNIST images scaled down to 128 pixels.

python -m looplab.recipes.mlp    20 s on two cores; test accuracy 97.57%
"""

import keras
from keras import layers

import looplab
from looplab.recipes.images import classifier


def model(classes=10):
    """From images (batch, 16, 8) in [0, 1] to a probability for each class."""
    images = layers.Input((16, 8))
    x = layers.Flatten()(images)
    for units in (256, 512, 128, 64):
        x = layers.Dense(units, "relu")(x)
    return keras.Model(images, layers.Dense(classes, "softmax", dtype="float32")(x), name="mlp")


def mlp(
    data: looplab.Data = looplab.Data("mnist"),
    learning_rate: float = 1e-3,
    epochs: int = 5,
    batch_size: int = 32,
    **trainer_options,
) -> looplab.Recipe:
    """Dense layers, of 240 thousand parameters, on images scaled down to 16×8 pixels.

    Args:
        learning_rate: learning rate of RMSprop
        epochs: passes over the training images
        batch_size: images per step
    """
    optimizer = keras.optimizers.RMSprop(learning_rate)
    arrays = data.load((16, 8))
    return classifier(model(), arrays, epochs, batch_size, optimizer=optimizer, **trainer_options)


if __name__ == "__main__":
    looplab.main(mlp)
