"""Published custom training steps, written from their descriptions, with tiny networks and random data.

Each is a compiled `keras.Model`, as a Keras user writes it, and a `looplab.Trainer` with the same step. Where the step
needs no change, the trainer takes it from the model: `train_step = DCGAN.train_step`.
"""

from published import (
    autoencoders,
    contrastive,
    diffusion,
    gans,
    guides,
    patches,
    queues,
    sequences,
    teachers,
    translation,
    vision,
)
from published.system import System

__all__ = ["SYSTEMS", "System"]

SYSTEMS = [
    system
    for module in (
        guides,
        gans,
        translation,
        autoencoders,
        diffusion,
        contrastive,
        teachers,
        sequences,
        vision,
        patches,
        queues,
    )
    for system in module.SYSTEMS
]
