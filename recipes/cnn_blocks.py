"""Three blocks of convolution, batch normalization and ReLU on MNIST.

python -m looplab.recipes.cnn_blocks    10 minutes on two cores; test accuracy 98.99% (published: 98.75%)
"""

import keras
from keras import layers

import looplab
from looplab.recipes.images import ConvBlock, classifier, falling_adam


@keras.saving.register_keras_serializable("looplab")
class CNNBlocks(keras.Model):
    """From images (batch, 28, 28, 1) in [0, 1] to a logit for each class."""

    def __init__(self, classes=10, filters=(32, 64, 128), name="cnn_blocks", **kwargs):
        super().__init__(name=name, **kwargs)
        self.blocks = [ConvBlock(count, dtype=self.dtype_policy, name=f"block_{count}") for count in filters]
        self.flatten = layers.Flatten(dtype=self.dtype_policy, name="flatten")
        self.classifier = layers.Dense(classes, dtype="float32", name="classes")

    def call(self, images):
        for block in self.blocks:
            images = block(images)
        return self.classifier(self.flatten(images))


def cnn_blocks(
    data: looplab.Data = looplab.Data("mnist"),
    learning_rate: float = 1e-3,
    epochs: int = 3,
    batch_size: int = 64,
    **trainer_options,
) -> looplab.Recipe:
    """Three convolutional blocks, of 1.1 million parameters, on handwritten digits.

    Args:
        learning_rate: initial learning rate of Adam, which decays to 0
        epochs: passes over the training images
        batch_size: images per step
    """
    arrays = data.load((28, 28, 1))
    optimizer = falling_adam(learning_rate, arrays, epochs, batch_size)
    return classifier(CNNBlocks(), arrays, epochs, batch_size, from_logits=True, optimizer=optimizer, **trainer_options)


if __name__ == "__main__":
    looplab.main(cnn_blocks)
