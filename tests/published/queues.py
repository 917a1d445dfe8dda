"""Contrastive learning with a queue of features: nearest neighbours, and a momentum encoder."""

import keras
import tensorflow as tf

import looplab
from published.contrastive import (
    SIZE,
    WIDTH,
    augmenter,
    encoder,
    head,
    labeled,
    labeled_and_unlabeled,
    networks,
    optimizers,
)
from published.system import System, batches, images

QUEUE = 32


def features_queue():
    return keras.Variable(
        tf.math.l2_normalize(keras.random.normal((QUEUE, WIDTH)), axis=1), trainable=False, name="feature_queue"
    )


class NNCLR(keras.Model):
    """NNCLR: nearest neighbours from a queue of features; plain losses, three metrics of one name, `reset_metrics`."""

    def __init__(self, contrastive_augmenter, classification_augmenter, encoder, projection_head, linear_probe):
        super().__init__()
        self.temperature = 0.1
        self.contrastive_augmenter = contrastive_augmenter
        self.classification_augmenter = classification_augmenter
        self.encoder = encoder
        self.projection_head = projection_head
        self.linear_probe = linear_probe
        self.feature_queue = features_queue()
        self.probe_accuracy = keras.metrics.SparseCategoricalAccuracy()
        self.correlation_accuracy = keras.metrics.SparseCategoricalAccuracy()
        self.contrastive_accuracy = keras.metrics.SparseCategoricalAccuracy()

    def compile(self, contrastive_optimizer, probe_optimizer, **kwargs):
        super().compile(**kwargs)
        self.contrastive_optimizer = contrastive_optimizer
        self.probe_optimizer = probe_optimizer
        self.probe_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def reset_metrics(self):
        for metric in (self.probe_accuracy, self.correlation_accuracy, self.contrastive_accuracy):
            metric.reset_state()

    def nearest_neighbour(self, projections):
        queue = tf.convert_to_tensor(self.feature_queue)
        nearest = tf.gather(queue, tf.argmax(tf.matmul(projections, queue, transpose_b=True), axis=1))
        return projections + tf.stop_gradient(nearest - projections)

    def contrastive_loss(self, first, second):
        first, second = tf.math.l2_normalize(first, axis=1), tf.math.l2_normalize(second, axis=1)
        similarities = [
            tf.matmul(self.nearest_neighbour(first), second, transpose_b=True),
            tf.matmul(second, self.nearest_neighbour(first), transpose_b=True),
            tf.matmul(self.nearest_neighbour(second), first, transpose_b=True),
            tf.matmul(first, self.nearest_neighbour(second), transpose_b=True),
        ]
        count = tf.shape(first)[0]
        targets, logits = tf.tile(tf.range(count), [4]), tf.concat(similarities, axis=0) / self.temperature
        loss = keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
        self.feature_queue.assign(tf.concat([first, self.feature_queue[:-count]], axis=0))
        return loss

    def update_accuracies(self, first, second):
        first, second = tf.math.l2_normalize(first, axis=1), tf.math.l2_normalize(second, axis=1)
        similarities = tf.matmul(first, second, transpose_b=True)
        targets = tf.tile(tf.range(tf.shape(first)[0]), [2])
        logits = tf.concat([similarities, tf.transpose(similarities)], axis=0)
        self.contrastive_accuracy.update_state(targets, logits)
        correlation = tf.matmul(first, second, transpose_a=True)
        targets = tf.tile(tf.range(tf.shape(correlation)[0]), [2])
        logits = tf.concat([correlation, tf.transpose(correlation)], axis=0)
        self.correlation_accuracy.update_state(targets, logits)

    def train_step(self, data):
        (unlabeled_images, _), (labeled_images, labels) = data
        both = tf.concat((unlabeled_images, labeled_images), axis=0)
        first, second = self.contrastive_augmenter(both), self.contrastive_augmenter(both)
        with tf.GradientTape() as tape:
            projections = self.projection_head(self.encoder(first)), self.projection_head(self.encoder(second))
            contrastive_loss = self.contrastive_loss(*projections)
        variables = self.encoder.trainable_weights + self.projection_head.trainable_weights
        gradients = tape.gradient(contrastive_loss, variables)
        self.contrastive_optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self.update_accuracies(*projections)

        preprocessed = self.classification_augmenter(labeled_images)
        with tf.GradientTape() as tape:
            logits = self.linear_probe(self.encoder(preprocessed))
            probe_loss = self.probe_loss(labels, logits)
        gradients = tape.gradient(probe_loss, self.linear_probe.trainable_weights)
        self.probe_optimizer.apply_gradients(zip(gradients, self.linear_probe.trainable_weights, strict=True))
        self.probe_accuracy.update_state(labels, logits)
        return {
            "c_loss": tf.reduce_mean(contrastive_loss),
            "c_acc": self.contrastive_accuracy.result(),
            "r_acc": self.correlation_accuracy.result(),
            "p_loss": probe_loss,
            "p_acc": self.probe_accuracy.result(),
        }

    def test_step(self, data):
        images, labels = data
        features = self.encoder(self.classification_augmenter(images, training=False), training=False)
        logits = self.linear_probe(features, training=False)
        self.probe_accuracy.update_state(labels, logits)
        return {"p_loss": self.probe_loss(labels, logits), "p_acc": self.probe_accuracy.result()}


def nnclr():
    model = NNCLR(*networks())
    model.compile(*optimizers())
    return model


class NNCLRTrainer(looplab.Trainer):
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
        self.feature_queue = features_queue()
        self.probe_accuracy = keras.metrics.SparseCategoricalAccuracy()
        self.correlation_accuracy = keras.metrics.SparseCategoricalAccuracy()
        self.contrastive_accuracy = keras.metrics.SparseCategoricalAccuracy()
        self.contrastive_optimizer, self.probe_optimizer = optimizers()
        self.probe_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    reset_metrics = NNCLR.reset_metrics
    nearest_neighbour = NNCLR.nearest_neighbour
    contrastive_loss = NNCLR.contrastive_loss
    update_accuracies = NNCLR.update_accuracies
    train_step = NNCLR.train_step
    test_step = NNCLR.test_step


def nnclr_trainer(**options):
    return NNCLRTrainer(*networks(), **options)


def pictures():
    return batches(images(SIZE, SIZE, 1))


class MoCo(keras.Model):
    """Momentum contrast: keys from an encoder that averages the weights of the trained one, and from a queue."""

    def __init__(self, augmenter, encoder, projection_head, momentum_coeff=0.99, temperature=0.1):
        super().__init__()
        self.augmenter = augmenter
        self.encoder = encoder
        self.projection_head = projection_head
        self.momentum_coeff = momentum_coeff
        self.temperature = temperature
        self.m_encoder = keras.models.clone_model(encoder)
        self.m_projection_head = keras.models.clone_model(projection_head)
        self.feature_queue = features_queue()

    def compile(self, contrastive_optimizer, **kwargs):
        super().compile(**kwargs)
        self.contrastive_optimizer = contrastive_optimizer
        self.contrastive_accuracy = keras.metrics.SparseCategoricalAccuracy()

    def contrastive_loss(self, queries, keys):
        queries = [tf.math.l2_normalize(query, axis=1) for query in queries]
        keys = [tf.math.l2_normalize(key, axis=1) for key in keys]
        similarities = [
            tf.matmul(query, tf.concat((key, self.feature_queue), axis=0), transpose_b=True) / self.temperature
            for query, key in zip(queries, reversed(keys), strict=True)
        ]
        count = tf.shape(queries[0])[0]
        targets, logits = tf.tile(tf.range(count), [2]), tf.concat(similarities, axis=0)
        self.contrastive_accuracy.update_state(targets, logits)
        self.feature_queue.assign(tf.concat([*keys, self.feature_queue[: QUEUE - 2 * count]], axis=0))
        return keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)

    def train_step(self, images):
        views = self.augmenter(images, training=True), self.augmenter(images, training=True)
        with tf.GradientTape() as tape:
            queries = [self.projection_head(self.encoder(view, training=True)) for view in views]
            keys = [self.m_projection_head(self.m_encoder(view, training=True)) for view in views]
            loss = tf.reduce_mean(self.contrastive_loss(queries, keys))
        variables = self.encoder.trainable_weights + self.projection_head.trainable_weights
        self.contrastive_optimizer.apply(tape.gradient(loss, variables), variables)
        online = self.encoder.weights + self.projection_head.weights
        averaged = self.m_encoder.weights + self.m_projection_head.weights
        for weight, m_weight in zip(online, averaged, strict=True):
            m_weight.assign(self.momentum_coeff * m_weight + (1 - self.momentum_coeff) * weight)
        return {"c_loss": loss, "c_acc": self.contrastive_accuracy.result()}


def moco():
    model = MoCo(augmenter("augmenter"), encoder(), head())
    model.compile(keras.optimizers.Adam())
    return model


class MoCoTrainer(looplab.Trainer):
    def __init__(self, augmenter, encoder, projection_head, momentum_coeff=0.99, temperature=0.1, **options):
        super().__init__(**options)
        self.augmenter = augmenter
        self.encoder = encoder
        self.projection_head = projection_head
        self.momentum_coeff = momentum_coeff
        self.temperature = temperature
        self.m_encoder = keras.models.clone_model(encoder)
        self.m_projection_head = keras.models.clone_model(projection_head)
        self.feature_queue = features_queue()
        self.contrastive_optimizer = keras.optimizers.Adam()
        self.contrastive_accuracy = keras.metrics.SparseCategoricalAccuracy()

    contrastive_loss = MoCo.contrastive_loss
    train_step = MoCo.train_step


def moco_trainer(**options):
    return MoCoTrainer(augmenter("augmenter"), encoder(), head(), **options)


SYSTEMS = [
    System(
        "nnclr",
        "https://keras.io/examples/vision/nnclr/",
        nnclr,
        nnclr_trainer,
        labeled_and_unlabeled,
        validation=labeled,
        means=("c_loss", "p_loss"),
    ),
    System(
        "moco",
        "https://github.com/beresandras/contrastive-classification-keras",
        moco,
        moco_trainer,
        pictures,
        means=("c_loss",),
    ),
]
