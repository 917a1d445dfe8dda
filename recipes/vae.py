"""A variational auto-encoder on MNIST, as published: its epoch 2 has a mean loss of 0.0677 there, 0.0676 here.

python -m looplab.recipes.vae --epochs 2                      10 s on two cores
python -m looplab.recipes.vae --epochs 10 --kl-weight 0.01    40 s; draws digits
"""

import keras
import numpy as np
from keras import layers, ops

import looplab


class Sampling(layers.Layer):
    """Draws z from the normal distribution of the given mean and log-variance, each of shape (batch, latent)."""

    def __init__(self, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, mean, log_variance):
        noise = keras.random.normal(ops.shape(mean), dtype=mean.dtype, seed=self.seed_generator)
        return mean + ops.exp(0.5 * log_variance) * noise


class KLDivergence(layers.Layer):
    """Adds to the loss `weight` times how far a normal distribution is from the standard one; passes nothing on."""

    def __init__(self, weight=1.0, **kwargs):
        super().__init__(**kwargs)
        self.weight = weight

    def call(self, mean, log_variance):
        self.add_loss(-0.5 * self.weight * ops.mean(log_variance - ops.square(mean) - ops.exp(log_variance) + 1))


class VAE(keras.Model):
    """Encodes images as (batch, pixels) in [0, 1] to a latent normal distribution, and decodes a draw of it."""

    def __init__(self, pixels: int = 784, hidden: int = 64, latent_dim: int = 32, kl_weight: float = 1.0, **kwargs):
        super().__init__(name="vae", **kwargs)
        self.encoder = layers.Dense(hidden, "relu", name="encoder")
        self.mean = layers.Dense(latent_dim, name="mean")
        self.log_variance = layers.Dense(latent_dim, name="log_variance")
        self.sampling = Sampling(name="sampling")
        self.kl = KLDivergence(kl_weight, name="kl")
        self.decoder = keras.Sequential(
            [layers.Input((latent_dim,)), layers.Dense(hidden, "relu"), layers.Dense(pixels, "sigmoid")], name="decoder"
        )

    def call(self, images):
        encoded = self.encoder(images)
        mean, log_variance = self.mean(encoded), self.log_variance(encoded)
        self.kl(mean, log_variance)
        return self.decoder(self.sampling(mean, log_variance))


def vae(
    data: looplab.Data = looplab.Data("mnist"),
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
        hidden: units of the layer between pixels and latent space, on both sides
        latent_dim: dimensions of the latent space
        kl_weight: of the KL divergence; at 1, as published, it leaves the latent space unused, and each image comes
            back as the mean of all; 0.01 draws digits
        learning_rate: of Adam
        epochs: passes over the training images
        batch_size: images in a step
    """
    arrays = data.load((28, 28))
    train, test = (x.reshape(len(x), -1) / np.float32(255) for x in (arrays.x_train, arrays.x_test))
    model = VAE(train.shape[1], hidden, latent_dim, kl_weight)
    trainer = looplab.Trainer(model, optimizer=keras.optimizers.Adam(learning_rate), loss="mse", **trainer_options)

    latent = np.random.default_rng(0).normal(size=(100, latent_dim)).astype("float32")

    def draw():
        originals = test[:10]
        pairs = np.concatenate([originals, trainer.predict(originals)])
        drawn = model.decoder(latent).numpy()
        return {name: picture(pixels) for name, pixels in {"reconstructions": pairs, "prior": drawn}.items()}

    def picture(pixels):
        return looplab.callbacks.tile(np.uint8(pixels * 255).reshape(-1, 28, 28, 1), columns=10)

    pictures = looplab.callbacks.Pictures(draw)
    return looplab.Recipe(trainer, (train, train), (test, test), epochs, batch_size, [pictures], arrays)


if __name__ == "__main__":
    looplab.main(vae)
