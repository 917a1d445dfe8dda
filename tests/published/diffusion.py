"""Diffusion models: a network that predicts noise, and a copy of it that averages its weights."""

import keras
import tensorflow as tf

import looplab
from published.system import Conv2D, System, batches, images

L = keras.layers
SIZE, TIMESTEPS = 8, 20


def pictures():
    return batches(images(SIZE, SIZE, 1))


def denoiser():
    noisy, variances = keras.Input((SIZE, SIZE, 1)), keras.Input((1, 1, 1))
    x = L.Concatenate()([Conv2D(4, 1)(noisy), L.UpSampling2D(SIZE)(variances)])
    x = Conv2D(4, 3, padding="same", activation="swish")(L.BatchNormalization(center=False, scale=False)(x))
    return keras.Model([noisy, variances], Conv2D(1, 1, kernel_initializer="zeros")(x), name="denoiser")


class DDIM(keras.Model):
    """Implicit diffusion of flowers: a normalizer, an EMA network, the compiled loss called by hand, unseeded noise."""

    def __init__(self):
        super().__init__()
        self.normalizer = L.Normalization()
        self.network = denoiser()
        self.ema_network = keras.models.clone_model(self.network)

    def compile(self, **kwargs):
        super().compile(**kwargs)
        self.noise_loss_tracker = keras.metrics.Mean(name="n_loss")
        self.image_loss_tracker = keras.metrics.Mean(name="i_loss")

    @property
    def metrics(self):
        return [self.noise_loss_tracker, self.image_loss_tracker]

    def denoise(self, noisy_images, noise_rates, signal_rates, training):
        network = self.network if training else self.ema_network
        noises = network([noisy_images, noise_rates**2], training=training)
        return noises, (noisy_images - noise_rates * noises) / signal_rates

    def losses_of(self, images, training):
        images = self.normalizer(images, training=training)
        noises = keras.random.normal(tf.shape(images))
        times = keras.random.uniform((tf.shape(images)[0], 1, 1, 1))
        start, end = tf.acos(0.95), tf.acos(0.02)
        angles = start + times * (end - start)
        signal_rates, noise_rates = tf.cos(angles), tf.sin(angles)
        noisy_images = signal_rates * images + noise_rates * noises
        pred_noises, pred_images = self.denoise(noisy_images, noise_rates, signal_rates, training)
        return self.loss(noises, pred_noises), self.loss(images, pred_images)

    def train_step(self, images):
        with tf.GradientTape() as tape:
            noise_loss, image_loss = self.losses_of(images, training=True)
        gradients = tape.gradient(noise_loss, self.network.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.network.trainable_weights, strict=True))
        self.noise_loss_tracker.update_state(noise_loss)
        self.image_loss_tracker.update_state(image_loss)
        for weight, ema_weight in zip(self.network.weights, self.ema_network.weights, strict=True):
            ema_weight.assign(0.999 * ema_weight + 0.001 * weight)
        return {metric.name: metric.result() for metric in self.metrics}

    def test_step(self, images):
        noise_loss, image_loss = self.losses_of(images, training=False)
        self.noise_loss_tracker.update_state(noise_loss)
        self.image_loss_tracker.update_state(image_loss)
        return {metric.name: metric.result() for metric in self.metrics}


def ddim():
    model = DDIM()
    model.normalizer.adapt(pictures())
    optimizer = keras.optimizers.AdamW(learning_rate=1e-3, weight_decay=1e-4)
    model.compile(optimizer=optimizer, loss=keras.losses.mean_absolute_error)
    return model


class DDIMTrainer(looplab.Trainer):
    def __init__(self, **options):
        super().__init__(**options)
        self.normalizer = L.Normalization()
        self.network = denoiser()
        self.ema_network = keras.models.clone_model(self.network)
        self.noise_loss_tracker = keras.metrics.Mean(name="n_loss")
        self.image_loss_tracker = keras.metrics.Mean(name="i_loss")

    metrics = DDIM.metrics
    denoise = DDIM.denoise
    losses_of = DDIM.losses_of
    train_step = DDIM.train_step
    test_step = DDIM.test_step


def ddim_trainer(**options):
    optimizer = keras.optimizers.AdamW(learning_rate=1e-3, weight_decay=1e-4)
    trainer = DDIMTrainer(optimizer=optimizer, loss=keras.losses.mean_absolute_error, **options)
    trainer.normalizer.adapt(pictures())
    return trainer


def timed_denoiser():
    noisy, times = keras.Input((SIZE, SIZE, 1)), keras.Input((), dtype="int32")
    x = Conv2D(4, 3, padding="same")(noisy) + L.Reshape((1, 1, 4))(L.Embedding(TIMESTEPS, 4)(times))
    return keras.Model([noisy, times], Conv2D(1, 3, padding="same")(L.Activation("swish")(x)), name="denoiser")


class DDPM(keras.Model):
    """Denoising diffusion: random integer times, the compiled loss called by hand; it returns the plain loss."""

    def __init__(self, network, ema_network, timesteps, ema=0.999):
        super().__init__()
        self.network = network
        self.ema_network = ema_network
        self.timesteps = timesteps
        self.ema = ema
        self.seed_generator = keras.random.SeedGenerator(1337)

    def q_sample(self, images, times, noise):
        kept = tf.math.cumprod(1 - tf.linspace(1e-4, 0.02, self.timesteps))
        kept = tf.cast(tf.gather(kept, times), images.dtype)[:, None, None, None]
        return tf.sqrt(kept) * images + tf.sqrt(1 - kept) * noise

    def train_step(self, images):
        times = keras.random.randint((tf.shape(images)[0],), 0, self.timesteps, seed=self.seed_generator)
        with tf.GradientTape() as tape:
            noise = keras.random.normal(tf.shape(images), seed=self.seed_generator)
            predicted = self.network([self.q_sample(images, times, noise), times], training=True)
            loss = self.loss(noise, predicted)
        gradients = tape.gradient(loss, self.network.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.network.trainable_weights, strict=True))
        for weight, ema_weight in zip(self.network.weights, self.ema_network.weights, strict=True):
            ema_weight.assign(self.ema * ema_weight + (1 - self.ema) * weight)
        return {"loss": loss}


def timed_networks():
    network, ema_network = timed_denoiser(), timed_denoiser()
    ema_network.set_weights(network.get_weights())
    return network, ema_network


def ddpm():
    model = DDPM(*timed_networks(), TIMESTEPS)
    model.compile(optimizer=keras.optimizers.Adam(2e-4), loss=keras.losses.MeanSquaredError())
    return model


class DDPMTrainer(looplab.Trainer):
    def __init__(self, network, ema_network, timesteps, ema=0.999, **options):
        super().__init__(**options)
        self.network = network
        self.ema_network = ema_network
        self.timesteps = timesteps
        self.ema = ema
        self.seed_generator = keras.random.SeedGenerator(1337)

    q_sample = DDPM.q_sample
    train_step = DDPM.train_step


def ddpm_trainer(**options):
    networks, loss = timed_networks(), keras.losses.MeanSquaredError()
    return DDPMTrainer(*networks, TIMESTEPS, optimizer=keras.optimizers.Adam(2e-4), loss=loss, **options)


PAGE = "https://keras.io/examples/generative/"

SYSTEMS = [
    System("ddim", PAGE + "ddim/", ddim, ddim_trainer, pictures, validation=pictures),
    System("ddpm", PAGE + "ddpm/", ddpm, ddpm_trainer, pictures, means=("loss",)),
]
