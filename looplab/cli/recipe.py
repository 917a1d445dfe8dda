"""What a recipe is: a trainer, and what it is to learn."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from looplab import checks
from looplab.data.named import Arrays
from looplab.paths import local_path
from looplab.trainer import Trainer


class UsageError(ValueError):
    """A run cannot begin as asked for."""


def path_argument(argument: str, path: str | Path) -> Path:
    """A path that was passed to a run, with `~` expanded.

    Raises:
        UsageError: It is a URL, or no path.
    """
    try:
        return local_path(argument, path)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


@checks.named
@dataclasses.dataclass
class Recipe:
    """A trainer, and what it is to learn: what a recipe function returns.

    Name the layers of its models: Keras counts unnamed ones through the whole process, and TensorBoard's tags follow.

    Example:
        >>> import keras, numpy as np, looplab
        >>> def line(units: int = 4, epochs: int = 2, **trainer_options):
        ...     x = np.arange(8, dtype="float32")[:, None]
        ...     model = keras.Sequential([keras.layers.Dense(units, name="hidden"), keras.layers.Dense(1, name="line")])
        ...     trainer = looplab.Trainer(model, optimizer="adam", loss="mse", **trainer_options)
        ...     return looplab.Recipe(trainer, train=(x, 3 * x), epochs=epochs)
        >>> history = line(units=8).fit(verbose=0)
        >>> len(history.history["loss"])
        2
    """

    trainer: Trainer
    train: Any
    """What `fit` takes: a data set, a function of the epoch, or a tuple (x, y) of arrays."""
    validation: Any = None
    """Likewise, or None."""
    epochs: int = 1
    batch_size: int | None = None
    callbacks: Sequence[keras.callbacks.Callback] = ()
    data: Arrays | None = None
    """The data set: `config.json` tells where it came from, and with `predict` its test images are reported on."""
    predict: Callable[[np.ndarray], np.ndarray] | None = None
    """For a classifier of the images of `data`: from images as they are there to a probability for each class, shape
    (n, classes). With it a run ends with a report on the test images, and `--predict` takes pictures."""

    def __post_init__(self) -> None:
        if self.predict is not None:
            checks.classified_images(self.data)

    def fit(self, verbose: int | str = "auto", resume: bool = False) -> keras.callbacks.History:
        """Trains it, or goes on with it, as `Trainer.fit`."""
        x, y, sample_weight = self._training_data()
        return self.trainer.fit(
            x,
            y,
            sample_weight=sample_weight,
            batch_size=self.batch_size,
            epochs=self.epochs,
            verbose=verbose,
            callbacks=list(self.callbacks),
            validation_data=self.validation,
            resume=resume,
        )

    def build(self, weights: str | Path | None = None) -> None:
        """Makes all weights, without training, and reads them from a file."""
        if self.predict is not None and self.data is not None:
            self.predict(self.data.x_train[:1])  # a fraction of what it takes to trace a training step
        else:
            self.trainer.build(*self._training_data())
        if weights is not None:
            weights = path_argument("weights", weights)
            try:
                with warnings.catch_warnings(action="error"):  # Keras only warns where a part of the file is left out
                    self.trainer.load_weights(weights)
            except (ValueError, OSError, UserWarning) as error:
                reason = " ".join(str(error).split())[:300]
                raise UsageError(f"`weights` {weights} does not fit this recipe's models: {reason}") from error

    def _training_data(self) -> tuple[Any, Any, Any]:
        parts = self.train if isinstance(self.train, tuple) else (self.train,)
        return keras.utils.unpack_x_y_sample_weight(parts)


def module_name(recipe: Callable) -> str:
    """The module as one would run it: under `python -m` it calls itself `__main__`."""
    spec = getattr(sys.modules.get(recipe.__module__), "__spec__", None)
    return spec.name if spec else recipe.__module__


def defaults(recipe: Callable[..., Recipe]) -> dict[str, Any]:
    """What the recipe's own arguments are where none is given."""
    parameters = inspect.signature(recipe).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}
