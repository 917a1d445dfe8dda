"""MiniGoogLeNet on CIFAR-10: MiniInception as a functional model, with dropout before the classifier.

python -m looplab.recipes.mini_googlenet --epochs 1 --precision mixed_bfloat16    5 minutes on two cores with AMX;
test accuracy 41.28% (published: 86.49% after 60 epochs)
"""

import keras
from keras import layers

import looplab
from looplab.recipes.images import ConvBlock
from looplab.recipes.sgd import Augmentation, published_training


def model(classes=10, dropout=0.5):
    """From images (batch, 32, 32, 3) in [0, 1] to a probability for each class."""

    def inception(images, filters_1x1, filters_3x3):
        return layers.concatenate([ConvBlock(filters_1x1, 1)(images), ConvBlock(filters_3x3, 3)(images)])

    def downsample(images, filters):
        return layers.concatenate([ConvBlock(filters, 3, 2, "valid")(images), layers.MaxPooling2D(3, 2)(images)])

    images = layers.Input((32, 32, 3))
    x = ConvBlock(96, 3)(images)
    for filters in [(32, 32), (32, 48)]:
        x = inception(x, *filters)
    x = downsample(x, 80)
    for filters in [(112, 48), (96, 64), (80, 80), (48, 96)]:
        x = inception(x, *filters)
    x = downsample(x, 96)
    for filters in [(176, 160), (176, 160)]:
        x = inception(x, *filters)
    x = layers.Flatten()(layers.AveragePooling2D(7)(x))
    outputs = layers.Dense(classes, "softmax", dtype="float32")(layers.Dropout(dropout)(x))
    return keras.Model(images, outputs, name="mini_googlenet")


def mini_googlenet(
    data: looplab.Data = looplab.Data("cifar10"),
    dropout: float = 0.5,
    augmentation: Augmentation = "heavy",
    learning_rate: float = 1e-2,
    epochs: int = 60,
    batch_size: int = 128,
    **trainer_options,
) -> looplab.Recipe:
    """MiniGoogLeNet, of 1.7 million parameters, on 10 classes of images.

    Args:
        dropout: fraction of the classifier's inputs that is dropped in training
        augmentation: heavy: rotation, zoom, shift, shear and flip, as published; light: shift and flip
        learning_rate: initial learning rate of SGD
        epochs: passes over the training images
        batch_size: images per step
    """
    options = {"augmentation": augmentation, "epochs": epochs, "batch_size": batch_size, **trainer_options}
    return published_training(model(dropout=dropout), data, learning_rate, **options)


if __name__ == "__main__":
    looplab.main(mini_googlenet)
