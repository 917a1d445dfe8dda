"""A residual network with pre-activation blocks (He et al. 2016, arXiv:1603.05027) on MNIST.

python -m looplab.recipes.preact_resnet    5 minutes on two cores; test accuracy 99.54% after 3 epochs
"""

import keras
from keras import layers, ops

import looplab
from looplab.recipes.images import classifier, falling_adam


def convolution(filters, kernel_size=3, strides=1, **options):
    """A convolution without bias, initialized from a normal distribution."""
    return layers.Conv2D(
        filters, kernel_size, strides, "same", use_bias=False, kernel_initializer="random_normal", **options
    )


@keras.saving.register_keras_serializable("looplab")
class PreActBlock(layers.Layer):
    """Batch normalization, ReLU and convolution, twice, plus the input, which is convolved too if `strides` > 1."""

    def __init__(self, filters, strides=1, **kwargs):
        super().__init__(**kwargs)
        options = {"dtype": self.dtype_policy}
        self.norm_1, self.conv_1 = layers.BatchNormalization(**options), convolution(filters, 3, strides, **options)
        self.norm_2, self.conv_2 = layers.BatchNormalization(**options), convolution(filters, **options)
        self.shortcut = []
        if strides > 1:
            normalization, relu = layers.BatchNormalization(**options), layers.ReLU(**options)
            self.shortcut = [normalization, relu, convolution(filters, 1, strides, **options)]

    def call(self, images):
        x = self.conv_1(ops.relu(self.norm_1(images)))
        x = self.conv_2(ops.relu(self.norm_2(x)))
        for layer in self.shortcut:
            images = layer(images)
        return x + images


@keras.saving.register_keras_serializable("looplab")
class PreActResNet(keras.Model):
    """From images (batch, height, width, channels) in [0, 1] to a logit for each class."""

    def __init__(self, blocks=(2, 2, 2), classes=10, filters=16, name="preact_resnet", **kwargs):
        super().__init__(name=name, **kwargs)
        options = {"dtype": self.dtype_policy}
        self.first = convolution(filters, **options, name="first")
        self.blocks = []
        for stage, count in enumerate(blocks):
            for block in range(count):
                strides, name = 2 if stage > 0 and block == 0 else 1, f"stage_{stage + 1}_{block + 1}"
                self.blocks.append(PreActBlock(filters * 2**stage, strides, **options, name=name))
        self.normalization = layers.BatchNormalization(**options, name="normalization")
        self.average = layers.GlobalAveragePooling2D(**options, name="average")
        self.classifier = layers.Dense(classes, dtype="float32", name="classes")

    def call(self, images):
        x = self.first(images)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.average(ops.relu(self.normalization(x))))


def preact_resnet(
    data: looplab.Data = looplab.Data("mnist"),
    learning_rate: float = 1e-3,
    epochs: int = 3,
    batch_size: int = 64,
    **trainer_options,
) -> looplab.Recipe:
    """A pre-activation ResNet of 14 layers, of 180 thousand parameters, on handwritten digits.

    Args:
        learning_rate: initial learning rate of Adam, which decays to 0
        epochs: passes over the training images
        batch_size: images per step
    """
    arrays = data.load((28, 28, 1))
    optimizer = falling_adam(learning_rate, arrays, epochs, batch_size)
    return classifier(
        PreActResNet(), arrays, epochs, batch_size, from_logits=True, optimizer=optimizer, **trainer_options
    )


if __name__ == "__main__":
    looplab.main(preact_resnet)
