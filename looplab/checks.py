"""What a user can get wrong around a step, each as one error that tells what to do."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import math
import operator
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import keras
import numpy as np
import tensorflow as tf

from looplab.metrics import Named
from looplab.tracking import path_of, rate_of, to_numpy, trained_by
from looplab.warn import warn

_WORDS = "begin the model with `keras.layers.StringLookup` or `TextVectorization`"
P = ParamSpec("P")
R = TypeVar("R")


def whole(least: int, name: str, value: Any) -> int:
    """It is a whole number; as Python's own, which a checkpoint and JSON have."""
    with contextlib.suppress(TypeError):
        number = operator.index(value)
        if number >= least and not isinstance(value, (bool, np.bool_)):
            return number
    raise ValueError(f"`{name}` must be a whole number of at least {least}; {value!r} came.")


def positive(**arguments: Any) -> list[Any]:
    """Each argument is a whole number from 1 on, or None; as Python's own."""
    return [None if value is None else whole(1, name, value) for name, value in arguments.items()]


def validation_freq(value: Any) -> int | list[int]:
    """It is a whole number from 1 on, or some of them; as Python's own."""
    if isinstance(value, set) or np.ndim(value):
        return [whole(1, "validation_freq", number) for number in value]
    return whole(1, "validation_freq", value)


def steps_per_execution(value: Any) -> None:
    """It is "auto" or a whole number from 1 on."""
    if value != "auto":
        try:
            positive(steps_per_execution=value if value is not None else 0)
        except ValueError as error:
            raise ValueError(f'`steps_per_execution` must be "auto" or at least 1; {value!r} came.') from error


def resume(value: Any, log_dir: Path | None) -> None:
    """It is a bool, and there is a folder to go on in."""
    if not isinstance(value, bool):
        raise TypeError(f"`resume` must be True or False; {value!r} came. The folder is the trainer's `log_dir`.")
    if value and log_dir is None:
        raise ValueError("`resume` needs the trainer's `log_dir`: there the run was saved.")


def checkpoint(value: Any, kind: type) -> None:
    """It is settings, or None."""
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"`checkpoint` must be a `looplab.Checkpoint`, or None; {value!r} came.")


def unseeded(what: str, resumes: bool) -> None:
    """A data set of the user's gives the same batches in another process."""
    text = (
        f"`x` has {what}: a training that goes on after its end would not see the batches that it would have seen. "
        f"Pass a seed, as in `dataset.shuffle(1000, seed=0)`; do what is random to an example within the step, or with "
        f"`tf.random.stateless_...` from a seed that is in the data."
    )
    if resumes:
        raise ValueError(text)
    warn(text)


def saved(changed_tables: Sequence[str]) -> None:
    """A step keeps its state in variables, which checkpoints hold: they hold no tables and no queues."""
    if changed_tables:
        raise ValueError(
            f"`train_step` changes a table or queue ({', '.join(changed_tables)}), which no checkpoint can hold: a "
            f"resumed run would start with an empty one. Keep its contents in a `tf.Variable`, or pass "
            f"`checkpoint=None` to the trainer to train without checkpoints."
        )


def callbacks(given: Any) -> list[keras.callbacks.Callback]:
    """It is one Keras callback, or a structure of some, and none does what the trainer itself does; as a list."""
    if isinstance(given, Iterable) and not isinstance(given, (list, tuple, dict)):
        given = list(given)
    flat = [] if given is None else keras.tree.flatten(given)
    instead = {
        keras.callbacks.TensorBoard: "pass `log_dir` to the trainer, which writes every step",
        keras.callbacks.ProgbarLogger: "`verbose=1` of `fit` shows a bar",
        keras.callbacks.BackupAndRestore: "it cannot bring back the trainer's own state",
    }
    for callback in flat:
        if not isinstance(callback, keras.callbacks.Callback):
            raise TypeError(f"`callbacks` must be `keras.callbacks.Callback`s; {type(callback).__name__} came.")
        for refused, remedy in instead.items():
            if isinstance(callback, refused):
                raise ValueError(f"`callbacks` holds a `{refused.__name__}`, made for `Model.fit`: {remedy}.")
    return flat


def parts(batch: Any) -> tuple[Any, Any, Any]:
    """A batch is x, (x, y) or (x, y, sample_weight), as the default steps take it; the three, or None."""
    if isinstance(batch, (list, tuple)) and not 1 <= len(batch) <= 3:
        raise ValueError(
            f"A batch must be x, (x, y) or (x, y, sample_weight); one of {len(batch)} parts came. Put several inputs "
            f"into one x, as a dict or an inner tuple, or override the step, which may take any structure."
        )
    return keras.utils.unpack_x_y_sample_weight(batch)


def step_logs(step: str, logs: Any) -> dict[str, Any]:
    """What a step returned is a dict."""
    if not isinstance(logs, dict):
        raise TypeError(
            f"`{step}` must return a dict of this batch's scalars by name, such as {{'loss': loss}}; "
            f"it returned {type(logs).__name__}."
        )
    return logs


def unique(step: str, values: Iterable[Named]) -> None:
    """Each value has a name of its own."""
    found: dict[str, Named] = {}
    for one in values:
        if one.name in found:
            raise ValueError(
                f"`{step}` has two values named '{one.name}': {found[one.name].origin}, and {one.origin}. Rename one."
            )
        found[one.name] = one


def scalar(who: str, name: Any, value: Any) -> tf.Tensor:
    """`value` is one number, and its name a string; as a tensor."""
    if not isinstance(name, str):
        raise TypeError(f"{who} a value under the name {name!r}: names must be strings.")
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{who} '{name}' as {type(value).__name__}; it must be a scalar tensor.") from error
    if tensor.shape.rank != 0 or not (tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool):
        raise ValueError(
            f"{who} '{name}' with shape {tensor.shape} and dtype {tensor.dtype.name}; it must be one number. "
            f"Reduce it first, such as with `tf.reduce_mean`; a metric of several classes, with `average='macro'`."
        )
    return tensor


def outside_of_branches(method: str, name: str, graph: Any) -> None:
    """A step logs in its own graph, and not in that of a branch or a loop, from which no tensor comes out."""
    if tf.compat.v1.get_default_graph() is not graph:
        raise ValueError(
            f"`{method}` got {name!r} inside a tensor condition or loop (an `if`, `while` or `for` over tensors, or an "
            f"inner `tf.function`). Log it outside, in every step, such as with `tf.where(condition, value, 0.0)`."
        )


def loss(value: Any) -> tf.Tensor:
    """A loss is one floating number; as a tensor."""
    if value is None:
        raise ValueError("`loss` is None. Return it from `compute_loss`, or pass it to `minimize`.")
    tensor = tf.convert_to_tensor(value)
    if tensor.shape.rank != 0 or not tensor.dtype.is_floating:
        raise ValueError(
            f"`loss` must be one floating number; shape {tensor.shape} and dtype {tensor.dtype.name} came. "
            f"Reduce it over the batch, such as with `tf.reduce_mean`."
        )
    return tensor


def gradients(values: Sequence[Any], variables: Sequence[Any]) -> None:
    """At least one variable has a gradient."""
    if all(value is None for value in values):
        names = ", ".join(map(path_of, variables[:5])) + (", …" if len(variables) > 5 else "")
        raise ValueError(
            f"The loss depends on none of the {len(variables)} `variables` ({names}): no gradient. Compute it inside "
            f"the `tf.GradientTape` block, with TensorFlow or `keras.ops` alone, from the model's outputs."
        )


def variables(values: Any) -> list[Any]:
    """They are a flat list of variables."""
    flat = list(values)
    for index, value in enumerate(flat):
        if isinstance(value, (list, tuple, dict)):
            raise ValueError(
                f"`variables` must be a flat list of variables; {type(value).__name__} came at index {index}. Join "
                f"lists, as in `[*a.trainable_variables, *b.trainable_variables]`."
            )
    return flat


def new_variables(optimizer: Any, variables: Sequence[Any]) -> None:
    """An optimizer that has its slots has them for these variables."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if inner.built:
        known = {id(variable) for variable in trained_by(inner)}
        new = [path_of(variable) for variable in variables if id(variable) not in known]
        if new:
            names = ", ".join(new[:5]) + (", …" if len(new) > 5 else "")
            raise ValueError(
                f"`optimizer` was built without {names}, such as while a layer was frozen. To train these variables "
                f"too, give the trainer a new optimizer: `trainer.optimizer = keras.optimizers."
                f"{type(inner).__name__}(...)`."
            )


@contextlib.contextmanager
def structures(y_pred: Any, **parts: Any) -> Iterator[None]:
    """Names the structures of all parts where Keras cannot bring them together."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        files = [Path(frame.f_code.co_filename).stem for frame, _ in traceback.walk_tb(error.__traceback__)]
        _, found, deeper = "/".join(files).rpartition("compile_utils")
        if not found or not {*deeper.split("/")} <= {"", "tree_api", "optree_impl", "dmtree_impl", "ops"}:
            raise  # it is of a loss or metric itself
        came = ", ".join(f"`{name}` {_structure(part)}" for name, part in parts.items() if part is not None)
        raise ValueError(
            f"{', '.join(f'`{name}`' for name, part in parts.items() if part is not None)} must have the structure of "
            f"the model's outputs, {_structure(y_pred)}, with None for outputs without; {came} came."
        ) from error


def _structure(part: Any) -> str:
    if isinstance(part, dict):
        return "{" + ", ".join(f"{key!r}: {_structure(inner)}" for key, inner in part.items()) + "}"
    if isinstance(part, (list, tuple)):
        return "[" + ", ".join(map(_structure, part)) + "]"
    if part is None or isinstance(part, (str, float, int)):
        return repr(part)
    return str(getattr(part, "shape", None) or getattr(part, "name", type(part).__name__))


def inputs(x: Any, model: Any) -> None:
    """What comes to a model that knows its inputs fits them; other models say themselves what does not."""
    wanted = getattr(model, "inputs", None)
    leaves = tf.nest.flatten(x)
    if not isinstance(wanted, list) or len(wanted) != len(leaves):
        return
    if not any(tensor.dtype == "string" for tensor in wanted) and any(leaf.dtype == tf.string for leaf in leaves):
        raise TypeError(
            f"`x` has string values, and the model takes numbers ({wanted[0].dtype}). Convert them, or {_WORDS}."
        )
    if len(leaves) == 1 and leaves[0].shape.rank is not None:
        shape, expected = leaves[0].shape, tuple(wanted[0].shape)
        if not _fits(_adjusted(tuple(shape), expected), expected):
            text = f"`x` of shape {shape} does not fit the model, which takes {expected}."
            if _fits((None, *shape), expected):
                raise ValueError(f"{text} It is a single example: batch the data set, as with `dataset.batch(32)`.")
            raise ValueError(f"{text} Bring it to that shape, or build the model for it.")


def _adjusted(shape: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """A shape as Keras's functional models take it: a last dimension of 1 may be missing, or too many."""
    if len(shape) == len(wanted) + 1 and shape[-1] == 1:
        return shape[:-1]
    return (*shape, 1) if len(shape) == len(wanted) - 1 and wanted[-1] == 1 else shape


def _fits(shape: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> bool:
    """Whether an example of a batch of this shape fits; a batch may have any size."""
    pairs = zip(wanted[1:], shape[1:], strict=False)
    return len(shape) == len(wanted) and all(a is None or b in (None, a) for a, b in pairs)


def targets(y: Any, loss_name: Any) -> None:
    """There are targets where a loss needs them."""
    loss_name = loss_name if isinstance(loss_name, str) else getattr(loss_name, "name", "")
    if y is None:
        raise ValueError(
            f"`loss` {loss_name} needs targets, and the data has no y. Pass y, or let the data set's elements be "
            f"(x, y); a model that adds its losses itself takes `loss=None`."
        )
    if all(getattr(leaf, "shape", None) == () for leaf in tf.nest.flatten(y)):
        raise ValueError("`y` is a single number, not a batch: batch the data set, as with `dataset.batch(32)`.")
    if any(getattr(leaf, "dtype", None) == tf.string for leaf in tf.nest.flatten(y)):
        raise TypeError(f"`y` has string values; `loss` {loss_name} takes numbers. Number the classes from 0 on.")


def images(name: str, value: Any) -> tf.Tensor:
    """`value` is a batch of pictures; as uint8."""
    tensor = tf.convert_to_tensor(value)
    if tensor.shape.rank != 4 or tensor.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"Images for '{name}' must have the shape (n, height, width, channels) with 1, 3 or 4 channels; "
            f"{tensor.shape} came."
        )
    return tensor if tensor.dtype == tf.uint8 else tf.image.convert_image_dtype(tensor, tf.uint8, saturate=True)


def classified_images(arrays: Any) -> None:
    """The data of a recipe that has `predict`: uint8 images, and a whole number for each that is one of the classes."""
    if arrays is None:
        raise ValueError("`data` of a recipe with `predict` must be the images and labels to report on; None came.")
    for part in ("train", "test"):
        x, y = getattr(arrays, f"x_{part}"), getattr(arrays, f"y_{part}")
        if x.dtype != np.uint8 or not np.issubdtype(y.dtype, np.integer) or y.shape != (len(x),):
            raise ValueError(
                f"`data` of a recipe with `predict` must have uint8 images and one whole number for each; x_{part} of "
                f"{x.dtype} {x.shape} with y_{part} of {y.dtype} {y.shape} came. Scale images within the trainer."
            )


def hparams(values: Any) -> None:
    """They are a dict by name."""
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise TypeError(f"`hparams` must be a dict of values by name, the names being strings; {values!r} came.")


def learning_rates(optimizers: dict[str, keras.optimizers.Optimizer]) -> None:
    """Each is a finite number of at least 0, where it is one number and not a schedule."""
    for path, optimizer in optimizers.items():
        if isinstance(rate_of(optimizer), keras.optimizers.schedules.LearningRateSchedule):
            continue
        rate = float(to_numpy(optimizer.learning_rate))
        if not 0 <= rate < math.inf:
            raise ValueError(f"`learning_rate` of `{path}` must be a finite number of at least 0; {rate} came.")


def named(function: Callable[P, R]) -> Callable[P, R]:
    """The function, or class, which tells the nearest name where it gets a keyword argument that it has not."""
    if isinstance(function, type):
        function.__init__ = named(function.__init__)  # type: ignore[misc]
        return function
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in parameters:
                near = difflib.get_close_matches(name, parameters, 1)
                known = ", ".join(parameter for parameter in parameters if parameter != "self")
                hint = f"did you mean `{near[0]}`?" if near else f"it has {known}."
                who = function.__qualname__.removesuffix(".__init__")
                raise TypeError(f"`{who}` has no argument `{name}`: {hint}")
        return function(*args, **kwargs)

    return checked
