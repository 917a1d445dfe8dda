"""Checks of the batches that steps get, and of what steps compute and return."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from looplab import compat
from looplab.variables import path_of


def parts(batch: Any) -> tuple[Any, Any, Any]:
    """The x, y and sample_weight of a batch for the default steps; None for what it does not have."""
    if isinstance(batch, (list, tuple)) and not 1 <= len(batch) <= 3:
        raise ValueError(
            f"A batch must be x, (x, y) or (x, y, sample_weight); got one of {len(batch)} parts. Put several inputs "
            f"into one x, as a dict or an inner tuple, or override the step, which may take any structure."
        )
    return keras.utils.unpack_x_y_sample_weight(batch)


@contextlib.contextmanager
def inputs(x: Any, model: Any) -> Iterator[None]:
    """Requires inputs that fit a Keras model, which is called inside it."""
    declared = getattr(model, "inputs", None)
    leaves = [leaf for leaf in tf.nest.flatten(x) if leaf is not None]  # which an optional input may be
    if isinstance(declared, list) and len(declared) == len(leaves) and all(map(tf.is_tensor, leaves)):
        if any(leaf.dtype == tf.string for leaf in leaves) and not any(one.dtype == "string" for one in declared):
            raise TypeError(
                f"`x` has string values, but the model takes numbers ({declared[0].dtype}). Convert them, or start the "
                f"model with `keras.layers.StringLookup` or `TextVectorization`."
            )
        if len(leaves) == 1 and leaves[0].shape.rank is not None:
            _fit(leaves[0].shape, tuple(declared[0].shape))
    try:
        yield
    except ValueError as error:  # of a model without declared inputs
        pattern = r"expected (?:min_)?ndim=(\d+), found ndim=(\d+)\. Full shape received: (\(.*?\))"
        found = re.search(pattern, str(error))
        if not found or int(found[1]) - int(found[2]) != 1 or found[3] != str(tuple(leaves[0].shape)):
            raise
        raise ValueError(
            f"`x` of shape {leaves[0].shape} has too few dimensions, since the model takes {found[1]}: batch the "
            f"dataset, as with `dataset.batch(32)`, or add the missing one, such as channels with `x[..., None]`."
        ) from None


def _fit(shape: tf.TensorShape, expected: tuple[int | None, ...]) -> None:
    fitting = tf.TensorShape([None, *expected[1:]])  # a batch may have any size
    # As in Keras, a last dimension of 1 may be missing, or be there in addition.
    same = [shape, shape.concatenate(1), *([shape[:-1]] if shape[-1:] == [1] else [])]
    if not any(map(fitting.is_compatible_with, same)):
        fix = "Reshape it, or build the model for it."
        if fitting.is_compatible_with([None, *shape]):
            fix = "It is a single example: batch the dataset, as with `dataset.batch(32)`."
        raise ValueError(f"`x` of shape {shape} does not fit the model, which takes {expected}. {fix}")


def targets(y: Any, loss: Any) -> None:
    """Requires targets that a loss can take."""
    name, leaves = loss if isinstance(loss, str) else getattr(loss, "name", ""), tf.nest.flatten(y)
    if y is None:
        raise ValueError(
            f"`loss` {name} needs targets, but the data has no y. Pass y, or let the dataset's elements be (x, y); a "
            f"model that adds its losses itself takes `loss=None`."
        )
    if all(getattr(leaf, "shape", None) == () for leaf in leaves):
        raise ValueError("`y` is a single number, not a batch: batch the dataset, as with `dataset.batch(32)`.")
    if any(getattr(leaf, "dtype", None) == tf.string for leaf in leaves):
        raise TypeError(f"`y` has string values, but `loss` {name} takes numbers. Number the classes from 0.")


@contextlib.contextmanager
def structures(y_pred: Any, **parts: Any) -> Iterator[None]:
    """Inside it, an error of Keras that parts do not match the model's outputs shows all structures."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        if not compat.is_structure_error(error):
            raise  # a loss or metric itself raised it
        found = {f"`{name}`": _summary(part) for name, part in parts.items() if part is not None}
        raise ValueError(
            f"{', '.join(found)} must have the structure of the model's outputs, {_summary(y_pred)}, with None for "
            f"outputs without; got {', '.join(f'{name} {part}' for name, part in found.items())}."
        ) from error


def _summary(structure: Any) -> str:
    """A structure with the shapes of tensors and the names of objects."""

    def summary(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, (str, float, int)):
            return leaf
        shape = tf.TensorShape(getattr(leaf, "shape", None))
        return getattr(leaf, "name", type(leaf).__name__) if shape.rank is None else tuple(shape)

    return str(keras.tree.map_structure(summary, structure))


def _number(what: str, value: Any, floating: bool = False) -> tf.Tensor:
    """`value` as a scalar tensor."""
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} must be a scalar tensor; got {type(value).__name__}.") from error
    is_number = tensor.dtype.is_floating or (not floating and (tensor.dtype.is_integer or tensor.dtype.is_bool))
    if tensor.shape.rank != 0 or not is_number:
        raise ValueError(
            f"{what} must be one {'floating ' if floating else ''}number; got shape {tensor.shape} and dtype "
            f"{tensor.dtype.name}. Reduce it first, such as with `tf.reduce_mean`"
            + ("." if floating else "; a metric of several classes, with `average='macro'`.")
        )
    return tensor


def step_logs(step: str, logs: Any) -> dict[str, Any]:
    """What a step returned, which must be a dict."""
    if not isinstance(logs, dict):
        raise TypeError(
            f"`{step}` must return a dict of this batch's scalars by name, such as {{'loss': loss}}; "
            f"it returned {type(logs).__name__}."
        )
    return logs


def unique(step: str, values: Iterable[tuple[Any, str]]) -> None:
    """Requires different names of a step's values, which are given with where they come from."""
    found: dict[Any, str] = {}
    for name, origin in values:
        if name in found:
            raise ValueError(f"`{step}` has two values named '{name}': {found[name]}, and {origin}. Rename one.")
        found[name] = origin


def scalar(source: str, name: Any, value: Any) -> tf.Tensor:
    """A value that a step returned or logged, as a tensor."""
    if not isinstance(name, str):
        raise TypeError(f"{source} a value under the name {name!r}: names must be strings.")
    return _number(f"{source} '{name}', which", value)


def loss(value: Any) -> tf.Tensor:
    """A loss as a tensor."""
    if value is None:
        raise ValueError("`loss` is None. Return it from `compute_loss`, or pass it to `minimize`.")
    return _number("`loss`", value, floating=True)


def images(name: str, value: Any) -> tf.Tensor:
    """A batch of images as a uint8 tensor."""
    tensor = tf.convert_to_tensor(value)
    if tensor.shape.rank != 4 or tensor.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"Images for '{name}' must have the shape (n, height, width, channels) with 1, 3 or 4 channels; got "
            f"{tensor.shape}."
        )
    return tensor if tensor.dtype == tf.uint8 else tf.image.convert_image_dtype(tensor, tf.uint8, saturate=True)


def outside_of_branches(method: str, name: str, graph: Any) -> None:
    """Requires that a step logs in its own graph: no tensor leaves the graph of a branch or a loop."""
    if tf.compat.v1.get_default_graph() is not graph:
        raise ValueError(
            f"`{method}` got {name!r} inside a tensor condition or loop (an `if`, `while` or `for` over tensors, or an "
            f"inner `tf.function`). Log it outside, in every step, such as with `tf.where(condition, value, 0.0)`."
        )


def variables(values: Any) -> list[Any]:
    """Variables as a list, which must be flat."""
    flat = list(values)
    for index, value in enumerate(flat):
        if isinstance(value, (list, tuple, dict)):
            raise ValueError(
                f"`variables` must be a flat list of variables; got {type(value).__name__} at index {index}. Join "
                f"lists, as in `[*a.trainable_variables, *b.trainable_variables]`."
            )
    return flat


def gradients(values: Sequence[Any], variables: Sequence[Any]) -> None:
    """Requires a gradient of at least one variable."""
    if all(value is None for value in values):
        raise ValueError(
            f"The loss depends on none of the {len(variables)} `variables` ({_paths(variables)}): no gradient. Compute "
            f"it inside the `tf.GradientTape` block, with TensorFlow or `keras.ops` alone, from the model's outputs."
        )


def new_variables(optimizer: Any, variables: Sequence[Any]) -> None:
    """Requires that an optimizer that is built was built with these variables."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    known = {id(variable) for variable in (compat.trained_by(inner) if inner.built else variables)}
    if new := [variable for variable in variables if id(variable) not in known]:
        raise ValueError(
            f"`optimizer` was built without {_paths(new)}, such as while a layer was frozen. To train them too, "
            f"give the trainer a new optimizer: `trainer.optimizer = keras.optimizers.{type(inner).__name__}(...)`."
        )


def _paths(variables: Sequence[Any]) -> str:
    return ", ".join(map(path_of, variables[:5])) + (", …" if len(variables) > 5 else "")


def row_mismatch(shape: Any, expected: Any) -> str:
    """Describes a model that returns another number of rows than its batch has."""
    return (
        f"the model returns {shape[0] if len(shape) else 'no'} rows for a batch of {expected}: a stateful model needs "
        f"batches of one size, such as with `drop_remainder=True`"
    )


def rows(examples: Any, outputs: Any) -> None:
    """Requires that a prediction has one row for each example, if their number is known."""
    for output in tf.nest.flatten(outputs) if examples is not None else ():
        if output.shape[:1] != (int(examples),):
            raise ValueError(f"`predict`: {row_mismatch(output.shape, int(examples))}.")
