"""How a recipe is run: from its arguments to all files of the run."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab import checks
from looplab.callbacks import shown, write_png
from looplab.checkpoint.callbacks import config_of
from looplab.checkpoint.policy import Checkpoint
from looplab.checkpoint.store import Store, steps_and_epochs
from looplab.cli import files, report
from looplab.cli.flags import to_options, to_words
from looplab.cli.make import make, precision_policy
from looplab.cli.recipe import Recipe, UsageError, defaults, full_name, usage_errors
from looplab.paths import local_path
from looplab.strategies import create
from looplab.summaries.lock import no_other_run
from looplab.warn import say
from looplab.workers import Workers


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
    strategy: str = "none",
    **options: Any,
) -> Recipe:
    """Runs a recipe from Python or a notebook as its command line does, and returns it, trained.

    Args:
        recipe: The recipe function.
        seed: Of the weights, the random numbers of steps and the order of the data; by default that of the recipe
            function, or 0.
        log_dir: Folder for event files, checkpoints, `config.json`, `history.json`, `timings.json`,
            `model.weights.h5`, a report and pictures; by default that of the recipe function, or
            `logs/<module of the recipe>/<time>`.
        resume: The `log_dir` of a run to resume, to the same bits as if it had not been interrupted. Its arguments are
            restored; pass only objects that no flag can express. `epochs` may be larger. A finished run is left as it
            is. If the folder is also the `log_dir`, a run that does not exist yet starts.
        weights: A `.weights.h5` file to start from.
        precision: Keras's policy for all layers: "float32", the default, "mixed_bfloat16", or "mixed_float16", which
            scales losses.
        plot: A PNG file for a copy of `curves.png`.
        verbose: As in `Trainer.fit`; with 0 the report is not printed either.
        strategy: Where the recipe's models and trainer are created: "mirrored", on all devices of this machine;
            "multi_worker", on those of all processes that TF_CONFIG or Slurm names, each of which calls this function
            before TensorFlow runs anything, and the first of which writes the files; "none", where the caller is.
        options: The recipe function's own, and the `Trainer`'s.
    """
    start = time.time()
    with usage_errors():
        scope = create(strategy)
    workers = Workers(scope)
    given = {"seed": seed, "weights": None if weights is None else str(weights), "precision": precision}
    options |= {name: value for name, value in given.items() if value is not None}
    with workers.needed():
        made = _run(recipe, options, log_dir, resume, plot, verbose, scope, workers, start)
        workers.any(False)  # a worker that ends earlier would not be there if the first one had to start again
    return made


def _run(
    recipe: Callable[..., Recipe],
    options: dict[str, Any],
    log_dir: str | Path | None,
    resume: str | Path | None,
    plot: str | Path | None,
    verbose: int | str,
    scope: tf.distribute.Strategy,
    workers: Workers,
    start: float,
) -> Recipe:
    """Runs a recipe on all workers: see `run`."""
    with usage_errors():
        folder = workers.of_chief(lambda: _folder(recipe, log_dir, resume))
        plot = None if plot is None or not workers.is_chief else _plot(local_path("plot", plot))
    asked, before = to_words(recipe, options), None
    if resume is not None:
        before = workers.of_chief(lambda: files.read_config(recipe, folder, log_dir is not None))
    if before is not None:
        kept = {name: words for name, words in before["asked"].items() if name not in options}
        options = to_options(recipe, kept) | options
        asked = before["asked"] | asked
    arguments = {"seed": 0, "precision": "float32", "weights": None, **defaults(recipe), **options}
    arguments["seed"] = arguments["seed"] or 0
    arguments.pop("log_dir", None)  # the recipe's default
    own = {name: value for name, value in options.items() if name not in ("seed", "precision", "weights")}
    with precision_policy(arguments["precision"]), tempfile.TemporaryDirectory() as dropped:
        with scope.scope():
            made = make(recipe, arguments["seed"], log_dir=folder, **own)
        for name in ("epochs", "batch_size"):  # the recipe may have chosen them
            arguments[name] = getattr(made, name) if arguments.get(name) is None else arguments[name]
        config = {
            "recipe": full_name(recipe),
            **arguments,
            "optimizers": {path: config_of(optimizer) for path, optimizer in made.trainer.optimizers.items()},
            "log_dir": folder,
            "data_source": files.source_of(made.data),
            "environment": files.environment(recipe) | {"replicas": scope.num_replicas_in_sync},
            "asked": asked,
        }
        process = _Process(made, folder if workers.is_chief else Path(dropped), arguments, config, start)
        if before is not None:
            workers.of_chief(lambda: files.check_same(before, config, options, folder))
            past = workers.of_chief(lambda: files.read_json(folder / files.TIMINGS))
            if made.epochs <= past.get("finished_epochs", 0):
                done = max(map(len, files.read_json(folder / files.HISTORY).values()), default=0)
                say(f"looplab: {folder} already has {done} of {made.epochs} epochs: left as it is.")
                made.build(folder / files.WEIGHTS if workers.is_chief else None)
                made.trainer.set_weights(workers.of_chief(made.trainer.get_weights))
                return made
            saved = workers.of_chief(Store(folder / "checkpoints", Checkpoint()).paths)
            process.past_steps = steps_and_epochs(saved[0])[0] if saved else 0
            process.past_seconds = past.get("total_seconds", 0.0)
        if arguments["weights"] is not None and not process.past_steps:
            made.build(arguments["weights"])
        checks.positive(epochs=made.epochs, batch_size=made.batch_size)
        process.run(plot, verbose, resumes=before is not None)
    return made


def _folder(recipe: Callable[..., Recipe], log_dir: str | Path | None, resume: str | Path | None) -> Path:
    """The folder of the run; raises an error if a new run has that of another one."""
    given = None if log_dir is None else local_path("log_dir", log_dir)
    if resume is not None:
        folder = local_path("resume", resume)
        if given is not None and given.resolve() != folder.resolve():
            raise UsageError(f"`log_dir` {given} differs from `resume` {folder}, the folder of the run. Leave it out.")
        return folder
    parent, now = Path("logs") / _name(recipe), time.strftime("%Y%m%d-%H%M%S")
    names = [now, *(f"{now}-{number}" for number in range(2, 100))]
    new = next(parent / name for name in names if not (parent / name).exists())
    folder = given or local_path("log_dir", defaults(recipe).get("log_dir") or new)
    no_other_run(folder)
    if left := [name for name in files.RUN_FILES if (folder / name).exists()]:
        raise UsageError(f"`log_dir` {folder} has the {', '.join(left)} of another run. Pass a new folder, or move it.")
    return folder


def _name(recipe: Callable[..., Recipe]) -> str:
    """The name of the recipe's module or script; in a notebook, which has neither, the function's."""
    if recipe.__module__ != "__main__":
        return recipe.__module__.rpartition(".")[2]
    file = Path(getattr(sys.modules["__main__"], "__file__", recipe.__name__))
    return file.parent.name if file.stem == "__main__" else file.stem


def _plot(path: Path) -> Path:
    """The path, if a picture can be written there."""
    if report.missing():
        raise UsageError("`plot` needs matplotlib and scikit-learn: pip install 'looplab[report]'.")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if path.suffix != ".png" or path.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"`plot` must be a file whose name ends in .png, in a writable folder; got {path}.")
    return path


@dataclasses.dataclass
class _Process:
    """One process of a run."""

    made: Recipe
    folder: Path
    """Where it writes; what a worker other than the first writes is dropped."""
    arguments: dict[str, Any]
    config: dict[str, Any]
    start: float
    past_steps: int = 0
    """The steps that earlier processes saved."""
    past_seconds: float = 0.0
    """The time that they took, apart from those that were killed."""
    is_started: bool = False

    def run(self, plot: Path | None, verbose: int | str, resumes: bool) -> None:
        """Trains, and writes all files of the run."""
        if verbose != 0:
            logs = shlex.quote(str(self.folder.parent))
            say(f"To watch it: tensorboard --logdir {logs} --samples_per_plugin scalars=999999999")
        try:
            history = self._fit(verbose, resumes)
            self.made.trainer.save_weights(self.folder / files.WEIGHTS)
            text = "" if report.missing() else self._write_report(history, plot)
            files.write_json(self.folder / files.HISTORY, history)
        except BaseException:  # also Ctrl-C and SIGTERM: an interrupted run counts its time, too
            if self.is_started:
                self._write_timings(finished_epochs=0)
            raise
        timings = self._write_timings(self.made.epochs)
        if verbose != 0:
            total = f" of {timings['total_steps']}" if self.past_steps else ""
            done = f"looplab: {timings['steps']}{total} steps in {timings['seconds']:.0f} s, all files in {self.folder}"
            last = shown({name: values[-1] for name, values in history.items() if values})
            values = ", ".join(f"{name}={value}" for name, value in last.items())
            say((f"{text}\n" if text else "") + (f"{done}: {values}" if values else done))

    def _fit(self, verbose: int | str, resumes: bool) -> dict[str, list[float]]:
        """Trains, and returns the history."""
        if not resumes:
            self._start()  # before the step is traced, which takes long: from here on, the run can be resumed
            return self.made.fit(verbose).history
        # `fit` may still refuse to resume; nothing is changed before it calls this callback.
        at_start = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: self._start())
        at_start.stateless = True
        recipe = dataclasses.replace(self.made, callbacks=[at_start, *self.made.callbacks])
        return recipe.fit(verbose, resume=True).history

    def _start(self) -> None:
        """Writes what is known before the training, and hyperparameters and some images to TensorBoard."""
        made = self.made
        self.is_started = True
        self._write_timings(finished_epochs=0)
        files.write_json(self.folder / files.CONFIG, self.config)
        hparams: dict[str, Any] = {}
        for name, value in self.arguments.items():
            hparams |= vars(value) if dataclasses.is_dataclass(value) else {name: value}
        made.trainer.log_hparams(hparams)
        if report.missing():
            say("looplab: no report and no pictures: pip install 'looplab[report]' adds them.")
        elif made.predict is not None and made.data is not None:
            self._write_picture("samples", report.draw_samples(made.data.x_train, made.data.y_train, made.data.classes))

    def _write_report(self, history: dict[str, list[float]], plot: Path | None) -> str:
        """Draws the curves and, for a classifier, writes its report on the test images, whose text it returns."""
        made, curves = self.made, report.draw_curves(history)
        for path in [self.folder / "curves.png", *([plot] if plot else [])]:
            write_png(path, curves)
        if made.predict is None or made.data is None:
            return ""
        probabilities = np.asarray(made.predict(made.data.x_test))
        if not np.isfinite(probabilities).all():
            say("looplab: no report: some predictions are not finite. The training has diverged.")
            return ""
        result = report.classification(made.data.y_test, probabilities, made.data.classes)
        (self.folder / "report.txt").write_text(f"{result.text}\n", "utf-8")
        files.write_json(self.folder / "report.json", result.figures)
        self._write_picture("confusion_matrix", report.draw_confusion(result.confusion, made.data.classes))
        return result.text

    def _write_picture(self, name: str, picture: np.ndarray) -> None:
        """Writes a picture to the folder and to TensorBoard."""
        write_png(self.folder / f"{name}.png", picture)
        self.made.trainer.log_image(name, picture[None])

    def _write_timings(self, finished_epochs: int) -> dict[str, Any]:
        """Writes what depends on the clock; with `finished_epochs`, the run has trained so many, and is finished."""
        seconds = time.time() - self.start
        steps = max(self.made.trainer.steps - self.past_steps, 0)  # before it has restored them, a trainer has none
        timings = {
            "start": datetime.fromtimestamp(self.start),
            "seconds": seconds,
            "steps": steps,
            "total_seconds": self.past_seconds + seconds,
            "total_steps": self.past_steps + steps,
            "finished_epochs": finished_epochs,
        }
        if (history := self.made.trainer.history) is not None and "costs" in history.params:
            timings["seconds_by_activity"] = history.params["costs"]
        files.write_json(self.folder / files.TIMINGS, timings)
        return timings
