"""Logistic regression whose last layer adds the loss and owns the accuracy, so that the trainer needs no `loss`.

python -m looplab.recipes.logistic_endpoint    6 s on two cores; test accuracy 91.46%
"""

import keras
import numpy as np
from keras import layers, ops

import looplab


@keras.saving.register_keras_serializable("looplab")
class LogisticEndpoint(layers.Layer):
    """Turns logits into probabilities; given targets, adds their binary cross-entropy and updates the accuracy."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.loss = keras.losses.BinaryCrossentropy(from_logits=True)
        self.accuracy = keras.metrics.BinaryAccuracy("accuracy", threshold=0.0)  # of logits

    def call(self, logits, targets=None, sample_weight=None):
        if targets is not None:
            self.add_loss(self.loss(targets, logits, sample_weight))
            self.accuracy.update_state(targets, logits, sample_weight)
        return ops.sigmoid(logits)


@keras.saving.register_keras_serializable("looplab")
class LogisticRegression(keras.Model):
    """Takes a dict of `inputs` (batch, n) and, except to predict, `targets` (batch, classes) of 0 and 1."""

    def __init__(self, classes=10, name="logistic_regression", **kwargs):
        super().__init__(name=name, **kwargs)
        self.dense = layers.Dense(classes, dtype=self.dtype_policy, name="dense")
        self.endpoint = LogisticEndpoint(name="endpoint", dtype="float32")

    def call(self, batch):
        return self.endpoint(self.dense(batch["inputs"]), batch.get("targets"), batch.get("sample_weight"))


def logistic_endpoint(
    data: looplab.Data = looplab.Data("mnist"),
    height: int = 28,
    width: int = 28,
    learning_rate: float = 1e-3,
    epochs: int = 5,
    batch_size: int = 64,
    **trainer_options,
) -> looplab.Recipe:
    """Logistic regression on the pixels of handwritten digits.

    Args:
        height: height to which images are scaled
        width: width to which images are scaled; for 1×3 pixels the model has 40 parameters
        learning_rate: learning rate of Adam
        epochs: passes over the training images
        batch_size: images per step
    """
    arrays = data.load((height, width))
    model = LogisticRegression(len(arrays.classes))

    def inputs(images):
        return {"inputs": images.reshape(len(images), -1) / np.float32(255)}

    def batch(images, labels):
        return inputs(images) | {"targets": keras.utils.to_categorical(labels, len(arrays.classes))}

    trainer = looplab.Trainer(model, optimizer=keras.optimizers.Adam(learning_rate), **trainer_options)
    return looplab.Recipe(
        trainer,
        batch(arrays.x_train, arrays.y_train),
        batch(arrays.x_validation, arrays.y_validation),
        epochs,
        batch_size,
        data=arrays,
        predict=lambda images: trainer.predict(inputs(images), batch_size=256, verbose=0),
    )


if __name__ == "__main__":
    looplab.main(logistic_endpoint)
