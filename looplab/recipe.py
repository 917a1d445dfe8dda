"""What a recipe is, and how one is run."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab import checks
from looplab.datasets import Arrays, Data
from looplab.trainer import Trainer


class UsageError(ValueError):
    """A run cannot begin as asked for."""


@dataclasses.dataclass
class Recipe:
    """A trainer, and what it is to learn: what a recipe function returns.

    Name the layers of its models: Keras counts unnamed ones through the whole process, and TensorBoard's tags follow.
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
    """Where the data came from, for `config.json`."""

    def fit(self, verbose: int | str = "auto") -> keras.callbacks.History:
        """Trains it."""
        parts = self.train if isinstance(self.train, tuple) else (self.train,)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(parts)
        return self.trainer.fit(
            x,
            y,
            sample_weight=sample_weight,
            batch_size=self.batch_size,
            epochs=self.epochs,
            verbose=verbose,
            callbacks=list(self.callbacks),
            validation_data=self.validation,
        )


def run(
    recipe: Callable[..., Recipe],
    *,
    seed: int = 0,
    log_dir: str | Path | None = None,
    weights: str | None = None,
    verbose: int | str = "auto",
    **options: Any,
) -> Recipe:
    """Runs a recipe from Python or a notebook as its command line does, and returns it, trained.

    Args:
        recipe: The recipe function.
        seed: Of everything: the weights, the random numbers of steps, the order of the data.
        log_dir: Where to leave event files, `config.json`, `history.json`, `timings.json`, `model.weights.h5` and
            pictures; by default `logs/<recipe>/<time>`.
        weights: A `.weights.h5` file to start from.
        verbose: As in `Trainer.fit`.
        options: The recipe function's own, and the `Trainer`'s.
    """
    folder = Path(log_dir) if log_dir is not None else _new_folder(Path("logs") / recipe.__name__)
    _check_files(folder, weights)
    keras.utils.set_random_seed(seed)
    try:
        inspect.signature(recipe).bind(seed=seed, log_dir=folder, **options)
    except TypeError as error:
        raise UsageError(
            f"recipe `{recipe.__name__}`: {error}. It takes its own arguments, and **options for the Trainer."
        ) from error
    began = time.time()
    ready = recipe(seed=seed, log_dir=folder, **options)
    trainer = ready.trainer
    if weights is not None:
        trainer.build(*(ready.train if isinstance(ready.train, tuple) else (ready.train,)))
        trainer.load_weights(weights)
    config = {
        "recipe": f"{module_name(recipe)}:{recipe.__name__}",
        "seed": seed,
        "weights": weights,
        **_defaults(recipe),
    }
    config |= {**options, "log_dir": folder, "data_source": _described(ready.data), "environment": _environment(recipe)}
    _write_json(folder / "config.json", config)
    history = ready.fit(verbose)
    seconds = time.time() - began
    _write_json(folder / "history.json", history.history)
    _write_json(
        folder / "timings.json", {"began": datetime.fromtimestamp(began), "seconds": seconds, "steps": trainer.steps}
    )
    trainer.save_weights(folder / "model.weights.h5")
    print(f"looplab: {trainer.steps} steps in {seconds:.0f} s, all in {folder}. To watch them:")
    print(f"  tensorboard --logdir {folder.parent} --samples_per_plugin scalars=999999999")
    return ready


def _check_files(folder: Path, weights: str | None) -> None:
    """The log folder is free, and the weights are there."""
    try:
        checks.no_other_run(folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"`log_dir` {folder} cannot be made: {existing} is no folder, or not writable.")
    if weights is not None and not (Path(weights).is_file() and str(weights).endswith(".weights.h5")):
        raise UsageError(f"`weights` must be a file whose name ends in .weights.h5; {weights} is none.")


def module_name(recipe: Callable) -> str:
    """The module as one would run it: under `python -m` it calls itself `__main__`."""
    spec = getattr(sys.modules.get(recipe.__module__), "__spec__", None)
    return spec.name if spec else recipe.__module__


def _new_folder(parent: Path) -> Path:
    name = time.strftime("%Y%m%d-%H%M%S")
    names = [name, *(f"{name}-{number}" for number in range(2, 100))]
    return next(parent / name for name in names if not (parent / name).exists())


def _defaults(recipe: Callable[..., Recipe]) -> dict[str, Any]:
    """What the recipe's own arguments are where none is given."""
    parameters = inspect.signature(recipe).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def _environment(recipe: Callable[..., Recipe]) -> dict[str, Any]:
    """What else decides a run's bits: versions, code, devices, threads."""
    folder = Path(inspect.getfile(recipe)).parent
    try:
        command = ["git", "-C", str(folder), "rev-parse", "--verify", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        revision = None
    versions = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    return {
        "versions": versions | {"numpy": np.__version__},
        "git_revision": revision,
        "devices": [device.name for device in tf.config.list_physical_devices()],
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "precision": keras.config.dtype_policy().name,
    }


def _write_json(path: Path, value: Any) -> None:
    """Floats are written so that they read back to the same bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, default=_plain) + "\n")


def _described(data: Arrays | None) -> dict[str, Any] | None:
    if data is None:
        return None
    sizes = {"training_examples": len(data.x_train), "test_examples": len(data.x_test)}
    return {name: getattr(data, name) for name in ("name", "source", "sha256", "fallback")} | sizes


def _plain(value: Any) -> Any:
    if isinstance(value, Data):
        return dataclasses.asdict(value)
    return str(value)
