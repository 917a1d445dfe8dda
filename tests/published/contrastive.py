"""Contrastive learning: the networks and data of several systems, and SimCLR with a linear probe."""

import keras
import tensorflow as tf

import looplab
from published.system import Conv2D, Dense, System, batches, images, labels

L = keras.layers
SIZE, WIDTH, CLASSES = 8, 4, 3


def augmenter(name):
    return keras.Sequential([keras.Input((SIZE, SIZE, 1)), L.RandomFlip("horizontal")], name=name)


def encoder(name="encoder"):
    layers = [Conv2D(4, 3, strides=2, activation="relu"), L.BatchNormalization(), L.Flatten(), Dense(WIDTH)]
    return keras.Sequential([keras.Input((SIZE, SIZE, 1)), *layers], name=name)


def head(name="projection_head"):
    return keras.Sequential([keras.Input((WIDTH,)), Dense(WIDTH)], name=name)


def probe():
    return keras.Sequential([keras.Input((WIDTH,)), Dense(CLASSES)], name="linear_probe")


def networks():
    augmenters = augmenter("contrastive_augmenter"), augmenter("classification_augmenter")
    return *augmenters, encoder(), head(), probe()


def optimizers():
    return keras.optimizers.Adam(), keras.optimizers.Adam()


def labeled_and_unlabeled():
    unlabeled = images(SIZE, SIZE, 1), labels(CLASSES)
    return batches((unlabeled, (images(SIZE, SIZE, 1, seed=2), labels(CLASSES, seed=3))))


def labeled():
    return batches((images(SIZE, SIZE, 1, seed=4), labels(CLASSES, seed=5)))


class SimCLR(keras.Model):
    """Semi-supervised SimCLR: a contrastive and a probing update in a step, each with its tracker and accuracy."""

    def __init__(self, contrastive_augmenter, classification_augmenter, encoder, projection_head, linear_probe):
        super().__init__()
        self.temperature = 0.1
        self.contrastive_augmenter = contrastive_augmenter
        self.classification_augmenter = classification_augmenter
        self.encoder = encoder
        self.projection_head = projection_head
        self.linear_probe = linear_probe

    def compile(self, contrastive_optimizer, probe_optimizer, **kwargs):
        super().compile(**kwargs)
        self.contrastive_optimizer = contrastive_optimizer
        self.probe_optimizer = probe_optimizer
        self.probe_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.contrastive_loss_tracker = keras.metrics.Mean(name="c_loss")
        self.contrastive_accuracy = keras.metrics.SparseCategoricalAccuracy(name="c_acc")
        self.probe_loss_tracker = keras.metrics.Mean(name="p_loss")
        self.probe_accuracy = keras.metrics.SparseCategoricalAccuracy(name="p_acc")

    @property
    def metrics(self):
        contrastive = [self.contrastive_loss_tracker, self.contrastive_accuracy]
        return [*contrastive, self.probe_loss_tracker, self.probe_accuracy]

    def contrastive_loss(self, first, second):
        first, second = tf.math.l2_normalize(first, axis=1), tf.math.l2_normalize(second, axis=1)
        similarities = tf.matmul(first, second, transpose_b=True) / self.temperature
        targets = tf.range(tf.shape(first)[0])
        self.contrastive_accuracy.update_state(targets, similarities)
        self.contrastive_accuracy.update_state(targets, tf.transpose(similarities))
        rows = keras.losses.sparse_categorical_crossentropy(targets, similarities, from_logits=True)
        columns = keras.losses.sparse_categorical_crossentropy(targets, tf.transpose(similarities), from_logits=True)
        return tf.reduce_mean(rows + columns) / 2

    def train_step(self, data):
        (unlabeled_images, _), (labeled_images, labels) = data
        both = tf.concat((unlabeled_images, labeled_images), axis=0)
        first = self.contrastive_augmenter(both, training=True)
        second = self.contrastive_augmenter(both, training=True)
        with tf.GradientTape() as tape:
            projections = [
                self.projection_head(self.encoder(view, training=True), training=True) for view in (first, second)
            ]
            contrastive_loss = self.contrastive_loss(*projections)
        variables = self.encoder.trainable_weights + self.projection_head.trainable_weights
        gradients = tape.gradient(contrastive_loss, variables)
        self.contrastive_optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self.contrastive_loss_tracker.update_state(contrastive_loss)

        preprocessed = self.classification_augmenter(labeled_images, training=True)
        with tf.GradientTape() as tape:
            logits = self.linear_probe(self.encoder(preprocessed, training=False), training=True)
            probe_loss = self.probe_loss(labels, logits)
        gradients = tape.gradient(probe_loss, self.linear_probe.trainable_weights)
        self.probe_optimizer.apply_gradients(zip(gradients, self.linear_probe.trainable_weights, strict=True))
        self.probe_loss_tracker.update_state(probe_loss)
        self.probe_accuracy.update_state(labels, logits)
        return {metric.name: metric.result() for metric in self.metrics}

    def test_step(self, data):
        images, labels = data
        features = self.encoder(self.classification_augmenter(images, training=False), training=False)
        logits = self.linear_probe(features, training=False)
        self.probe_loss_tracker.update_state(self.probe_loss(labels, logits))
        self.probe_accuracy.update_state(labels, logits)
        return {metric.name: metric.result() for metric in self.metrics[2:]}


def simclr():
    model = SimCLR(*networks())
    model.compile(*optimizers())
    return model


class SimCLRTrainer(looplab.Trainer):
    def __init__(
        self, contrastive_augmenter, classification_augmenter, encoder, projection_head, linear_probe, **options
    ):
        super().__init__(**options)
        self.temperature = 0.1
        self.contrastive_augmenter = contrastive_augmenter
        self.classification_augmenter = classification_augmenter
        self.encoder = encoder
        self.projection_head = projection_head
        self.linear_probe = linear_probe
        self.contrastive_optimizer, self.probe_optimizer = optimizers()
        self.probe_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.contrastive_loss_tracker = keras.metrics.Mean(name="c_loss")
        self.contrastive_accuracy = keras.metrics.SparseCategoricalAccuracy(name="c_acc")
        self.probe_loss_tracker = keras.metrics.Mean(name="p_loss")
        self.probe_accuracy = keras.metrics.SparseCategoricalAccuracy(name="p_acc")

    metrics = SimCLR.metrics
    contrastive_loss = SimCLR.contrastive_loss
    train_step = SimCLR.train_step
    test_step = SimCLR.test_step


def simclr_trainer(**options):
    return SimCLRTrainer(*networks(), **options)


SYSTEMS = [
    System(
        "simclr",
        "https://keras.io/examples/vision/semisupervised_simclr/",
        simclr,
        simclr_trainer,
        labeled_and_unlabeled,
        validation=labeled,
    ),
]
