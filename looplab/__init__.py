"""looplab: write `train_step`, and the rest is done.

    import keras, looplab

    trainer = looplab.Trainer(model, optimizer="adam", loss="mse", metrics=["mae"], log_dir="logs/first")
    history = trainer.fit(x, y, validation_data=(x_test, y_test), epochs=10)

A step of your own is one method, of your own models and optimizers, and returns this batch's scalars:

    class Mine(looplab.Trainer):
        def train_step(self, batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            self.minimize(tape, loss)
            return {"loss": loss}
"""

import pkgutil

# In a checkout the recipes lie beside this package, in an installed package within it. From the checkout's root this
# folder hides an installed one: so look for `looplab.recipes` in that one too.
__path__ = pkgutil.extend_path(__path__, __name__)

from looplab import _quiet  # noqa: F401, I001  (must come before TensorFlow is imported)
from looplab import callbacks, testing
from looplab.checkpoint import Checkpoint
from looplab.command import main
from looplab.datasets import Data
from looplab.recipe import Recipe
from looplab.running import run
from looplab.trainer import Trainer

__all__ = ["Checkpoint", "Data", "Recipe", "Trainer", "callbacks", "main", "run", "testing"]
__version__ = "0.1.0"
