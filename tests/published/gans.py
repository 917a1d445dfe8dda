"""Generative adversarial networks whose step trains a discriminator and a generator, each by its own optimizer."""

import keras
import numpy as np
import tensorflow as tf

import looplab
from published.system import Conv2D, Conv2DTranspose, Dense, System, batches, images, labels

L = keras.layers
LATENT, CLASSES, SIZE = 4, 3, 8


def discriminator(channels=1):
    return keras.Sequential(
        [
            keras.Input((SIZE, SIZE, channels)),
            Conv2D(4, 4, strides=2, padding="same"),
            L.LeakyReLU(negative_slope=0.2),
            L.Flatten(),
            L.Dropout(0.2),
            Dense(1),
        ],
        name="discriminator",
    )


def generator(inputs=LATENT):
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            Dense(4 * 4 * 2),
            L.Reshape((4, 4, 2)),
            L.LeakyReLU(negative_slope=0.2),
            Conv2DTranspose(1, 4, strides=2, padding="same", activation="sigmoid"),
        ],
        name="generator",
    )


def pictures():
    return batches(images(SIZE, SIZE, 1))


class DCGAN(keras.Model):
    """The deep convolutional GAN of faces: noisy labels, 1 for generated images, and trackers made by `compile`."""

    def __init__(self, discriminator, generator, latent_dim):
        super().__init__()
        self.discriminator = discriminator
        self.generator = generator
        self.latent_dim = latent_dim
        self.seed_generator = keras.random.SeedGenerator(1337)

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer = d_optimizer
        self.g_optimizer = g_optimizer
        self.loss_fn = loss_fn
        self.d_loss_metric = keras.metrics.Mean(name="d_loss")
        self.g_loss_metric = keras.metrics.Mean(name="g_loss")

    @property
    def metrics(self):
        return [self.d_loss_metric, self.g_loss_metric]

    def noise(self, count):
        return keras.random.normal((count, self.latent_dim), seed=self.seed_generator)

    def train_step(self, real):
        count = tf.shape(real)[0]
        both = tf.concat([self.generator(self.noise(count)), real], axis=0)
        targets = tf.concat([tf.ones((count, 1)), tf.zeros((count, 1))], axis=0)
        targets += 0.05 * keras.random.uniform((2 * count, 1), seed=self.seed_generator)

        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(targets, self.discriminator(both))
        gradients = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply_gradients(zip(gradients, self.discriminator.trainable_weights, strict=True))

        noise = self.noise(count)
        with tf.GradientTape() as tape:
            g_loss = self.loss_fn(tf.zeros((count, 1)), self.discriminator(self.generator(noise)))
        gradients = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply_gradients(zip(gradients, self.generator.trainable_weights, strict=True))

        self.d_loss_metric.update_state(d_loss)
        self.g_loss_metric.update_state(g_loss)
        return {"d_loss": self.d_loss_metric.result(), "g_loss": self.g_loss_metric.result()}


def dcgan():
    model = DCGAN(discriminator(), generator(), LATENT)
    loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-4), keras.optimizers.Adam(1e-4), loss_fn)
    return model


class DCGANTrainer(looplab.Trainer):
    def __init__(self, discriminator, generator, latent_dim, **options):
        super().__init__(**options)
        self.discriminator = discriminator
        self.generator = generator
        self.latent_dim = latent_dim
        self.seed_generator = keras.random.SeedGenerator(1337)
        self.d_optimizer = keras.optimizers.Adam(1e-4)
        self.g_optimizer = keras.optimizers.Adam(1e-4)
        self.loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)
        self.d_loss_metric = keras.metrics.Mean(name="d_loss")
        self.g_loss_metric = keras.metrics.Mean(name="g_loss")

    metrics = DCGAN.metrics
    noise = DCGAN.noise
    train_step = DCGAN.train_step


def dcgan_trainer(**options):
    return DCGANTrainer(discriminator(), generator(), LATENT, **options)


class ConditionalGAN(DCGAN):
    """The GAN of digits that gets the class: as channels of the images, and with the noise."""

    def train_step(self, data):
        real, classes = data
        count = tf.shape(real)[0]
        planes = tf.tile(classes[:, None, None, :], (1, SIZE, SIZE, 1))

        fake = self.generator(tf.concat([self.noise(count), classes], axis=1))
        both = tf.concat([tf.concat([fake, planes], axis=-1), tf.concat([real, planes], axis=-1)], axis=0)
        targets = tf.concat([tf.ones((count, 1)), tf.zeros((count, 1))], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(targets, self.discriminator(both))
        gradients = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply_gradients(zip(gradients, self.discriminator.trainable_weights, strict=True))

        noise = tf.concat([self.noise(count), classes], axis=1)
        with tf.GradientTape() as tape:
            fake = tf.concat([self.generator(noise), planes], axis=-1)
            g_loss = self.loss_fn(tf.zeros((count, 1)), self.discriminator(fake))
        gradients = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply_gradients(zip(gradients, self.generator.trainable_weights, strict=True))

        self.d_loss_metric.update_state(d_loss)
        self.g_loss_metric.update_state(g_loss)
        return {metric.name: metric.result() for metric in self.metrics}


def conditional_gan():
    model = ConditionalGAN(discriminator(1 + CLASSES), generator(LATENT + CLASSES), LATENT)
    loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-4), keras.optimizers.Adam(3e-4), loss_fn)
    return model


class ConditionalGANTrainer(DCGANTrainer):
    def __init__(self, discriminator, generator, latent_dim, **options):
        super().__init__(discriminator, generator, latent_dim, **options)
        self.d_optimizer = keras.optimizers.Adam(3e-4)
        self.g_optimizer = keras.optimizers.Adam(3e-4)

    train_step = ConditionalGAN.train_step


def conditional_gan_trainer(**options):
    return ConditionalGANTrainer(discriminator(1 + CLASSES), generator(LATENT + CLASSES), LATENT, **options)


def labeled_pictures():
    return batches((images(SIZE, SIZE, 1), np.eye(CLASSES, dtype="float32")[labels(CLASSES)]))


class WGANGP(keras.Model):
    """The Wasserstein GAN with a gradient penalty: several updates of the critic in a step; it returns plain losses."""

    def __init__(self, discriminator, generator, latent_dim, discriminator_extra_steps=3, gp_weight=10.0):
        super().__init__()
        self.discriminator = discriminator
        self.generator = generator
        self.latent_dim = latent_dim
        self.d_steps = discriminator_extra_steps
        self.gp_weight = gp_weight
        self.seed_generator = keras.random.SeedGenerator(1337)

    def compile(self, d_optimizer, g_optimizer, d_loss_fn, g_loss_fn):
        super().compile()
        self.d_optimizer = d_optimizer
        self.g_optimizer = g_optimizer
        self.d_loss_fn = d_loss_fn
        self.g_loss_fn = g_loss_fn

    def noise(self, count):
        return keras.random.normal((count, self.latent_dim), seed=self.seed_generator)

    def gradient_penalty(self, real, fake):
        share = keras.random.uniform((tf.shape(real)[0], 1, 1, 1), seed=self.seed_generator)
        mixed = real + share * (fake - real)
        with tf.GradientTape() as tape:
            tape.watch(mixed)
            predictions = self.discriminator(mixed, training=True)
        gradients = tape.gradient(predictions, mixed)
        norm = tf.sqrt(tf.reduce_sum(tf.square(gradients), axis=[1, 2, 3]))
        return tf.reduce_mean((norm - 1.0) ** 2)

    def train_step(self, real):
        count = tf.shape(real)[0]
        for _ in range(self.d_steps):
            noise = self.noise(count)
            with tf.GradientTape() as tape:
                fake = self.generator(noise, training=True)
                fake_logits = self.discriminator(fake, training=True)
                real_logits = self.discriminator(real, training=True)
                cost = self.d_loss_fn(real_logits, fake_logits)
                d_loss = cost + self.gp_weight * self.gradient_penalty(real, fake)
            gradients = tape.gradient(d_loss, self.discriminator.trainable_variables)
            self.d_optimizer.apply_gradients(zip(gradients, self.discriminator.trainable_variables, strict=True))

        noise = self.noise(count)
        with tf.GradientTape() as tape:
            g_loss = self.g_loss_fn(self.discriminator(self.generator(noise, training=True), training=True))
        gradients = tape.gradient(g_loss, self.generator.trainable_variables)
        self.g_optimizer.apply_gradients(zip(gradients, self.generator.trainable_variables, strict=True))
        return {"d_loss": d_loss, "g_loss": g_loss}


def critic_loss(real_logits, fake_logits):
    return tf.reduce_mean(fake_logits) - tf.reduce_mean(real_logits)


def generator_loss(fake_logits):
    return -tf.reduce_mean(fake_logits)


def slow_adam():
    return keras.optimizers.Adam(2e-4, beta_1=0.5, beta_2=0.9)


def wgan_gp():
    model = WGANGP(discriminator(), generator(), LATENT)
    model.compile(slow_adam(), slow_adam(), critic_loss, generator_loss)
    return model


class WGANGPTrainer(looplab.Trainer):
    def __init__(self, discriminator, generator, latent_dim, d_steps=3, gp_weight=10.0, **options):
        super().__init__(**options)
        self.discriminator = discriminator
        self.generator = generator
        self.latent_dim = latent_dim
        self.d_steps = d_steps
        self.gp_weight = gp_weight
        self.seed_generator = keras.random.SeedGenerator(1337)
        self.d_optimizer = slow_adam()
        self.g_optimizer = slow_adam()
        self.d_loss_fn = critic_loss
        self.g_loss_fn = generator_loss

    noise = WGANGP.noise
    gradient_penalty = WGANGP.gradient_penalty
    train_step = WGANGP.train_step


def wgan_gp_trainer(**options):
    return WGANGPTrainer(discriminator(), generator(), LATENT, **options)


PAGE = "https://keras.io/examples/generative/"

SYSTEMS = [
    System("dcgan", PAGE + "dcgan_overriding_train_step/", dcgan, dcgan_trainer, pictures),
    System("conditional_gan", PAGE + "conditional_gan/", conditional_gan, conditional_gan_trainer, labeled_pictures),
    System("wgan_gp", PAGE + "wgan_gp/", wgan_gp, wgan_gp_trainer, pictures, means=("d_loss", "g_loss")),
]
