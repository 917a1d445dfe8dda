"""Guides to `fit`: custom steps for a network with one input and one output."""

import keras
import tensorflow as tf

import looplab
from published.system import System, batches, images, normal

GUIDE = "https://keras.io/guides/custom_train_step_in_tensorflow/"
TENSORFLOW_GUIDE = "https://www.tensorflow.org/guide/keras/customizing_what_happens_in_fit"
REFERENCE = "https://keras.io/api/models/model_training_apis/"


def layers():
    inputs = keras.Input((8,))
    return inputs, keras.layers.Dense(1)(keras.layers.Dense(4, "relu")(inputs))


def points():
    return batches((normal(8), normal(1, seed=1)))


def weighted_points():
    return batches((normal(8), normal(1, seed=1), images(1, seed=2)))


class Simple(keras.Model):
    """The first example of the guide: the default step, spelled out."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}


def simple():
    model = Simple(*layers())
    model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    return model


class SimpleTrainer(looplab.Trainer):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss, **self.compute_metrics(x, y, y_pred)}


def simple_trainer(**options):
    return SimpleTrainer(keras.Model(*layers()), optimizer="adam", loss="mse", metrics=["mae"], **options)


class OwnMetrics(keras.Model):
    """The guide's lower level: `compile` gets an optimizer only."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.mae_metric = keras.metrics.MeanAbsoluteError(name="mae")
        self.loss_fn = keras.losses.MeanSquaredError()

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.loss_fn(y, y_pred)
        variables = self.trainable_weights
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.loss_tracker.update_state(loss)
        self.mae_metric.update_state(y, y_pred)
        return {"loss": self.loss_tracker.result(), "mae": self.mae_metric.result()}

    @property
    def metrics(self):
        return [self.loss_tracker, self.mae_metric]


def own_metrics():
    model = OwnMetrics(*layers())
    model.compile(optimizer="adam")
    return model


class OwnMetricsTrainer(looplab.Trainer):
    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.mae_metric = keras.metrics.MeanAbsoluteError(name="mae")
        self.loss_fn = keras.losses.MeanSquaredError()

    metrics = OwnMetrics.metrics
    train_step = OwnMetrics.train_step


def own_metrics_trainer(**options):
    return OwnMetricsTrainer(keras.Model(*layers()), optimizer="adam", **options)


class SampleWeights(keras.Model):
    """The step with sample weights, as older guides write it; `metrics` ignore them."""

    def train_step(self, data):
        sample_weight = None
        if len(data) == 3:
            x, y, sample_weight = data
        else:
            x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compiled_loss(y, y_pred, sample_weight=sample_weight, regularization_losses=self.losses)
        variables = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred, sample_weight=sample_weight)
        return {metric.name: metric.result() for metric in self.metrics}


def sample_weights():
    model = SampleWeights(*layers())
    model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    return model


class SampleWeightsTrainer(looplab.Trainer):
    def train_step(self, data):
        x, y, sample_weight = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compiled_loss(y, y_pred, sample_weight=sample_weight, regularization_losses=self.losses)
        variables = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return {"loss": loss, **self.compute_metrics(x, y, y_pred, sample_weight)}


def sample_weights_trainer(**options):
    return SampleWeightsTrainer(keras.Model(*layers()), optimizer="adam", loss="mse", metrics=["mae"], **options)


class OwnTestStep(keras.Model):
    """The guide's own `test_step`, for a model that trains by Keras's step."""

    def test_step(self, data):
        x, y = data
        y_pred = self(x, training=False)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}


def own_test_step():
    model = OwnTestStep(*layers())
    model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    return model


class OwnTestStepTrainer(looplab.Trainer):
    def test_step(self, data):
        x, y = data
        y_pred = self(x, training=False)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        return {"loss": loss, **self.compute_metrics(x, y, y_pred)}


def own_test_step_trainer(**options):
    return OwnTestStepTrainer(keras.Model(*layers()), optimizer="adam", loss="mse", metrics=["mae"], **options)


class OwnLoss(keras.Model):
    """The examples of `compute_loss` and `compute_metrics` in the API reference, with Keras's own step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.penalty_tracker = keras.metrics.Mean(name="penalty")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        penalty = 0.1 * tf.reduce_mean(y_pred**2)
        self.penalty_tracker.update_state(penalty)
        return loss + penalty

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**results, "size": tf.reduce_mean(tf.abs(y_pred))}


def own_loss():
    model = OwnLoss(*layers())
    model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    return model


class OwnLossTrainer(looplab.Trainer):
    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.penalty_tracker = keras.metrics.Mean(name="penalty")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        penalty = 0.1 * tf.reduce_mean(y_pred**2)
        self.penalty_tracker.update_state(penalty)
        return loss + penalty

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**results, "penalty": self.penalty_tracker.result(), "size": tf.reduce_mean(tf.abs(y_pred))}


def own_loss_trainer(**options):
    return OwnLossTrainer(keras.Model(*layers()), optimizer="adam", loss="mse", metrics=["mae"], **options)


SYSTEMS = [
    System("fit_simple", GUIDE, simple, simple_trainer, points),
    System("fit_own_metrics", GUIDE, own_metrics, own_metrics_trainer, points),
    System("fit_sample_weight", TENSORFLOW_GUIDE, sample_weights, sample_weights_trainer, weighted_points),
    System("fit_test_step", GUIDE, own_test_step, own_test_step_trainer, points, validation=points),
    System("own_loss", REFERENCE, own_loss, own_loss_trainer, points, validation=points, means=("size",)),
]
