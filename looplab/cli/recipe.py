"""What a recipe is: a trainer and its data."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from looplab import checks
from looplab.data.named import Arrays
from looplab.paths import local_path
from looplab.trainer import Trainer


class UsageError(ValueError):
    """A run cannot start as requested."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Makes each `ValueError` inside it a `UsageError`."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


@checks.named
@dataclasses.dataclass
class Recipe:
    """A trainer and its data: what a recipe function returns.

    Name the layers of its models: Keras numbers unnamed ones across the whole process, and TensorBoard's tags follow.

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
    """What `fit` takes: a dataset, a function of the epoch, or a tuple (x, y) of arrays."""
    validation: Any = None
    """Likewise, or None."""
    epochs: int = 1
    batch_size: int | None = None
    callbacks: Sequence[keras.callbacks.Callback] = ()
    data: Arrays | None = None
    """The dataset: `config.json` describes it, and with `predict` the run ends with a report on its test images."""
    predict: Callable[[np.ndarray], np.ndarray] | None = None
    """For a classifier of the images of `data`: from images as they are there to a probability for each class, shape
    (n, classes). `--predict` calls it for pictures."""

    def __post_init__(self) -> None:
        if self.predict is not None:
            checks.classified_images(self.data)

    def fit(self, verbose: int | str = "auto", resume: bool = False) -> keras.callbacks.History:
        """Trains, or resumes the training, as `Trainer.fit` does."""
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
        """Creates all weights without training, and loads them from a file if one is given."""
        if weights is not None:
            with usage_errors():
                weights = local_path("weights", weights)
            if not (weights.is_file() and weights.name.endswith(".weights.h5")):
                raise UsageError(f"`weights` must be an existing file whose name ends in .weights.h5; got {weights}.")
        if self.predict is not None and self.data is not None:
            self.predict(self.data.x_train[:1])  # much faster than tracing a training step
        else:
            self.trainer.build(*self._training_data())
        if weights is not None:
            try:
                with warnings.catch_warnings(action="error"):  # Keras only warns if it ignores a part of the file
                    self.trainer.load_weights(weights)
            except (ValueError, OSError, UserWarning) as error:
                reason = " ".join(str(error).split())[:300]
                raise UsageError(f"`weights` {weights} does not fit this recipe's models: {reason}") from error

    def _training_data(self) -> tuple[Any, Any, Any]:
        parts = self.train if isinstance(self.train, tuple) else (self.train,)
        return keras.utils.unpack_x_y_sample_weight(parts)


def module_name(recipe: Callable) -> str:
    """The name that runs the recipe's module: under `python -m`, `__module__` is `__main__`."""
    spec = getattr(sys.modules.get(recipe.__module__), "__spec__", None)
    return spec.name if spec else recipe.__module__


def full_name(recipe: Callable) -> str:
    """The recipe as `python -m looplab` takes it."""
    return f"{module_name(recipe)}:{recipe.__name__}"


def defaults(recipe: Callable[..., Recipe]) -> dict[str, Any]:
    """The defaults of the recipe's arguments."""
    parameters = inspect.signature(recipe).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}
