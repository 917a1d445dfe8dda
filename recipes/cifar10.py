"""One training script for three networks on CIFAR-10, each written with another of Keras's APIs.

python -m looplab.recipes.cifar10 --model sequential --epochs 2 --plot curves.png    28 s; test accuracy 41.09%
"""

from typing import Literal

import looplab
from looplab.recipes import mini_googlenet, mini_vggnet, shallow_net
from looplab.recipes.sgd import Augmentation, published_training

MODELS = {"sequential": shallow_net.model, "functional": mini_googlenet.model, "class": mini_vggnet.MiniVGGNet}


def cifar10(
    data: looplab.Data = looplab.Data("cifar10"),
    model: Literal["sequential", "functional", "class"] = "sequential",
    augmentation: Augmentation = "heavy",
    learning_rate: float = 1e-2,
    epochs: int = 60,
    batch_size: int = 128,
    **trainer_options,
) -> looplab.Recipe:
    """ShallowNet (sequential), MiniGoogLeNet (functional) or MiniVGGNet (class) on 10 classes of images.

    Args:
        model: which of the three networks
        augmentation: heavy: rotation, zoom, shift, shear and flip, as published; light: shift and flip
        learning_rate: initial learning rate of SGD
        epochs: passes over the training images
        batch_size: images per step
    """
    options = {"augmentation": augmentation, "epochs": epochs, "batch_size": batch_size, **trainer_options}
    return published_training(MODELS[model](), data, learning_rate, **options)


if __name__ == "__main__":
    looplab.main(cifar10)
