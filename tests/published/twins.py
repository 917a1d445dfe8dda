"""Networks that learn from pairs or triplets of images: a momentum encoder with a queue, and a siamese network."""

import keras
import tensorflow as tf

import looplab
from published.contrastive import QUEUE, SIZE, augmenter, encoder, features_queue, head
from published.system import System, batches, images


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
    model = MoCo(augmenter(0.3, "augmenter"), encoder(), head())
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
    return MoCoTrainer(augmenter(0.3, "augmenter"), encoder(), head(), **options)


def siamese_network():
    inputs = [keras.Input((SIZE, SIZE, 1), name=name) for name in ("anchor", "positive", "negative")]
    embedding = encoder("embedding")
    anchor, positive, negative = (embedding(image) for image in inputs)
    distances = [keras.ops.sum((anchor - other) ** 2, axis=-1) for other in (positive, negative)]
    return keras.Model(inputs, distances, name="siamese_network")


class Siamese(keras.Model):
    """The siamese network: a batch is three images, `call` returns two distances, the margin loss is a helper."""

    def __init__(self, siamese_network, margin=0.5):
        super().__init__()
        self.siamese_network = siamese_network
        self.margin = margin
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def call(self, inputs):
        return self.siamese_network(inputs)

    def _compute_loss(self, data):
        positive_distance, negative_distance = self.siamese_network(data)
        return tf.maximum(positive_distance - negative_distance + self.margin, 0.0)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self._compute_loss(data)
        gradients = tape.gradient(loss, self.siamese_network.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.siamese_network.trainable_weights, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}

    def test_step(self, data):
        self.loss_tracker.update_state(self._compute_loss(data))
        return {"loss": self.loss_tracker.result()}

    @property
    def metrics(self):
        return [self.loss_tracker]


def siamese():
    model = Siamese(siamese_network())
    model.compile(optimizer=keras.optimizers.Adam(1e-4))
    return model


class SiameseTrainer(looplab.Trainer):
    def __init__(self, siamese_network, margin=0.5, **options):
        super().__init__(**options)
        self.siamese_network = siamese_network
        self.margin = margin
        self.loss_tracker = keras.metrics.Mean(name="loss")

    metrics = Siamese.metrics
    _compute_loss = Siamese._compute_loss
    train_step = Siamese.train_step
    test_step = Siamese.test_step


def siamese_trainer(**options):
    return SiameseTrainer(siamese_network(), optimizer=keras.optimizers.Adam(1e-4), **options)


def triplets():
    return batches(tuple(images(SIZE, SIZE, 1, seed=seed) for seed in range(3)))


SYSTEMS = [
    System(
        "moco",
        "https://github.com/beresandras/contrastive-classification-keras",
        moco,
        moco_trainer,
        pictures,
        means=("c_loss",),
    ),
    System(
        "siamese",
        "https://keras.io/examples/vision/siamese_network/",
        siamese,
        siamese_trainer,
        triplets,
        validation=triplets,
    ),
]
