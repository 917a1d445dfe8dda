"""One training script for three nets on CIFAR-10, each written in another of Keras's ways.

python -m looplab.recipes.cifar10 --model sequential --epochs 2 --plot curves.png    as shallow_net: 28 s; 41.09%
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
        model: which of the three
        augmentation: heavy: turned, zoomed, shifted, sheared and flipped, as published; light: shifted and flipped
        learning_rate: of SGD, at the first step
        epochs: passes over the training images
        batch_size: images in a step
    """
    options = {"augmentation": augmentation, "epochs": epochs, "batch_size": batch_size, **trainer_options}
    return published_training(MODELS[model](), data, learning_rate, **options)


if __name__ == "__main__":
    looplab.main(cifar10)
