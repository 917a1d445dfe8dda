"""Calls recipes: to train them, to print their layers, or to predict with their weights."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from looplab.cli.files import CONFIG, read_json
from looplab.cli.recipe import Recipe, UsageError, defaults, usage_errors
from looplab.data.named import Data, Unread, read_picture
from looplab.paths import local_path


def make(recipe: Callable[..., Recipe], seed: int, **options: Any) -> Recipe:
    """What the recipe function returns.

    Raises:
        UsageError: It does not take these arguments, or it returns something else than a `Recipe`.
    """
    keras.utils.set_random_seed(seed)
    name, parameters = recipe.__name__, inspect.signature(recipe).parameters
    try:
        inspect.signature(recipe).bind(seed=seed, **options)
    except TypeError as error:
        raise UsageError(
            f"recipe `{name}`: {error}. It must take its own arguments, and **options for the Trainer."
        ) from error
    try:
        made = recipe(seed=seed, **options)
    except TypeError as error:
        for option in options.keys() - parameters.keys():
            near = difflib.get_close_matches(option, parameters, 1)
            if near and f"argument `{option}`" in str(error):
                raise UsageError(f"recipe `{name}` has no argument `{option}`: did you mean `{near[0]}`?") from error
        raise
    if not isinstance(made, Recipe):
        raise UsageError(f"recipe `{name}` must return a `looplab.Recipe`; got {type(made).__name__}.")
    return made


def predict(
    recipe: Callable[..., Recipe],
    pictures: Sequence[str | Path],
    weights: str | Path,
    *,
    precision: str = "float32",
    **options: Any,
) -> list[tuple[str, float]]:
    """The most probable class of each picture file, and its probability, by the weights of a trained recipe.

    Pictures are PNG or JPEG files of any size; they are scaled to the size of the recipe's images.
    """
    with usage_errors():
        weights = local_path("weights", weights)
    trained_on = (read_json(weights.parent / CONFIG).get("data_source") or {}).get("name")
    with precision_policy(precision):
        made = _make_without_data(recipe, **options)
        if made.predict is None or made.data is None:
            raise UsageError(f"recipe `{recipe.__name__}` is not a classifier: it has no `predict`.")
        if trained_on not in (None, made.data.name):
            raise UsageError(f"`weights` {weights} was trained on {trained_on}: pass --dataset {trained_on}.")
        shape = made.data.x_train.shape[1:]
        images = np.stack([read_picture(picture, shape) for picture in pictures])
        made.build(weights)
        probabilities = made.predict(images)
    return [(made.data.classes[row.argmax()], float(row.max())) for row in probabilities]


def summarize(recipe: Callable[..., Recipe], *, precision: str = "float32", **options: Any) -> None:
    """Prints the layers of a recipe's models, with their output shapes and parameters."""
    with precision_policy(precision):
        made = _make_without_data(recipe, **options)
        made.build()
        made.trainer.summary()


def _make_without_data(recipe: Callable[..., Recipe], seed: int = 0, **options: Any) -> Recipe:
    """The recipe without a folder, and without reading its dataset, if that is a `Data`."""
    arguments = {**defaults(recipe), **options}
    unread = {name: Unread(value.dataset) for name, value in arguments.items() if isinstance(value, Data)}
    return make(recipe, seed, **{**options, **unread, "log_dir": None})


@contextlib.contextmanager
def precision_policy(policy: str) -> Iterator[None]:
    """Inside it, Keras creates layers with this policy."""
    known = ("float32", "mixed_bfloat16", "mixed_float16")
    if policy not in known:
        raise UsageError(f"`precision` must be one of {', '.join(known)}; got {policy!r}.")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
