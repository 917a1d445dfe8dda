"""Vision systems with losses of their own: low light, volume rendering, and triplets."""

import keras
import tensorflow as tf

import looplab
from published.system import Conv2D, Dense, System, batches, images

L = keras.layers
SIZE, CHANNELS = 8, 3


def pictures():
    return batches(images(SIZE, SIZE, CHANNELS))


class ZeroDCE(keras.Model):
    """Low-light enhancement without references: four losses by name, and an optimizer that `compile` makes itself."""

    def __init__(self, dce_model, **kwargs):
        super().__init__(**kwargs)
        self.dce_model = dce_model

    def compile(self, learning_rate, **kwargs):
        super().compile(**kwargs)
        self.optimizer = keras.optimizers.Adam(learning_rate=learning_rate)
        self.create_trackers()

    def create_trackers(self):
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.illumination_smoothness_loss_tracker = keras.metrics.Mean(name="illumination_smoothness_loss")
        self.spatial_constancy_loss_tracker = keras.metrics.Mean(name="spatial_constancy_loss")
        self.color_constancy_loss_tracker = keras.metrics.Mean(name="color_constancy_loss")
        self.exposure_loss_tracker = keras.metrics.Mean(name="exposure_loss")

    @property
    def metrics(self):
        return [
            self.total_loss_tracker,
            self.illumination_smoothness_loss_tracker,
            self.spatial_constancy_loss_tracker,
            self.color_constancy_loss_tracker,
            self.exposure_loss_tracker,
        ]

    def enhance(self, data, output):
        enhanced = data
        for curve in tf.split(output, output.shape[-1] // CHANNELS, axis=-1):
            enhanced = enhanced + curve * (tf.square(enhanced) - enhanced)
        return enhanced

    def call(self, data):
        return self.enhance(data, self.dce_model(data))

    def compute_losses(self, data, output):
        enhanced = self.enhance(data, output)
        rows, columns = output[:, 1:] - output[:, :-1], output[:, :, 1:] - output[:, :, :-1]
        illumination_loss = 200 * (tf.reduce_mean(rows**2) + tf.reduce_mean(columns**2))
        grey = [tf.nn.avg_pool2d(tf.reduce_mean(x, axis=-1, keepdims=True), 2, 2, "VALID") for x in (data, enhanced)]
        before, after = (x[:, :, 1:] - x[:, :, :-1] for x in grey)
        spatial_loss = tf.reduce_mean((before - after) ** 2)
        red, green, blue = tf.unstack(tf.reduce_mean(enhanced, axis=(1, 2)), axis=-1)
        color_loss = tf.sqrt((red - green) ** 4 + (red - blue) ** 4 + (blue - green) ** 4)
        color_loss = 5 * tf.reduce_mean(color_loss)
        exposure = tf.nn.avg_pool2d(tf.reduce_mean(enhanced, axis=-1, keepdims=True), 4, 4, "VALID")
        exposure_loss = 10 * tf.reduce_mean((exposure - 0.6) ** 2)
        return {
            "total_loss": illumination_loss + spatial_loss + color_loss + exposure_loss,
            "illumination_smoothness_loss": illumination_loss,
            "spatial_constancy_loss": spatial_loss,
            "color_constancy_loss": color_loss,
            "exposure_loss": exposure_loss,
        }

    def results(self, losses):
        for metric in self.metrics:
            metric.update_state(losses[metric.name])
        return {metric.name: metric.result() for metric in self.metrics}

    def train_step(self, data):
        with tf.GradientTape() as tape:
            losses = self.compute_losses(data, self.dce_model(data))
        gradients = tape.gradient(losses["total_loss"], self.dce_model.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.dce_model.trainable_weights, strict=True))
        return self.results(losses)

    def test_step(self, data):
        return self.results(self.compute_losses(data, self.dce_model(data)))


def curves_network():
    layers = [Conv2D(4, 3, padding="same", activation="relu"), Conv2D(6, 3, padding="same", activation="tanh")]
    return keras.Sequential([keras.Input((SIZE, SIZE, CHANNELS)), *layers], name="dce")


def zero_dce():
    model = ZeroDCE(curves_network())
    model.compile(learning_rate=1e-4)
    return model


class ZeroDCETrainer(looplab.Trainer):
    def __init__(self, dce_model, **options):
        super().__init__(**options)
        self.dce_model = dce_model
        self.create_trackers()

    create_trackers = ZeroDCE.create_trackers
    metrics = ZeroDCE.metrics
    enhance = ZeroDCE.enhance
    compute_losses = ZeroDCE.compute_losses
    results = ZeroDCE.results
    train_step = ZeroDCE.train_step
    test_step = ZeroDCE.test_step


def zero_dce_trainer(**options):
    return ZeroDCETrainer(curves_network(), optimizer=keras.optimizers.Adam(learning_rate=1e-4), **options)


RAYS, SAMPLES, FEATURES = 4 * 4, 4, 6


class NeRF(keras.Model):
    """A radiance field: images with (rays, distances) as targets, volume rendering, and PSNR as a tracker."""

    def __init__(self, nerf_model):
        super().__init__()
        self.nerf_model = nerf_model

    def compile(self, optimizer, loss_fn):
        super().compile()
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.psnr_metric = keras.metrics.Mean(name="psnr")

    def render(self, rays_flat, t_vals):
        predictions = tf.reshape(self.nerf_model(rays_flat), (-1, 4, 4, SAMPLES, 4))
        rgb, sigma = tf.sigmoid(predictions[..., :-1]), tf.nn.relu(predictions[..., -1])
        delta = t_vals[..., 1:] - t_vals[..., :-1]
        delta = tf.concat([delta, tf.fill(tf.shape(delta[..., :1]), 1e10)], axis=-1)
        alpha = 1.0 - tf.exp(-sigma * delta[:, None, None, :])
        weights = alpha * tf.math.cumprod(1.0 - alpha + 1e-10, axis=-1, exclusive=True)
        return tf.reduce_sum(weights[..., None] * rgb, axis=-2)

    def results(self, images, rgb, loss):
        self.loss_tracker.update_state(loss)
        self.psnr_metric.update_state(tf.image.psnr(images, rgb, max_val=1.0))
        return {"loss": self.loss_tracker.result(), "psnr": self.psnr_metric.result()}

    def train_step(self, inputs):
        images, (rays_flat, t_vals) = inputs
        with tf.GradientTape() as tape:
            rgb = self.render(rays_flat, t_vals)
            loss = self.loss_fn(images, rgb)
        variables = self.nerf_model.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return self.results(images, rgb, loss)

    def test_step(self, inputs):
        images, (rays_flat, t_vals) = inputs
        rgb = self.render(rays_flat, t_vals)
        return self.results(images, rgb, self.loss_fn(images, rgb))

    @property
    def metrics(self):
        return [self.loss_tracker, self.psnr_metric]


def radiance():
    inputs = keras.Input((RAYS * SAMPLES, FEATURES))
    x = L.Concatenate()([Dense(8, "relu")(inputs), inputs])
    return keras.Model(inputs, Dense(4)(x), name="nerf")


def nerf():
    model = NeRF(radiance())
    model.compile(optimizer=keras.optimizers.Adam(), loss_fn=keras.losses.MeanSquaredError())
    return model


class NeRFTrainer(looplab.Trainer):
    def __init__(self, nerf_model, **options):
        super().__init__(**options)
        self.nerf_model = nerf_model
        self.loss_fn = keras.losses.MeanSquaredError()
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.psnr_metric = keras.metrics.Mean(name="psnr")

    metrics = NeRF.metrics
    render = NeRF.render
    results = NeRF.results
    train_step = NeRF.train_step
    test_step = NeRF.test_step


def nerf_trainer(**options):
    return NeRFTrainer(radiance(), optimizer=keras.optimizers.Adam(), **options)


def views():
    distances = tf.cumsum(images(SAMPLES, seed=2), axis=-1)
    return batches((images(4, 4, CHANNELS), (images(RAYS * SAMPLES, FEATURES, seed=1), distances)))


def siamese_network():
    inputs = [keras.Input((SIZE, SIZE, CHANNELS), name=name) for name in ("anchor", "positive", "negative")]
    layers = [Conv2D(4, 3, strides=2, activation="relu"), L.BatchNormalization(), L.Flatten(), Dense(4)]
    embedding = keras.Sequential([keras.Input((SIZE, SIZE, CHANNELS)), *layers], name="embedding")
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
    return batches(tuple(images(SIZE, SIZE, CHANNELS, seed=seed) for seed in range(3)))


SYSTEMS = [
    System(
        "zero_dce",
        "https://keras.io/examples/vision/zero_dce/",
        zero_dce,
        zero_dce_trainer,
        pictures,
        validation=pictures,
    ),
    System("nerf", "https://keras.io/examples/vision/nerf/", nerf, nerf_trainer, views, validation=views),
    System(
        "siamese",
        "https://keras.io/examples/vision/siamese_network/",
        siamese,
        siamese_trainer,
        triplets,
        validation=triplets,
    ),
]
