"""What the image recipes share: a block of layers, a trainer that takes uint8 images, and augmentation."""

import math

import keras
from keras import layers, ops

import looplab


@keras.saving.register_keras_serializable("looplab")
class ConvBlock(layers.Layer):
    """Convolution, batch normalization and ReLU: 6 weights, 4 of them trainable."""

    def __init__(
        self, filters, kernel_size=3, strides=1, padding="same", kernel_initializer="glorot_uniform", **kwargs
    ):
        super().__init__(**kwargs)
        options = {"kernel_initializer": kernel_initializer, "dtype": self.dtype_policy, "name": "convolution"}
        self.convolution = layers.Conv2D(filters, kernel_size, strides, padding, **options)
        self.normalization = layers.BatchNormalization(dtype=self.dtype_policy, name="normalization")

    def build(self, input_shape):
        self.convolution.build(input_shape)
        self.normalization.build(self.convolution.compute_output_shape(input_shape))

    def call(self, images):
        return ops.relu(self.normalization(self.convolution(images)))


class ImageTrainer(looplab.Trainer):
    """Takes uint8 images, scales them to [0, 1] and, in training, augments them.

    Both happen inside the step: images take little memory, and a resumed run draws the same random numbers.
    """

    def __init__(self, model, augmentation=(), **options):
        super().__init__(model, **options)
        self.augmentation = list(augmentation)

    def __call__(self, images, training=False):
        images = ops.cast(images, "float32") / 255
        for layer in self.augmentation if training else ():
            images = layer(images, training=True)
        return super().__call__(images, training=training)


def light_augmentation():
    """Flips half of the images, and shifts each by up to an eighth; the gap is filled by reflection."""
    shift = layers.RandomTranslation(1 / 8, 1 / 8, fill_mode="reflect", interpolation="nearest", dtype="float32")
    return [layers.RandomFlip("horizontal", dtype="float32"), shift]


def heavy_augmentation():
    """MiniGoogLeNet's published augmentation: rotation by 18°, zoom by 15%, shift by 20%, shear by 0.15°, flip."""
    options = {"fill_mode": "nearest", "dtype": "float32"}
    return [
        layers.RandomRotation(18 / 360, **options),
        layers.RandomZoom(0.15, 0.15, **options),
        layers.RandomTranslation(0.2, 0.2, **options),
        layers.RandomShear(math.tan(math.radians(0.15)), **options),
        layers.RandomFlip("horizontal", dtype="float32"),
    ]


def falling_adam(learning_rate, data, epochs, batch_size):
    """Adam, with cosine decay of the learning rate to 0 over the whole run."""
    steps = epochs * math.ceil(len(data.x_train) / batch_size)
    return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps))


def classifier(model, data, epochs, batch_size, loss=None, from_logits=False, augmentation=(), **trainer_options):
    """The recipe of a model that classifies the images of `data`, with probabilities or logits as outputs."""
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits)
    trainer = ImageTrainer(model, augmentation, loss=loss, metrics=["accuracy"], **trainer_options)

    def predict(images):
        outputs = trainer.predict(images, batch_size=256, verbose=0)
        return ops.convert_to_numpy(ops.softmax(outputs)) if from_logits else outputs

    train, validation = (data.x_train, data.y_train), (data.x_validation, data.y_validation)
    return looplab.Recipe(trainer, train, validation, epochs, batch_size, data=data, predict=predict)
