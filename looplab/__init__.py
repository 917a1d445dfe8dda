"""looplab, a custom training loop for TensorFlow and Keras: you write `train_step`, looplab does the rest.

A trainer has the methods and arguments that a Keras model has:

    >>> import keras, numpy as np, tensorflow as tf, looplab
    >>> x = np.arange(8, dtype="float32")[:, None]
    >>> model = keras.Sequential([keras.layers.Dense(1, kernel_initializer="zeros")])
    >>> trainer = looplab.Trainer(model, optimizer="sgd", loss="mse")
    >>> history = trainer.fit(x, 3 * x, epochs=2, verbose=0)
    >>> history.history["loss"]
    [157.5, 63.72...]

With `log_dir="logs/first"`, it also writes every step to TensorBoard, and checkpoints from which
`fit(..., resume=True)` continues.

A custom step is one method, which returns the scalars of its batch; `Steps` lists what to override and call:

    >>> class Mine(looplab.Trainer):
    ...     def train_step(self, batch):
    ...         x, y = batch
    ...         with tf.GradientTape() as tape:
    ...             loss = self.compute_loss(x, y, self(x, training=True))
    ...         self.minimize(tape, loss)
    ...         return {"loss": loss, "largest": tf.reduce_max(x)}
    >>> history = Mine(model, optimizer="sgd", loss="mse").fit(x, 3 * x, verbose=0)
    >>> history.history["largest"]
    [7.0]

A function that returns a `Recipe`, which is a trainer and its data, runs from the command line (`main`) or from Python
(`run`).
"""

import pkgutil

# In a checkout, the recipes are beside this package; once installed, they are inside it. In the root of a checkout,
# this folder hides an installed package, so Python must search both for `looplab.recipes`.
__path__ = pkgutil.extend_path(__path__, __name__)

try:
    import fcntl  # noqa: F401
except ImportError as error:
    raise ImportError("looplab needs Linux or macOS: Windows has no `fcntl`, which locks log folders.") from error

from looplab import _quiet  # noqa: F401, I001  (must come before TensorFlow is imported)
from looplab import callbacks, testing
from looplab.checkpoint.policy import Checkpoint
from looplab.cli.command import main
from looplab.data.named import Data
from looplab.cli.recipe import Recipe
from looplab.cli.run import run
from looplab.steps import Steps
from looplab.testing import read_scalars
from looplab.trainer import Trainer

__all__ = ["Checkpoint", "Data", "Recipe", "Steps", "Trainer", "callbacks", "main", "read_scalars", "run", "testing"]
__version__ = "0.1.0"
