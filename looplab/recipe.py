"""What a recipe is, and the command line that runs one."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import inspect
import json
import os
import platform
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from looplab import checks
from looplab.datasets import Arrays, Data, DataError
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
        "recipe": f"{_module_name(recipe)}:{recipe.__name__}",
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


def main(recipe: Callable[..., Recipe], argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """The command line of a recipe: its keyword arguments, with types, defaults and docstring lines, are the flags.

    Args:
        recipe: The recipe function.
        argv: The arguments, by default those of the process.
        prog: How usage and errors call the program.
    """
    parser = _Parser(
        prog=prog or f"python -m {_module_name(recipe)}",
        description=(inspect.getdoc(recipe) or "").partition("\n")[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    groups = _add_recipe_flags(parser, recipe)
    _add_common_flags(parser)
    options = vars(parser.parse_args(argv))
    for name, (group, fields) in groups.items():
        options[name] = group(**{field: options.pop(field) for field in fields})
    try:
        run(recipe, **options)
    except (UsageError, DataError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


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


class _Parser(argparse.ArgumentParser):
    """Names the nearest flag where one is unknown."""

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1)
            self.error(f"unknown argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else ""))
        return parsed


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    """What belongs to the run and the trainer, not to one recipe."""
    flags = parser.add_argument_group("of every recipe")
    flags.add_argument(
        "--seed",
        type=functools.partial(_whole, 0),
        metavar="N",
        default=0,
        help="of the weights, the steps and the order of the data",
    )
    flags.add_argument(
        "--log-dir",
        help="folder for all that the run leaves (default: logs/<recipe>/<time>)",
        default=argparse.SUPPRESS,
    )
    flags.add_argument("--weights", metavar="FILE", help=".weights.h5 file to start from", default=argparse.SUPPRESS)
    flags.add_argument(
        "--verbose", type=_verbose, default="auto", help="0: nothing; 1 or auto: a bar; 2: a line an epoch"
    )
    flags.add_argument(
        "--steps-per-execution", type=_auto_or_positive, default="auto", metavar="N", help="steps in one graph call"
    )
    flags.add_argument("--run-eagerly", action="store_true", help="step through Python, to debug")
    flags.add_argument("--jit-compile", action="store_true", help="compile the step with XLA")


def _add_recipe_flags(
    parser: argparse.ArgumentParser, recipe: Callable[..., Recipe]
) -> dict[str, tuple[type, list[str]]]:
    """Adds the function's keyword arguments; returns those that are a dataclass, whose fields are the flags."""
    groups: dict[str, tuple[type, list[str]]] = {}
    flags = parser.add_argument_group(f"of {recipe.__name__}")
    for name, kind, default, text in _parameters(recipe):
        if dataclasses.is_dataclass(default):
            fields = _parameters(type(default))
            groups[name] = type(default), [field for field, *_ in fields]
            for field, field_kind, _, field_text in fields:
                _add_flag(flags, field, field_kind, getattr(default, field), field_text)
        else:
            _add_flag(flags, name, kind, default, text)
    return groups


def _add_flag(flags: Any, name: str, kind: Any, default: Any, text: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    text = text.replace("%", "%%") or "(default: %(default)s)"
    if default is inspect.Parameter.empty:
        flags.add_argument(flag, type=kind, required=True, metavar=kind.__name__.upper(), help=text)
        return
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(inner for inner in typing.get_args(kind) if inner is not type(None))
    if kind is bool:
        flags.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
    elif typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        flags.add_argument(flag, type=type(choices[0]), choices=choices, default=default, help=text)
    elif kind is int and name in ("epochs", "batch_size", "limit"):
        flags.add_argument(flag, type=functools.partial(_whole, 1), default=default, metavar="N", help=text)
    else:
        flags.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=text)


def _parameters(function: Callable) -> list[tuple[str, Any, Any, str]]:
    """(name, type, default, docstring line) of each keyword argument."""
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    lines = _argument_lines(inspect.getdoc(function) or "")
    return [
        (name, hints.get(name, type(parameter.default)), parameter.default, lines.get(name, ""))
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]


def _argument_lines(doc: str) -> dict[str, str]:
    """The lines of a docstring's `Args:`, by argument."""
    lines: dict[str, str] = {}
    name = ""
    for line in doc.partition("Args:\n")[2].splitlines():
        if not line.startswith("    "):
            break
        if not line.startswith("     "):
            name, _, line = line.strip().partition(":")
        lines[name] = f"{lines.get(name, '')} {line.strip()}".strip()
    return lines


def _whole(minimum: int, text: str) -> int:
    if not text.lstrip("+-").isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}; {text} came")
    return int(text)


def _auto_or_positive(text: str) -> int | str:
    return text if text == "auto" else _whole(1, text)


def _verbose(text: str) -> int | str:
    if text not in ("auto", "0", "1", "2"):
        raise argparse.ArgumentTypeError(f"must be auto, 0, 1 or 2; {text} came")
    return text if text == "auto" else int(text)


def _module_name(recipe: Callable) -> str:
    """The module as one would run it: under `python -m` it calls itself `__main__`."""
    spec = getattr(sys.modules.get(recipe.__module__), "__spec__", None)
    return spec.name if spec else recipe.__module__


def _new_folder(parent: Path) -> Path:
    name = time.strftime("%Y%m%d-%H%M%S")
    names = [name, *(f"{name}-{number}" for number in range(2, 100))]
    return next(parent / name for name in names if not (parent / name).exists())


def _defaults(recipe: Callable[..., Recipe]) -> dict[str, Any]:
    return {name: default for name, _, default, _ in _parameters(recipe)}


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
