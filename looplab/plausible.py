"""Whether data, outputs and loss go together: what TensorFlow would train on without a word."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from looplab.guard import Guard
from looplab.hooks import Hooks

_thread = threading.local()  # .inspect: what looks at the losses that are computed in this thread

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
_CROSS_ENTROPY_METRICS = (
    *(keras.metrics.BinaryCrossentropy, keras.metrics.CategoricalCrossentropy),
    keras.metrics.SparseCategoricalCrossentropy,
)

_POINTWISE = {
    *("mean_squared_error", "mean_absolute_error", "mean_absolute_percentage_error", "mean_squared_logarithmic_error"),
    *("huber", "log_cosh", "poisson", "kl_divergence", "hinge", "squared_hinge", "categorical_hinge"),
    *("binary_crossentropy", "binary_focal_crossentropy"),
}


Inspect = Callable[[Any, Any, Any, Any], tuple[Any, Any]]
"""From a loss, target, output and weight to the target and weight that the loss gets."""


def _calling(call: Callable[..., Any], loss: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
    inspect: Inspect | None = getattr(_thread, "inspect", None)
    if inspect is not None:
        y_true, sample_weight = inspect(loss, y_true, y_pred, sample_weight)
    return call(loss, y_true, y_pred, sample_weight)


listening = Hooks(keras.Loss, {"__call__": _calling})
"""Within it, losses can be inspected; Keras decides which target, output and weight belong to a loss."""


@contextlib.contextmanager
def inspected(inspect: Inspect) -> Iterator[None]:
    """Within it, each call of a Keras loss in this thread passes through `inspect`."""
    _thread.inspect = inspect
    try:
        yield
    finally:
        _thread.inspect = None


def values_shape(loss: Any, target: Any, output: Any) -> tf.TensorShape:
    """The shape of a loss's values before they are reduced; unknown where `loss` does not say it alone."""
    try:
        if tf.executing_eagerly():
            return tf.convert_to_tensor(loss.call(target, output)).shape
        specs = [tf.TensorSpec(part.shape, loss.dtype) for part in (target, output)]
        return tf.function(loss.call).get_concrete_function(*specs).output_shapes
    except Exception:  # whatever it is, the call itself raises it
        return tf.TensorShape(None)


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


def wanted(loss: Any, target: Any, output: Any, path: tuple[Any, ...]) -> Range | None:
    """The range of the targets of a cross-entropy, or of another loss of targets from 0 to 1; None of other losses.

    Args:
        loss: A function or a `keras.Loss`.
        target, output: What it compares.
        path: The keys that lead to the target within y.

    Raises:
        ValueError: One-hot targets came to a loss of labels, or the reverse; or targets that have not the shape of the
            outputs, to a loss that compares both number by number.
    """
    if not (isinstance(target, tf.Tensor) and isinstance(output, tf.Tensor)):
        return None
    if output.shape.rank is None or target.shape.rank is None:
        return None
    kind, _ = _kind(loss)
    name = _named(path)
    classes, of_one_shape = output.shape[-1], target.shape.rank == output.shape.rank
    told = f"`{name}` of shape {target.shape} came, with outputs of shape {output.shape}"
    if _is_pointwise(loss) and not of_one_shape:
        longer = max(target.shape, output.shape, key=len)
        if abs(target.shape.rank - output.shape.rank) > 1 or longer[-1] not in (1, None):  # Keras leaves out a 1
            raise ValueError(f"`loss` compares targets with outputs number by number; {told}. Give both one shape.")
    if kind is None:
        return None
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
    if kind == "sparse":
        is_known = classes is not None
        return Range(name, path, classes - 1, True, getattr(loss, "ignore_class", None)) if is_known else None
    return Range(name, path, 1.0, False, None)


def target_kind(loss: Any) -> str | None:
    """What a loss takes as targets: "sparse", "categorical" or "elementwise"; None where that is not known."""
    kind, _ = _kind(loss)
    if kind == "sparse":
        return "sparse"
    if kind == "binary":
        return "elementwise"
    return "categorical" if kind in ("categorical", "part") else None


def fitted(guard: Guard, wanted: Range, target: tf.Tensor) -> tf.Tensor:
    """The target with what is out of range set to 0, and reported: some devices would stop there, others get NaN."""
    wrong = _out_of_range(wanted, target, tf)
    guard.report(tf.reshape(tf.reduce_any(wrong), [1]), [f"{wanted}"])
    return tf.where(wrong, tf.zeros_like(target), target)


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


def doubts(loss: Any, target: Any, output: Any, path: tuple[Any, ...]) -> Iterator[str]:
    """What outputs do not seem to be, by the operation that made them: nothing where that says nothing."""
    if not (isinstance(target, tf.Tensor) and isinstance(output, tf.Tensor)):
        return
    kind, from_logits = _kind(loss)
    if _is_pointwise(loss) and _is_repeated(target.shape, output.shape):
        yield (
            f"`{_named(path)}` of shape {target.shape} came, with outputs of shape {output.shape}: the loss "
            f"takes one number for several. Give both one shape."
        )
    if kind not in _CROSS_ENTROPIES:
        return
    made_by = _made_by(output)
    if from_logits and made_by in _PROBABILITIES:
        yield (
            f"`loss` has from_logits=True, and the outputs are probabilities (by {made_by}): pass "
            f"from_logits=False, or take the {made_by.lower()} out of the model."
        )
    if not from_logits and _are_logits(output):
        yield (
            f"`loss` expects probabilities, but the model outputs logits (its last operation is {made_by}): pass "
            f"from_logits=True, or end the model with a softmax or sigmoid."
        )


def takes_logits(loss: Any) -> bool:
    """Whether it is a cross-entropy of Keras's that takes logits."""
    kind, from_logits = _kind(loss)
    return kind in _CROSS_ENTROPIES and from_logits


def expects_probabilities(metric: Any) -> bool:
    """Whether a metric of Keras's reads outputs as probabilities, by a threshold between 0 and 1 or a logarithm."""
    if isinstance(metric, _CROSS_ENTROPY_METRICS):
        return not metric.from_logits
    if isinstance(metric, keras.metrics.AUC) and metric.get_config()["from_logits"]:
        return False
    thresholds = [getattr(metric, name, None) for name in ("threshold", "thresholds")]
    return any(0 < float(value) < 1 for value in np.ravel([t for t in keras.tree.flatten(thresholds) if t is not None]))


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
