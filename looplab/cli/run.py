"""How a recipe is run: from its arguments to all that a run leaves, and on from where one ended."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from looplab import checks
from looplab.callbacks import shown, write_png
from looplab.checkpoint.callbacks import config_of
from looplab.checkpoint.policy import Checkpoint
from looplab.cli import report
from looplab.cli.folder import RUN_FILES, RunFolder
from looplab.cli.make import check_weights, make, precision_policy
from looplab.cli.recipe import Recipe, UsageError, defaults, module_name, path_argument
from looplab.cli.resume import as_before, has_checkpoint, is_finished, not_json
from looplab.data.named import Data
from looplab.summaries.lock import no_other_run
from looplab.warn import say


def run(
    recipe: Callable[..., Recipe],
    *,
    seed: int | None = None,
    log_dir: str | Path | None = None,
    resume: str | Path | None = None,
    weights: str | Path | None = None,
    precision: str | None = None,
    plot: str | Path | None = None,
    verbose: int | str = "auto",
    **options: Any,
) -> Recipe:
    """Runs a recipe from Python or a notebook as its command line does, and returns it, trained.

    Args:
        recipe: The recipe function.
        seed: Of everything: the weights, the random numbers of steps, the order of the data; by default that of the
            recipe function, or 0.
        log_dir: Where to leave event files, checkpoints, `config.json`, `history.json`, `timings.json`,
            `model.weights.h5`, a report and pictures; by default that of the recipe function, or
            `logs/<module of the recipe>/<time>`.
        resume: The `log_dir` of a run to go on with, to the same bits as if it had never ended. Its arguments are those
            of its `config.json`: none needs to be given but objects that JSON cannot hold, and `epochs` may be more. A
            finished run is left as it is.
        weights: A `.weights.h5` file to start from.
        precision: Keras's policy for all layers: "float32", the default, "mixed_bfloat16", or "mixed_float16", which
            scales losses.
        plot: A PNG file for the curves of loss and metrics, beside `curves.png` in `log_dir`.
        verbose: As in `Trainer.fit`; with 0 the report is not printed either.
        options: The recipe function's own, and the `Trainer`'s.
    """
    own = defaults(recipe)
    if resume is None:
        seed = own.get("seed") if seed is None else seed
        log_dir = own.get("log_dir") if log_dir is None else log_dir
    log_dir, resume, weights, plot = (
        None if path is None else path_argument(name, path)
        for name, path in {"log_dir": log_dir, "resume": resume, "weights": weights, "plot": plot}.items()
    )
    given = {"seed": seed, "weights": weights, "precision": precision, "log_dir": log_dir}
    options |= {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        options = as_before(recipe, resume, options)
    arguments = {"seed": 0, "precision": "float32", "weights": None, **options}
    seed, precision, weights = (arguments.pop(name) for name in ("seed", "precision", "weights"))
    log_dir = arguments.pop("log_dir", None)
    folder = RunFolder(resume or log_dir, _name(recipe))
    goes_on = resume is not None and has_checkpoint(folder.path)  # else it begins anew, from its weights
    _check_files(folder.path, weights if resume is None else None, plot, is_new=resume is None)
    started = time.time()
    with precision_policy(precision):
        ready = make(recipe, seed, log_dir=folder.path, **arguments)
        if resume is not None and is_finished(ready, folder):
            say(f"looplab: the {ready.epochs} epochs of {folder.path} are done: it is left as it is.")
            ready.build(folder.path / "model.weights.h5")
            return ready
        if weights is not None and not goes_on:
            check_weights(weights)
            ready.build(weights)
        checks.positive(epochs=ready.epochs, batch_size=ready.batch_size)
        config = {**own, **arguments, "seed": seed, "precision": precision, "weights": weights and str(weights)}
        for name in ("epochs", "batch_size"):  # if the recipe chose them
            config[name] = getattr(ready, name) if config.get(name) is None else config[name]

        def start() -> None:
            folder.write_config(_described(recipe, ready, config, own), recipe, ready.data)
            ready.trainer.log_hparams(_flat(config))
            if report.missing():
                say("looplab: no report and no pictures: pip install 'looplab[report]' adds them.")
            elif ready.predict:
                _show_samples(ready, folder)

        history, seconds = _train(ready, folder, start, started, plot, verbose, is_resumed=resume is not None)
    if verbose != 0:
        last = shown({name: values[-1] for name, values in history.items() if values})
        values = ", ".join(f"{name}={value}" for name, value in last.items())
        done = f"looplab: {ready.trainer.steps} steps in {seconds:.0f} s, all in {folder.path}"
        say(f"{done}: {values}" if values else done)
    return ready


def _train(
    ready: Recipe,
    folder: RunFolder,
    start: Callable[[], None],
    started: float,
    plot: Path | None,
    verbose: int | str,
    is_resumed: bool,
) -> tuple[dict[str, list[float]], float]:
    """Trains a recipe, and writes what a run leaves; its history, and how many seconds the run took."""
    if verbose != 0:
        logs = shlex.quote(str(folder.path.parent))
        say(f"To watch it: tensorboard --logdir {logs} --samples_per_plugin scalars=999999999")
    if not is_resumed:
        start()  # before the step is traced, which takes long: the run can be resumed from here on
        history = ready.fit(verbose).history
    else:  # nothing is changed before `fit` has found that it can resume
        callbacks = [_AtStart(start), *ready.callbacks]
        history = dataclasses.replace(ready, callbacks=callbacks).fit(verbose, resume=True).history
    ready.trainer.save_weights(folder.path / "model.weights.h5")
    if not report.missing():
        text = _report(ready, folder, history, plot)
        if text and verbose != 0:
            say(text)
    seconds = folder.write_history(history, started, ready.trainer.steps)  # last: with it the run is finished
    return history, seconds


def _described(
    recipe: Callable[..., Recipe], ready: Recipe, config: dict[str, Any], own: dict[str, Any]
) -> dict[str, Any]:
    """What `config.json` says about a run's arguments.

    Args:
        recipe: The recipe function.
        ready: What it returned.
        config: All arguments.
        own: The defaults of the recipe function.
    """
    chosen = {name: value for name, value in config.items() if value is not own.get(name, ...)}
    return {
        "recipe": f"{module_name(recipe)}:{recipe.__name__}",
        **config,
        "optimizers": {path: config_of(optimizer) for path, optimizer in ready.trainer.optimizers.items()},
        "total_epochs": ready.epochs,
        "not_json": not_json(recipe, chosen),
    }


def _name(recipe: Callable[..., Recipe]) -> str:
    """The name of the recipe's module or script; in a notebook, which has neither, the function's."""
    if recipe.__module__ != "__main__":
        return recipe.__module__.rpartition(".")[2]
    file = Path(getattr(sys.modules["__main__"], "__file__", recipe.__name__))
    return file.parent.name if file.stem == "__main__" else file.stem


class _AtStart(keras.callbacks.Callback):
    """Calls a function when training starts."""

    stateless = True

    def __init__(self, start: Callable[[], None]):
        super().__init__()
        self._start = start

    def on_train_begin(self, logs=None):
        self._start()


def _show_samples(ready: Recipe, folder: RunFolder) -> None:
    """Some training images with their labels: whoever looks at them sees what is learned from."""
    assert ready.data is not None
    picture = report.draw_samples(ready.data.x_train, ready.data.y_train, ready.data.classes)
    ready.trainer.log_image("samples", folder.write_picture("samples", picture)[None])


def _report(ready: Recipe, folder: RunFolder, history: dict[str, list[float]], plot: str | Path | None) -> str:
    """What the run came to: curves, and for a classifier how it does on the test images, of which it returns a text."""
    curves = folder.write_picture("curves", report.draw_curves(history))
    text = ""
    if ready.predict is not None and ready.data is not None:
        probabilities = np.asarray(ready.predict(ready.data.x_test))
        if np.isfinite(probabilities).all():
            made = folder.write_report(ready.data.y_test, probabilities, ready.data.classes)
            picture = report.draw_confusion(made.confusion, ready.data.classes)
            ready.trainer.log_image("confusion_matrix", folder.write_picture("confusion_matrix", picture)[None])
            text = made.text
        else:
            say("looplab: no report: not all predictions are finite numbers. The training has diverged.")
    if plot is not None:
        write_png(Path(plot), curves)
    return text


def _check_files(folder: Path, weights: str | Path | None, plot: str | Path | None, is_new: bool) -> None:
    """The log folder is free, or there is its run; the weights are there, and the curves can be drawn."""
    if is_new:
        try:
            no_other_run(folder)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if left := [name for name in RUN_FILES if (folder / name).exists()]:
            raise UsageError(
                f"`log_dir` {folder} has the {', '.join(left)} of another run. Pass a new folder, or move it."
            )
    _check_writable("log_dir", folder)
    if weights is not None:
        check_weights(weights)
    if plot is not None:
        if report.missing():
            raise UsageError("`plot` needs matplotlib and scikit-learn: pip install 'looplab[report]'.")
        if not str(plot).endswith(".png") or Path(plot).is_dir():
            raise UsageError(f"`plot` must be a file whose name ends in .png; got {plot}.")
        _check_writable("plot", Path(plot))


def _check_writable(argument: str, path: Path) -> None:
    """The path, or the nearest folder above it that exists, can be written to."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not (existing.is_dir() or argument == "plot") or not os.access(existing, os.W_OK):
        raise UsageError(f"`{argument}` {path} cannot be made: {existing} is no folder, or not writable.")


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments as one level of hyperparameters: what belongs to a group stands for itself."""
    groups = {name: dataclasses.asdict(v) for name, v in config.items() if isinstance(v, (Data, Checkpoint))}
    flat = {name: value for name, value in config.items() if name not in groups}
    return {**flat, **{name: value for group in groups.values() for name, value in group.items()}}
