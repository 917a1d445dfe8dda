"""Checks of what users pass; each error names the argument, the value and the fix."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import keras
import numpy as np

from looplab import compat
from looplab.keras_models import with_rates
from looplab.variables import to_numpy
from looplab.walk import overrides
from looplab.warn import warn

P = ParamSpec("P")
R = TypeVar("R")


def whole(least: int, name: str, value: Any, or_else: str = "") -> int:
    """`value` as a Python int, which a checkpoint and JSON can hold."""
    with contextlib.suppress(TypeError):
        number = operator.index(value)
        if number >= least and not isinstance(value, (bool, np.bool_)):
            return number
    raise ValueError(f"`{name}` must be {or_else}a whole number of at least {least}; got {value!r}.")


def positive(**arguments: Any) -> list[Any]:
    """Each argument as a Python int of at least 1, or None."""
    return [None if value is None else whole(1, name, value) for name, value in arguments.items()]


def epochs(value: Any) -> int:
    """The number of epochs, at most as many as Keras is set to run."""
    number, most = whole(1, "epochs", value), keras.config.max_epochs()
    if most is None or number <= most:
        return number
    warn(f"`epochs` is limited to {most} by `keras.config.set_max_epochs`.")
    return most


def model(value: Any) -> Any:
    """`value`, which must be callable and no class, or None."""
    if value is not None and (isinstance(value, type) or not callable(value)):
        found = f"the class {value.__name__}: create a model of it" if isinstance(value, type) else repr(value)
        raise TypeError(f"`model` must be a Keras model or layer, a `tf.Module`, a function, or None; got {found}.")
    return value


def profile_steps(value: Any, log_dir: Any) -> tuple[int, int] | None:
    """The first and the last step to profile as Python ints, or None."""
    if value is None:
        return None
    if log_dir is None:
        raise ValueError("`profile_steps` writes a profile to `log_dir`, which is None: pass a folder.")
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"`profile_steps` must be (first, last), such as (100, 120); got {value!r}.")
    first, last = (whole(1, "profile_steps", number, "(first, last), each ") for number in value)
    if first > last:
        raise ValueError(f"`profile_steps` must be (first, last) with first at most last; got {value!r}.")
    return first, last


def validation_freq(value: Any) -> int | list[int]:
    """A number of epochs, or the epochs after which to validate, as Python ints."""
    if isinstance(value, set) or np.ndim(value):
        return [whole(1, "validation_freq", number) for number in value]
    return whole(1, "validation_freq", value)


def steps_per_execution(value: Any) -> int | str:
    """A Python int, or "auto"."""
    is_auto = isinstance(value, str) and value == "auto"
    return value if is_auto else whole(1, "steps_per_execution", value, '"auto" or ')


def yes_or_no(name: str, value: Any, *others: str | None) -> Any:
    """A Python bool, or one of the other values."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if not any(value is other or (isinstance(value, str) and value == other) for other in others):
        *first, last = ("True", "False", *(json.dumps(o) if isinstance(o, str) else repr(o) for o in others))
        raise ValueError(f"`{name}` must be {', '.join(first)} or {last}; got {value!r}.")
    return value


def jit_compile(value: Any) -> bool | None:
    """A Python bool or None; "auto" is False, as it is for a model that is compiled with it."""
    checked = yes_or_no("jit_compile", value, None, "auto")
    return False if checked == "auto" else checked


def run_eagerly(value: Any) -> bool | None:
    """A Python bool or None."""
    return yes_or_no("run_eagerly", value, None)


def resume(value: Any, log_dir: Path | None) -> None:
    """Requires a bool, and a folder if it is True."""
    if not isinstance(value, bool):
        raise TypeError(f"`resume` must be True or False; got {value!r}. The folder is the trainer's `log_dir`.")
    if value and log_dir is None:
        raise ValueError("`resume` needs the trainer's `log_dir`, where the run is saved.")


def checkpoint(value: Any, kind: type, log_dir: Any) -> None:
    """Requires settings or None."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"`checkpoint` must be a `looplab.Checkpoint` or None; got {value!r}.")
    if log_dir is None and value not in (None, kind()):
        raise ValueError("`checkpoint` needs `log_dir`, the folder to save to. Pass both.")


def callbacks(given: Any) -> list[keras.callbacks.Callback]:
    """Keras callbacks as a list, without those whose job the trainer does."""
    flat = [] if given is None else keras.tree.flatten(given)
    instead = {
        keras.callbacks.TensorBoard: "pass `log_dir` to the trainer, which writes every step",
        keras.callbacks.ProgbarLogger: "`fit` shows a progress bar with `verbose=1`",
        keras.callbacks.BackupAndRestore: "it cannot restore the trainer's state; pass `resume=True` to `fit`",
    }
    for callback in flat:
        if not isinstance(callback, keras.callbacks.Callback):
            raise TypeError(f"`callbacks` must be `keras.callbacks.Callback`s; got {type(callback).__name__}.")
        for refused, remedy in instead.items():
            if isinstance(callback, refused):
                raise ValueError(f"`callbacks` has a `{refused.__name__}`, which needs `Model.fit`: {remedy}.")
    return flat


def hparams(values: Any) -> None:
    """Requires a dict by name."""
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise TypeError(f"`hparams` must be a dict of values by name, and names must be strings; got {values!r}.")


def learning_rates(optimizers: dict[str, keras.optimizers.Optimizer]) -> None:
    """Requires finite numbers of at least 0; does not check schedules."""
    for path, optimizer in with_rates(optimizers).items():
        if not isinstance(compat.learning_rate(optimizer), keras.optimizers.schedules.LearningRateSchedule):
            rate = float(to_numpy(getattr(optimizer, "inner_optimizer", optimizer).learning_rate))
            if not 0 <= rate < math.inf:
                raise ValueError(f"`learning_rate` of `{path}` must be a finite number of at least 0; got {rate}.")


def known(argument: str, given: Any) -> None:
    """Requires that Keras knows the names in `loss` or `metrics`, which may have any structure."""
    names = compat.NAMES["loss" if argument == "loss" else "metrics"]
    for name in keras.tree.flatten(given):
        is_known = not isinstance(name, str) or name in names or name.lower() in names
        if not is_known and keras.saving.get_registered_object(name) is None:
            hint = _nearest(name, names, repr, "pass the function or object itself.")
            raise ValueError(f"`{argument}` has {name!r}, which Keras does not know: {hint}")


def _nearest(name: str, names: Iterable[str], quote: Callable[[str], str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {quote(near[0])}?" if near else otherwise


def named(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function or class: an unknown keyword argument is an error that suggests the nearest name."""
    if isinstance(function, type):
        function.__init__ = named(function.__init__)  # type: ignore[misc]
        return function
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in parameters:
                others = ", ".join(parameter for parameter in parameters if parameter != "self")
                hint = _nearest(name, parameters, "`{}`".format, f"it has {others}.")
                raise TypeError(f"`{function.__qualname__.removesuffix('.__init__')}` has no argument `{name}`: {hint}")
        return function(*args, **kwargs)

    return checked


def same(workers: Any, log_dir: Any, epochs: int, initial_epoch: int, resume: bool, validation_data: Any) -> None:
    """Requires the same arguments of `fit` on all workers; of some, only whether they are given."""
    given = {"`log_dir` is given": log_dir is not None, "`validation_data` is given": validation_data is not None}
    arguments = {"`epochs`": epochs, "`initial_epoch`": initial_epoch, "`resume`": resume}
    workers.require_same("`fit`", lambda: arguments | given)


def unseeded(name: str, what: str, resumes: bool = False, workers: int = 1) -> None:
    """Warns of a random dataset that cannot be restored; raises an error if a run resumes or workers share it."""
    effect = "a resumed training sees other batches than one that was never interrupted"
    if workers > 1:
        effect = f"the {workers} workers, which each read a part of it, would see some examples twice and others never"
    text = (
        f"`{name}` has {what}, so {effect}. Pass a seed, such as `dataset.shuffle(1000, seed=0)`; leave out "
        f"`deterministic=False`; augment examples within the step, or with `tf.random.stateless_...` and a seed from "
        f"the data."
    )
    if resumes or workers > 1:
        raise ValueError(text)
    warn(text)


def inexact(name: str, why: str) -> None:
    """Warns of data whose state no checkpoint holds, and which is not random to TensorFlow."""
    warn(
        f"`{name}` {why}: a resumed training skips as many batches as were used, and continues exactly only if the "
        f"data is the same as then. To be sure, pass arrays, a `tf.data.Dataset`, or a `keras.utils.PyDataset` whose "
        f"batches depend on their index alone."
    )


def test_step(argument: str, trainer: Any) -> None:
    """Requires a way to evaluate: a subclass without a model must override `test_step` if it overrides `train_step`."""
    own = {name for name in ("train_step", "test_step", "__call__") if overrides(trainer, name)}
    if trainer.model is None and own == {"train_step"}:
        raise ValueError(
            f"`{argument}` needs `{type(trainer).__name__}` to override `test_step` too: it has its own `train_step` "
            f"and no `model`. Return the values of one batch from it, as from `train_step`."
        )


def classified_images(arrays: Any) -> None:
    """Requires the data of a recipe with `predict`: uint8 images, each with a whole number as its class."""
    if arrays is None:
        raise ValueError("`data` of a recipe with `predict` must be the images and labels to report on; got None.")
    for part in ("train", "test"):
        x, y = getattr(arrays, f"x_{part}"), getattr(arrays, f"y_{part}")
        if x.dtype != np.uint8 or not np.issubdtype(y.dtype, np.integer) or y.shape != (len(x),):
            raise ValueError(
                f"`data` of a recipe with `predict` must have uint8 images and one whole number for each; got x_{part} "
                f"of {x.dtype} {x.shape} with y_{part} of {y.dtype} {y.shape}. Scale images within the trainer."
            )


def saved(changed_tables: Sequence[str]) -> None:
    """Requires that a step that is saved keeps its state in variables."""
    if changed_tables:
        raise ValueError(
            f"`train_step` changes a table or queue ({', '.join(changed_tables)}), which a checkpoint cannot hold: a "
            f"resumed run would start with an empty one. Keep its contents in a `tf.Variable`, or pass "
            f"`checkpoint=None` to the trainer to train without checkpoints."
        )
