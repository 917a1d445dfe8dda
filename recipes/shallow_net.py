"""ShallowNet on CIFAR-10: one convolution, as a sequential model.

python -m looplab.recipes.shallow_net --epochs 2    28 s on two cores; test accuracy 41.09% (published: 57.15%
after 60 epochs)
"""

import keras
from keras import layers

import looplab
from looplab.recipes.sgd import Augmentation, published_training


def model(classes=10):
    """From images (batch, 32, 32, 3) in [0, 1] to a probability for each class."""
    return keras.Sequential(
        [
            layers.Input((32, 32, 3)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(classes, "softmax", dtype="float32"),
        ],
        name="shallow_net",
    )


def shallow_net(
    data: looplab.Data = looplab.Data("cifar10"),
    augmentation: Augmentation = "heavy",
    learning_rate: float = 1e-2,
    epochs: int = 60,
    batch_size: int = 128,
    **trainer_options,
) -> looplab.Recipe:
    """ShallowNet, of 330 thousand parameters, on 10 classes of images.

    Args:
        augmentation: heavy: rotation, zoom, shift, shear and flip, as published; light: shift and flip
        learning_rate: initial learning rate of SGD
        epochs: passes over the training images
        batch_size: images per step
    """
    options = {"augmentation": augmentation, "epochs": epochs, "batch_size": batch_size, **trainer_options}
    return published_training(model(), data, learning_rate, **options)


if __name__ == "__main__":
    looplab.main(shallow_net)
