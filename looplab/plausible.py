"""Whether data, outputs and loss go together: what TensorFlow would train on without a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from looplab.guard import Guard

_SCALING = (keras.layers.Rescaling, keras.layers.Normalization, keras.layers.BatchNormalization)
_PROBABILITIES = ("Softmax", "Sigmoid")
_LOGITS = ("BiasAdd", "MatMul", "BatchMatMulV2", "AddV2", "Add", "Conv2D", "Einsum")
_KINDS = {
    "sparse_categorical_crossentropy": "sparse",
    "categorical_crossentropy": "categorical",
    "categorical_focal_crossentropy": "categorical",
    "binary_crossentropy": "binary",
    "binary_focal_crossentropy": "binary",
}
_POINTWISE = {
    *("mean_squared_error", "mean_absolute_error", "mean_absolute_percentage_error", "mean_squared_logarithmic_error"),
    *("huber", "log_cosh", "poisson", "kl_divergence", "hinge", "squared_hinge", "categorical_hinge"),
    *("binary_crossentropy", "binary_focal_crossentropy"),
}


class Range(NamedTuple):
    """Which targets a loss can take."""

    name: str
    """What an error calls them, such as "y" or "y['digit']"."""
    path: tuple[Any, ...]
    """The keys that lead to them within y."""
    most: float
    """They are from 0 to this."""
    whole: bool
    """Whether they are classes, which are whole numbers."""
    ignored: int | None
    """A class that is not counted."""

    def __str__(self) -> str:
        kind = f"whole numbers from 0 to {self.most:.0f}, the classes of the outputs" if self.whole else "from 0 to 1"
        return f"`{self.name}` must be {kind}"


def ranges(loss: Any, y: Any, y_pred: Any) -> Iterator[Range]:
    """The range of each target of a cross-entropy.

    Raises:
        ValueError: One-hot targets came to a loss of labels, or the reverse; or targets that have not the shape of the
            outputs, to a loss that compares both number by number.
    """
    for path, function, target, output in _pairs(loss, y, y_pred, ()):
        kind, _ = _kind(function)
        if output.shape.rank is None or target.shape.rank is None:
            continue
        name = _named(path)
        classes, of_one_shape = output.shape[-1], target.shape.rank == output.shape.rank
        told = f"`{name}` of shape {target.shape} came, with outputs of shape {output.shape}"
        if _is_pointwise(function) and not of_one_shape:
            longer = max(target.shape, output.shape, key=len)
            if abs(target.shape.rank - output.shape.rank) > 1 or longer[-1] not in (1, None):  # Keras leaves out a 1
                raise ValueError(f"`loss` compares targets with outputs number by number; {told}. Give both one shape.")
        if kind is None:
            continue
        if kind == "sparse" and of_one_shape and classes not in (None, 1) and target.shape[-1] == classes:
            raise ValueError(
                f"`loss` sparse_categorical_crossentropy takes labels, one whole number for each example; {told}: "
                f"they look one-hot. Pass `loss='categorical_crossentropy'`, or `y.argmax(-1)`."
            )
        is_label = not of_one_shape or (target.shape[-1] == 1 and classes not in (None, 1))
        if kind == "categorical" and is_label:
            raise ValueError(
                f"`loss` categorical_crossentropy takes one-hot targets; {told}: they look like labels. "
                f"Pass `loss='sparse_categorical_crossentropy'`, or `keras.utils.to_categorical(y)`."
            )
        if kind == "sparse" and classes is not None:
            yield Range(name, path, classes - 1, True, getattr(function, "ignore_class", None))
        elif kind != "sparse":
            yield Range(name, path, 1.0, False, None)


def fitted(guard: Guard, wanted: Range, y: Any) -> Any:
    """Y with what is out of range set to 0, and reported: some devices would stop there, others compute NaN."""
    if not wanted.path:
        wrong = _out_of_range(wanted, y, tf)
        guard.report(tf.reshape(tf.reduce_any(wrong), [1]), [f"{wanted}"])
        return tf.where(wrong, tf.zeros_like(y), y)
    key, *rest = wanted.path
    inner = fitted(guard, wanted._replace(path=tuple(rest)), y[key])
    if isinstance(y, dict):
        return {**y, key: inner}
    return type(y)(inner if index == key else part for index, part in enumerate(y))


def check_array(wanted: Range, y: Any, of: str) -> None:
    """The same for all targets at once.

    Raises:
        ValueError: One is out of range.
    """
    for key in wanted.path:
        y = y[key]
    values = np.asarray(y)
    wrong = _out_of_range(wanted, values, np)
    if wrong.any():
        first = tuple(int(index[0]) for index in np.nonzero(wrong))
        raise ValueError(f"{wanted}; {values[first]} came, at index {first[0]}{_of(of)}; {wrong.sum()} in all.")


def check_finite(name: str, values: Any) -> None:
    """Floating numbers in arrays are finite.

    Raises:
        ValueError: One is not.
    """
    for array in tf.nest.flatten(values):
        if not isinstance(array, tf.RaggedTensor):
            _check_finite(name, np.asarray(array))


def _check_finite(name: str, values: np.ndarray) -> None:
    if not np.issubdtype(values.dtype, np.floating):
        return
    for first in range(0, len(values), 4096):  # a part at a time, for the sake of memory
        finite = np.isfinite(values[first : first + 4096])
        if not finite.all():
            row = first + int(np.nonzero(~finite)[0][0])
            raise ValueError(
                f"`{name}` must be finite numbers; NaN or infinity came, first at index {row}. Remove or "
                f"replace them; a model that is made for them takes a `tf.data.Dataset`, which is not searched."
            )


def _of(name: str) -> str:
    return "" if name == "x" else f" of `{name}`"


def doubts(loss: Any, y: Any, y_pred: Any) -> Iterator[str]:
    """What outputs do not seem to be, by the operation that made them: nothing where that tells nothing."""
    for path, function, target, output in _pairs(loss, y, y_pred, ()):
        kind, from_logits = _kind(function)
        if _is_pointwise(function) and _is_repeated(target.shape, output.shape):
            yield (
                f"`{_named(path)}` of shape {target.shape} came, with outputs of shape {output.shape}: the loss "
                f"takes one number for several. Give both one shape."
            )
        made_by = _made_by(output)
        if kind is not None and from_logits and made_by in _PROBABILITIES:
            yield (
                f"`loss` has from_logits=True, and the outputs are probabilities (by {made_by}): pass "
                f"from_logits=False, or take the {made_by.lower()} out of the model."
            )
        if kind is not None and not from_logits and made_by in _LOGITS:
            yield (
                f"`loss` takes probabilities, and the outputs are none (by {made_by}): pass from_logits=True, or let "
                f"the model end with a softmax or sigmoid."
            )


def _named(path: tuple[Any, ...]) -> str:
    """What an error calls the targets that these keys lead to."""
    return "y" + "".join(f"[{key!r}]" for key in path)


def bounded(loss: Any, y_pred: Any) -> bool:
    """Whether the mean error of outputs and targets from 0 to 1 is asked for, which is 1 at most."""
    function = getattr(keras.losses.get(loss) if isinstance(loss, str) else loss, "fn", loss)
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    is_mean = name in ("mse", "mae", "mean_squared_error", "mean_absolute_error")
    return is_mean and isinstance(y_pred, tf.Tensor) and _made_by(y_pred) in _PROBABILITIES


def raw_images(x: Any, model: Any) -> bool:
    """Whether floating images from 0 to 255 came to a Keras model that has no layer which scales."""
    if not isinstance(x, np.ndarray) or x.ndim < 3 or not np.issubdtype(x.dtype, np.floating):
        return False
    if not isinstance(model, keras.Model) or any(isinstance(layer, _SCALING) for layer in model._flatten_layers()):
        return False
    some = x[:64]
    return bool(some.min() >= 0 and 128 < some.max() <= 255 and (some == np.floor(some)).all())


def _made_by(output: Any) -> str:
    """The type of the operation that made a tensor, "" where it was not made in a graph."""
    try:
        operation = output.op
    except AttributeError:
        return ""
    while operation.type in ("Identity", "Cast", "Reshape", "Squeeze", "StopGradient"):
        operation = operation.inputs[0].op
    return operation.type


def _pairs(loss: Any, y: Any, y_pred: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any, Any, Any]]:
    """(keys that lead to it, loss, target, output) of each output that has a loss and a target."""
    if isinstance(y_pred, dict):
        keys: Any = list(y_pred)
    elif isinstance(y_pred, (list, tuple)):
        keys = range(len(y_pred))
    else:
        if isinstance(y_pred, tf.Tensor) and isinstance(y, tf.Tensor) and loss is not None:
            yield path, loss, y, y_pred
        return
    for key in keys:
        try:
            inner = loss[key] if isinstance(loss, (dict, list, tuple)) else loss
            yield from _pairs(inner, y[key], y_pred[key], (*path, key))
        except (KeyError, IndexError, TypeError):  # Keras finds it by another way, or tells what does not fit
            continue


def _is_repeated(target: tf.TensorShape, output: tf.TensorShape) -> bool:
    """Whether one of these shapes would be repeated to meet the other."""
    if target.rank is None or target.rank != output.rank:
        return False
    return any({1} < {*pair} for pair in zip(target[1:], output[1:], strict=True) if None not in pair)


def _is_pointwise(loss: Any) -> bool:
    """Whether it is a loss of Keras's that compares a target with an output of its shape."""
    loss = keras.losses.get(loss) if isinstance(loss, str) else loss
    function = getattr(loss, "fn", loss)
    name = getattr(function, "__name__", "")
    return name in _POINTWISE and getattr(keras.losses, name, None) is function


def _kind(loss: Any) -> tuple[str | None, bool]:
    """Which cross-entropy it is, if any, and whether it takes logits."""
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    function = getattr(loss, "fn", loss)
    is_keras = getattr(keras.losses, getattr(function, "__name__", ""), None) is function
    options = getattr(loss, "_fn_kwargs", {})
    return (_KINDS.get(function.__name__) if is_keras else None), bool(options.get("from_logits", False))


def _out_of_range(wanted: Range, y: Any, library: Any) -> Any:
    """A bool for each target, by TensorFlow or NumPy; float64 holds any label."""
    value = tf.cast(y, tf.float64) if library is tf else np.asarray(y, np.float64)
    wrong = ~((value >= 0) & (value <= wanted.most))  # so that NaN is wrong, too
    if wanted.whole:
        wrong |= value != library.floor(value)
    return wrong if wanted.ignored is None else wrong & (value != wanted.ignored)
