"""The published training script of ShallowNet, MiniGoogLeNet and MiniVGGNet."""

from typing import Literal

import keras

import looplab
from looplab.recipes.images import classifier, heavy_augmentation, light_augmentation

Augmentation = Literal["heavy", "light", "none"]
_AUGMENTATIONS = {"heavy": heavy_augmentation, "light": light_augmentation, "none": list}


def published_training(model, data, learning_rate, augmentation, **options) -> looplab.Recipe:
    """SGD with momentum 0.9 and a learning rate of `learning_rate` / (1 + step · 0.01 / 60), on images 32×32×3."""
    schedule = keras.optimizers.schedules.InverseTimeDecay(learning_rate, decay_steps=1, decay_rate=0.01 / 60)
    optimizer = keras.optimizers.SGD(schedule, momentum=0.9)
    arrays = data.load((32, 32, 3))
    return classifier(model, arrays, optimizer=optimizer, augmentation=_AUGMENTATIONS[augmentation](), **options)
