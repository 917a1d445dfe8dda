"""A variational auto-encoder on MNIST, as a subclassed or a functional model.

python -m looplab.recipes.vae --epochs 2                      10 s on two cores; loss 0.0676 (published: 0.0677)
python -m looplab.recipes.vae --epochs 10 --kl-weight 0.01    40 s; generates digits
"""

from typing import Literal

import keras
import numpy as np
from keras import layers, ops

import looplab


@keras.saving.register_keras_serializable("looplab")
class Sampling(layers.Layer):
    """Samples from the normal distribution of the given mean and log-variance, each of shape (batch, latent)."""

    def __init__(self, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, mean, log_variance):
        noise = keras.random.normal(ops.shape(mean), dtype=mean.dtype, seed=self.seed_generator)
        return mean + ops.exp(0.5 * log_variance) * noise


@keras.saving.register_keras_serializable("looplab")
class KLDivergence(layers.Layer):
    """Adds `weight` times the divergence from the standard normal distribution to the loss; returns its inputs."""

    def __init__(self, weight=1.0, **kwargs):
        super().__init__(**kwargs)
        self.weight = weight

    def call(self, mean, log_variance):
        self.add_loss(-0.5 * self.weight * ops.mean(log_variance - ops.square(mean) - ops.exp(log_variance) + 1))
        return mean, log_variance


def encoder(pixels, hidden, latent_dim, **options):
    """From images (batch, pixels) in [0, 1] to the mean and the log-variance of a normal distribution."""
    images = layers.Input((pixels,))
    x = layers.Dense(hidden, "relu", **options, name="hidden")(images)
    moments = [layers.Dense(latent_dim, **options, name=name)(x) for name in ("mean", "log_variance")]
    return keras.Model(images, moments, name="encoder")


def decoder(pixels, hidden, latent_dim, **options):
    """From a sample (batch, latent_dim) to images (batch, pixels) in [0, 1]."""
    inner = [layers.Input((latent_dim,)), layers.Dense(hidden, "relu", **options, name="hidden")]
    return keras.Sequential([*inner, layers.Dense(pixels, "sigmoid", dtype="float32", name="pixels")], name="decoder")


@keras.saving.register_keras_serializable("looplab")
class VAE(keras.Model):
    """Encodes images as a normal distribution, and decodes a sample of it."""

    def __init__(self, pixels=784, hidden=64, latent_dim=32, kl_weight=1.0, name="vae", **kwargs):
        super().__init__(name=name, **kwargs)
        self.encoder = encoder(pixels, hidden, latent_dim, dtype=self.dtype_policy)
        self.kl = KLDivergence(kl_weight, dtype=self.dtype_policy, name="kl")
        self.sampling = Sampling(dtype=self.dtype_policy, name="sampling")
        self.decoder = decoder(pixels, hidden, latent_dim, dtype=self.dtype_policy)

    def call(self, images):
        return self.decoder(self.sampling(*self.kl(*self.encoder(images))))


def functional_vae(pixels=784, hidden=64, latent_dim=32, kl_weight=1.0):
    """The same model, as a functional one."""
    images = layers.Input((pixels,))
    moments = KLDivergence(kl_weight, name="kl")(*encoder(pixels, hidden, latent_dim)(images))
    return keras.Model(images, decoder(pixels, hidden, latent_dim)(Sampling(name="sampling")(*moments)), name="vae")


def vae(
    data: looplab.Data = looplab.Data("mnist"),
    api: Literal["subclass", "functional"] = "subclass",
    hidden: int = 64,
    latent_dim: int = 32,
    kl_weight: float = 1.0,
    learning_rate: float = 1e-3,
    epochs: int = 10,
    batch_size: int = 64,
    **trainer_options,
) -> looplab.Recipe:
    """A variational auto-encoder of handwritten digits: mean squared error, and the KL divergence as an added loss.

    Args:
        api: how the model is written
        hidden: units of the hidden layer of the encoder, and of the decoder
        latent_dim: dimensions of the latent space
        kl_weight: weight of the KL divergence; 1, as published, leaves the latent space unused; 0.01 generates digits
        learning_rate: learning rate of Adam
        epochs: passes over the training images
        batch_size: images per step
    """
    arrays = data.load((28, 28))
    images = arrays.x_train, arrays.x_validation, arrays.x_test
    train, validation, test = (x.reshape(len(x), -1) / np.float32(255) for x in images)
    model = (VAE if api == "subclass" else functional_vae)(train.shape[1], hidden, latent_dim, kl_weight)
    trainer = looplab.Trainer(model, optimizer=keras.optimizers.Adam(learning_rate), loss="mse", **trainer_options)
    latent = np.random.default_rng(0).normal(size=(100, latent_dim)).astype("float32")

    def draw():
        pairs = np.concatenate([test[:10], trainer.predict(test[:10], verbose=0)])
        rows = {"reconstructions": pairs, "prior": model.get_layer("decoder")(latent).numpy()}
        return {name: looplab.callbacks.tile(np.uint8(x * 255).reshape(-1, 28, 28, 1), 10) for name, x in rows.items()}

    def embed(logs):
        trainer.log_embeddings("latent", model.get_layer("encoder")(test)[0], arrays.y_test, arrays.x_test)

    callbacks = [looplab.callbacks.Pictures(draw), keras.callbacks.LambdaCallback(on_train_end=embed)]
    return looplab.Recipe(trainer, (train, train), (validation, validation), epochs, batch_size, callbacks, arrays)


if __name__ == "__main__":
    looplab.main(vae)
