"""Whether data, outputs and loss go together: what TensorFlow would train on without a word."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from looplab.guard import Guard
from looplab.pairs import pairs

_SCALING = (
    *(keras.layers.Rescaling, keras.layers.Normalization, keras.layers.BatchNormalization),
    keras.layers.Lambda,  # may scale
    keras.layers.Embedding,  # x are tokens
)
_SCALING_OPERATIONS = ("TrueDivide", "Divide", "Multiply", "Subtract")  # as `inputs / 255` in a functional model
_PROBABILITIES = ("Softmax", "Sigmoid")
_LOGITS = ("BiasAdd", "MatMul", "BatchMatMulV2", "Conv2D", "Einsum")
_ADDITIONS = ("AddV2", "Add")
_ROUNDING = 1e-5  # by how much targets may go beyond 0 and 1
_KINDS = {
    "sparse_categorical_crossentropy": "sparse",
    "categorical_crossentropy": "categorical",
    "categorical_focal_crossentropy": "categorical",
    "binary_crossentropy": "binary",
    "binary_focal_crossentropy": "binary",
    "kl_divergence": "part",
    "dice": "part",
    "tversky": "part",
}
_CROSS_ENTROPIES = ("sparse", "categorical", "binary")

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


def ranges(loss: Any, y: Any, y_pred: Any, names: Sequence[str] | None = None) -> Iterator[Range]:
    """The range of each target of a cross-entropy, or of another loss of targets from 0 to 1.

    Args:
        loss: As it was given to the trainer.
        y: The targets.
        y_pred: The outputs.
        names: Those of the model's outputs, where it has names for them.

    Raises:
        ValueError: One-hot targets came to a loss of labels, or the reverse; or targets that have not the shape of the
            outputs, to a loss that compares both number by number.
    """
    for path, function, target, output in pairs(loss, y, y_pred, names):
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
        filled = copy.copy(y)  # of its type, as Keras sorts the keys of a dict, and not those of an OrderedDict
        filled[key] = inner
        return filled
    parts = [inner if index == key else part for index, part in enumerate(y)]
    return type(y)(*parts) if hasattr(y, "_fields") else type(y)(parts)  # a namedtuple takes them one by one


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


def doubts(loss: Any, y: Any, y_pred: Any, names: Sequence[str] | None = None) -> Iterator[str]:
    """What outputs do not seem to be, by the operation that made them: nothing where that tells nothing."""
    for path, function, target, output in pairs(loss, y, y_pred, names):
        kind, from_logits = _kind(function)
        if _is_pointwise(function) and _is_repeated(target.shape, output.shape):
            yield (
                f"`{_named(path)}` of shape {target.shape} came, with outputs of shape {output.shape}: the loss "
                f"takes one number for several. Give both one shape."
            )
        if kind not in _CROSS_ENTROPIES:
            continue
        made_by = _made_by(output)
        if from_logits and made_by in _PROBABILITIES:
            yield (
                f"`loss` has from_logits=True, and the outputs are probabilities (by {made_by}): pass "
                f"from_logits=False, or take the {made_by.lower()} out of the model."
            )
        if not from_logits and _are_logits(output):
            yield (
                f"`loss` takes probabilities, and the outputs are none (by {made_by}): pass from_logits=True, or let "
                f"the model end with a softmax or sigmoid."
            )


def _named(path: tuple[Any, ...]) -> str:
    """What an error calls the targets that these keys lead to."""
    return "y" + "".join(f"[{key!r}]" for key in path)


def bounded(loss: Any, y_pred: Any) -> bool:
    """Whether the mean error of outputs and targets from 0 to 1 is asked for, which is 1 at most."""
    losses, outputs = keras.tree.flatten(loss), keras.tree.flatten(y_pred)
    if len(losses) != 1 or len(outputs) != 1:
        return False
    is_mean = getattr(losses[0], "reduction", "mean") in ("mean", "sum_over_batch_size", "mean_with_sample_weight")
    is_error = _name(losses[0]) in ("mean_squared_error", "mean_absolute_error")
    return is_mean and is_error and isinstance(outputs[0], tf.Tensor) and _made_by(outputs[0]) in _PROBABILITIES


def raw_images(x: Any, model: Any) -> bool:
    """Whether images from 0 to 255 came to a Keras model that has nothing which scales."""
    if not isinstance(x, np.ndarray) or x.ndim < 3 or not isinstance(model, keras.Model):
        return False
    if x.dtype == np.uint8:  # a subclassed model must convert these, and may well scale there
        may_be_raw = isinstance(model, keras.Sequential) or hasattr(model, "output_names")
    else:
        may_be_raw = np.issubdtype(x.dtype, np.floating)
    if not may_be_raw or _scales(model):
        return False
    some = x[:64]
    return bool(some.min() >= 0 and 128 < some.max() <= 255 and (some == np.floor(some)).all())


def _scales(model: keras.Model) -> bool:
    """Whether a model has a layer or an operation that scales, or whose inputs are none to scale."""
    for layer in model._flatten_layers():
        for operation in getattr(layer, "operations", [layer]):
            is_layer = isinstance(operation, keras.Layer)
            if isinstance(operation, _SCALING) if is_layer else type(operation).__name__ in _SCALING_OPERATIONS:
                return True
    return False


def _made_by(output: Any) -> str:
    """The type of the operation that made a tensor, "" where it was not made in a graph."""
    return getattr(_origin(output), "type", "")


def _origin(tensor: Any) -> Any:
    """The operation that made a tensor's values, None where they were not made in a graph."""
    try:
        operation = tensor.op
    except AttributeError:
        return None
    while operation.type in ("Identity", "Cast", "Reshape", "Squeeze", "StopGradient"):
        operation = operation.inputs[0].op
    return operation


def _are_logits(output: Any) -> bool:
    """Whether a tensor is what a layer without an activation makes: a product, or a sum with a bias.

    Other sums tell nothing: the mean of two softmaxes is made by one, too.
    """
    operation = _origin(output)
    if operation is not None and operation.type in _ADDITIONS:
        return any(_made_by(operand) == "ReadVariableOp" for operand in operation.inputs)
    return _made_by(output) in _LOGITS


def _is_repeated(target: tf.TensorShape, output: tf.TensorShape) -> bool:
    """Whether one of these shapes would be repeated to meet the other."""
    if target.rank is None or target.rank != output.rank:
        return False
    return any({1} < {*pair} for pair in zip(target[1:], output[1:], strict=True) if None not in pair)


def _is_pointwise(loss: Any) -> bool:
    """Whether it is a loss of Keras's that compares a target with an output of its shape."""
    return _name(loss) in _POINTWISE


def _kind(loss: Any) -> tuple[str | None, bool]:
    """Which kind of loss of targets from a range it is, if any, and whether it takes logits."""
    return _KINDS.get(_name(loss)), bool(getattr(loss, "_fn_kwargs", {}).get("from_logits", False))


def _name(loss: Any) -> str:
    """The name of the function of Keras's that a loss is, "" where it is none."""
    if isinstance(loss, str):
        if loss.lower() in ("crossentropy", "ce"):  # which is chosen by the shapes, and `get` does not know it
            return ""
        loss = keras.losses.get(loss)
    function = getattr(loss, "fn", loss)
    name = getattr(function, "__name__", "")
    return name if getattr(keras.losses, name, None) is function else ""


def _out_of_range(wanted: Range, y: Any, library: Any) -> Any:
    """A bool for each target, by TensorFlow or NumPy; float64 holds any label."""
    value = tf.cast(y, tf.float64) if library is tf else np.asarray(y, np.float64)
    beyond = 0 if wanted.whole else _ROUNDING  # soft targets may be 1.0000001
    wrong = ~((value >= -beyond) & (value <= wanted.most + beyond))  # so that NaN is wrong, too
    if wanted.whole:
        wrong |= value != library.floor(value)
    return wrong if wanted.ignored is None else wrong & (value != wanted.ignored)
