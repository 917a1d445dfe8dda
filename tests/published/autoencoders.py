"""Models that reconstruct their input, or give it a probability."""

import keras
import numpy as np
import tensorflow as tf

import looplab
from published.system import Conv2D, Conv2DTranspose, Dense, System, batches, images, normal

L = keras.layers
SIZE, LATENT = 8, 2


def pictures():
    return batches(images(SIZE, SIZE, 1))


class Sampling(L.Layer):
    """Draws z from the mean and the log variance."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        mean, log_var = inputs
        return mean + tf.exp(0.5 * log_var) * keras.random.normal(tf.shape(mean), seed=self.seed_generator)


def encoder():
    inputs = keras.Input((SIZE, SIZE, 1))
    x = Conv2D(4, 3, activation="relu", strides=2, padding="same")(inputs)
    x = Dense(4, "relu")(L.Flatten()(x))
    mean, log_var = Dense(LATENT, name="z_mean")(x), Dense(LATENT, name="z_log_var")(x)
    return keras.Model(inputs, [mean, log_var, Sampling()([mean, log_var])], name="encoder")


def decoder():
    inputs = keras.Input((LATENT,))
    x = L.Reshape((4, 4, 2))(Dense(4 * 4 * 2, "relu")(inputs))
    outputs = Conv2DTranspose(1, 3, activation="sigmoid", strides=2, padding="same")(x)
    return keras.Model(inputs, outputs, name="decoder")


class VAE(keras.Model):
    """The convolutional variational auto-encoder: batches of x alone, and three trackers."""

    def __init__(self, encoder, decoder, **kwargs):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.decoder = decoder
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.reconstruction_loss_tracker = keras.metrics.Mean(name="reconstruction_loss")
        self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")

    @property
    def metrics(self):
        return [self.total_loss_tracker, self.reconstruction_loss_tracker, self.kl_loss_tracker]

    def train_step(self, data):
        with tf.GradientTape() as tape:
            mean, log_var, z = self.encoder(data)
            pixels = keras.losses.binary_crossentropy(data, self.decoder(z))
            reconstruction_loss = tf.reduce_mean(tf.reduce_sum(pixels, axis=(1, 2)))
            kl_loss = -0.5 * (1 + log_var - tf.square(mean) - tf.exp(log_var))
            kl_loss = tf.reduce_mean(tf.reduce_sum(kl_loss, axis=1))
            total_loss = reconstruction_loss + kl_loss
        gradients = tape.gradient(total_loss, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self.total_loss_tracker.update_state(total_loss)
        self.reconstruction_loss_tracker.update_state(reconstruction_loss)
        self.kl_loss_tracker.update_state(kl_loss)
        return {
            "loss": self.total_loss_tracker.result(),
            "reconstruction_loss": self.reconstruction_loss_tracker.result(),
            "kl_loss": self.kl_loss_tracker.result(),
        }


def vae():
    model = VAE(encoder(), decoder())
    model.compile(optimizer=keras.optimizers.Adam())
    return model


class VAETrainer(looplab.Trainer):
    def __init__(self, encoder, decoder, **options):
        super().__init__(**options)
        self.encoder = encoder
        self.decoder = decoder
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.reconstruction_loss_tracker = keras.metrics.Mean(name="reconstruction_loss")
        self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")

    metrics = VAE.metrics
    train_step = VAE.train_step


def vae_trainer(**options):
    return VAETrainer(encoder(), decoder(), optimizer=keras.optimizers.Adam(), **options)


class VectorQuantizer(L.Layer):
    """Replaces each vector by the nearest of a codebook; adds its losses with `add_loss`."""

    def __init__(self, num_embeddings, embedding_dim, beta=0.25, **kwargs):
        super().__init__(**kwargs)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.beta = beta
        self.codebook = self.add_weight(shape=(embedding_dim, num_embeddings), initializer="uniform", name="codebook")

    def call(self, x):
        codebook = tf.convert_to_tensor(self.codebook)
        flat = tf.reshape(x, [-1, self.embedding_dim])
        distances = (
            tf.reduce_sum(flat**2, axis=1, keepdims=True)
            + tf.reduce_sum(codebook**2, axis=0)
            - 2 * tf.matmul(flat, codebook)
        )
        codes = tf.one_hot(tf.argmin(distances, axis=1), self.num_embeddings)
        quantized = tf.reshape(tf.matmul(codes, codebook, transpose_b=True), tf.shape(x))
        commitment = tf.reduce_mean((tf.stop_gradient(quantized) - x) ** 2)
        self.add_loss(self.beta * commitment + tf.reduce_mean((quantized - tf.stop_gradient(x)) ** 2))
        return x + tf.stop_gradient(quantized - x)


def quantizing_autoencoder():
    inputs = keras.Input((SIZE, SIZE, 1))
    x = Conv2D(4, 3, activation="relu", strides=2, padding="same")(inputs)
    x = Conv2D(LATENT, 1, padding="same")(x)
    x = VectorQuantizer(6, LATENT, name="vector_quantizer")(x)
    x = Conv2DTranspose(4, 3, activation="relu", strides=2, padding="same")(x)
    return keras.Model(inputs, Conv2DTranspose(1, 3, padding="same")(x), name="vq_vae")


class VQVAE(keras.Model):
    """The vector-quantized auto-encoder: the loss adds up `losses` of the network that was called."""

    def __init__(self, train_variance, vqvae, **kwargs):
        super().__init__(**kwargs)
        self.train_variance = train_variance
        self.vqvae = vqvae
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.reconstruction_loss_tracker = keras.metrics.Mean(name="reconstruction_loss")
        self.vq_loss_tracker = keras.metrics.Mean(name="vq_loss")

    @property
    def metrics(self):
        return [self.total_loss_tracker, self.reconstruction_loss_tracker, self.vq_loss_tracker]

    def train_step(self, x):
        with tf.GradientTape() as tape:
            reconstructions = self.vqvae(x)
            reconstruction_loss = tf.reduce_mean((x - reconstructions) ** 2) / self.train_variance
            total_loss = reconstruction_loss + sum(self.vqvae.losses)
        gradients = tape.gradient(total_loss, self.vqvae.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.vqvae.trainable_variables, strict=True))
        self.total_loss_tracker.update_state(total_loss)
        self.reconstruction_loss_tracker.update_state(reconstruction_loss)
        self.vq_loss_tracker.update_state(sum(self.vqvae.losses))
        return {
            "loss": self.total_loss_tracker.result(),
            "reconstruction_loss": self.reconstruction_loss_tracker.result(),
            "vqvae_loss": self.vq_loss_tracker.result(),
        }


def vq_vae():
    model = VQVAE(0.1, quantizing_autoencoder())
    model.compile(optimizer=keras.optimizers.Adam())
    return model


class VQVAETrainer(looplab.Trainer):
    def __init__(self, train_variance, vqvae, **options):
        super().__init__(**options)
        self.train_variance = train_variance
        self.vqvae = vqvae
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.reconstruction_loss_tracker = keras.metrics.Mean(name="reconstruction_loss")
        self.vq_loss_tracker = keras.metrics.Mean(name="vq_loss")

    metrics = VQVAE.metrics
    train_step = VQVAE.train_step


def vq_vae_trainer(**options):
    return VQVAETrainer(0.1, quantizing_autoencoder(), optimizer=keras.optimizers.Adam(), **options)


def coupling(index):
    """The translation and the log scale of one coupling layer."""
    inputs = keras.Input((2,))
    outputs = []
    for activation in ("linear", "tanh"):
        x = Dense(8, "relu", kernel_regularizer=keras.regularizers.L2(0.01))(inputs)
        outputs.append(Dense(2, activation, kernel_regularizer=keras.regularizers.L2(0.01))(x))
    return keras.Model(inputs, outputs, name=f"coupling_{index}")


class RealNVP(keras.Model):
    """The normalizing flow of two moons: `call` returns two outputs, and has `training=True` as its default."""

    def __init__(self, num_coupling_layers):
        super().__init__()
        self.num_coupling_layers = num_coupling_layers
        self.masks = np.array([[0, 1], [1, 0]] * (num_coupling_layers // 2), dtype="float32")
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.layers_list = [coupling(index) for index in range(num_coupling_layers)]

    @property
    def metrics(self):
        return [self.loss_tracker]

    def call(self, x, training=True):
        log_det_inv = 0.0
        direction = -1 if training else 1
        for index in range(self.num_coupling_layers)[::direction]:
            kept = x * self.masks[index]
            reversed_mask = 1 - self.masks[index]
            translation, scale = self.layers_list[index](kept)
            translation, scale = translation * reversed_mask, scale * reversed_mask
            gate = (direction - 1) / 2
            moved = x * tf.exp(direction * scale) + direction * translation * tf.exp(gate * scale)
            x = reversed_mask * moved + kept
            log_det_inv += gate * tf.reduce_sum(scale, axis=1)
        return x, log_det_inv

    def log_loss(self, x):
        y, log_det = self(x)
        log_prob = -0.5 * tf.reduce_sum(y**2, axis=1) - np.log(2 * np.pi)
        return -tf.reduce_mean(log_prob + log_det)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = self.log_loss(data)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.loss_tracker.update_state(loss)
        return {"loss": self.loss_tracker.result()}

    def test_step(self, data):
        self.loss_tracker.update_state(self.log_loss(data))
        return {"loss": self.loss_tracker.result()}


def real_nvp():
    model = RealNVP(2)
    model.compile(optimizer=keras.optimizers.Adam(1e-4))
    return model


class RealNVPTrainer(looplab.Trainer):
    def __init__(self, num_coupling_layers, **options):
        super().__init__(**options)
        self.num_coupling_layers = num_coupling_layers
        self.masks = np.array([[0, 1], [1, 0]] * (num_coupling_layers // 2), dtype="float32")
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.layers_list = [coupling(index) for index in range(num_coupling_layers)]

    metrics = RealNVP.metrics
    call = RealNVP.call
    log_loss = RealNVP.log_loss
    train_step = RealNVP.train_step
    test_step = RealNVP.test_step


def real_nvp_trainer(**options):
    return RealNVPTrainer(2, optimizer=keras.optimizers.Adam(1e-4), **options)


def moons():
    return batches(normal(2))


PAGE = "https://keras.io/examples/generative/"

SYSTEMS = [
    System("vae", PAGE + "vae/", vae, vae_trainer, pictures),
    System("vq_vae", PAGE + "vq_vae/", vq_vae, vq_vae_trainer, pictures),
    System("real_nvp", PAGE + "real_nvp/", real_nvp, real_nvp_trainer, moons, validation=moons),
]
