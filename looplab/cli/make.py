"""Makes recipes: to train them, to predict with their weights, or to print their layers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from looplab.cli.folder import NOT_ARGUMENTS, read_config
from looplab.cli.recipe import Recipe, UsageError, defaults, path_argument
from looplab.data.named import Data, Unread, read_picture

# What `run` takes for itself, or writes to config.json; `seed` and `log_dir` a recipe gets from it.
_TAKEN = {"resume", "weights", "precision", "plot", "verbose", *NOT_ARGUMENTS} - {"log_dir"}


def predict(
    recipe: Callable[..., Recipe],
    pictures: Sequence[str | Path],
    weights: str | Path,
    *,
    precision: str = "float32",
    **options: Any,
) -> list[tuple[str, float]]:
    """The most probable class, and its probability, for each picture file, by the weights of a trained recipe.

    Pictures are PNG or JPEG files of any size, which are scaled to that of the recipe's images.
    """
    weights = path_argument("weights", weights)
    check_weights(weights)
    trained_on = (read_config(weights).get("data_source") or {}).get("name")
    with precision_policy(precision):
        ready = _make_unread(recipe, **options)
        if ready.predict is None or ready.data is None:
            raise UsageError(f"recipe `{recipe.__name__}` tells no classes: there is nothing to predict.")
        if trained_on not in (None, ready.data.name):
            raise UsageError(f"`weights` {weights} learned from {trained_on}: pass --dataset {trained_on}.")
        shape = ready.data.x_train.shape[1:]
        images = np.stack([read_picture(path_argument("pictures", picture), shape) for picture in pictures])
        ready.build(weights)
        probabilities = ready.predict(images)
    return [(ready.data.classes[row.argmax()], float(row.max())) for row in probabilities]


def summarize(recipe: Callable[..., Recipe], *, precision: str = "float32", **options: Any) -> None:
    """Prints the layers of a recipe's models, with their output shapes and parameters."""
    with precision_policy(precision):
        ready = _make_unread(recipe, **options)
        ready.build()
        ready.trainer.summary()


def make(recipe: Callable[..., Recipe], seed: int, **options: Any) -> Recipe:
    """What the recipe function returns."""
    keras.utils.set_random_seed(seed)
    if taken := set(inspect.signature(recipe).parameters) & _TAKEN:
        raise UsageError(f"recipe `{recipe.__name__}`: call its argument `{taken.pop()}` otherwise, looplab has it.")
    try:
        inspect.signature(recipe).bind(seed=seed, **options)
    except TypeError as error:
        raise UsageError(
            f"recipe `{recipe.__name__}`: {error}. It takes its own arguments, and **options for the Trainer."
        ) from error
    return recipe(seed=seed, **options)


def _make_unread(recipe: Callable[..., Recipe], seed: int = 0, **options: Any) -> Recipe:
    """The recipe without its data, where that is a `Data`, and without a folder."""
    arguments = {**defaults(recipe), **options}
    unread = {name: Unread(value.dataset) for name, value in arguments.items() if isinstance(value, Data)}
    return make(recipe, seed, **{**options, **unread, "log_dir": None})


@contextlib.contextmanager
def precision_policy(policy: str) -> Iterator[None]:
    """Within it, Keras makes layers with this policy."""
    known = ("float32", "mixed_bfloat16", "mixed_float16")
    if policy not in known:
        raise UsageError(f"`precision` must be one of {', '.join(known)}; got {policy!r}.")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def check_weights(weights: str | Path) -> None:
    """Requires an existing weights file."""
    if not (Path(weights).is_file() and str(weights).endswith(".weights.h5")):
        raise UsageError(f"`weights` must be a file whose name ends in .weights.h5; {weights} is none.")
