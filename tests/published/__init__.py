"""Published custom training steps, written from their descriptions, with tiny networks and random data.

Each is a compiled `keras.Model`, as a Keras user writes it, and a `looplab.Trainer` with the same step. Where the step
needs no change, the trainer takes it from the model: `train_step = DCGAN.train_step`.
"""

from published import autoencoders, diffusion, gans, guides, translation
from published.system import System

__all__ = ["SYSTEMS", "System"]

SYSTEMS = [*guides.SYSTEMS, *gans.SYSTEMS, *autoencoders.SYSTEMS, *translation.SYSTEMS, *diffusion.SYSTEMS]
