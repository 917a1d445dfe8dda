"""Whether data, outputs and losses match: mistakes with which TensorFlow trains silently."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab import compat
from looplab.loop.guard import Guard

# Keras's loss functions by what they take as targets: labels, distributions over classes, or numbers from 0 to 1.
_LABELS = ("sparse_categorical_crossentropy",)
_ONE_HOT = ("categorical_crossentropy", "categorical_focal_crossentropy")
_BINARY = ("binary_crossentropy", "binary_focal_crossentropy")
_FRACTIONS = ("kl_divergence", "dice", "tversky")
_ERRORS = ("mean_squared_error", "mean_absolute_error")
# Those that compare a target with an output of its shape, number by number.
_POINTWISE = (
    *(*_ERRORS, *_BINARY, "mean_absolute_percentage_error", "mean_squared_logarithmic_error", "huber", "log_cosh"),
    *("poisson", "kl_divergence", "hinge", "squared_hinge", "categorical_hinge"),
)
_CROSS_ENTROPY_METRICS = (
    *(keras.metrics.BinaryCrossentropy, keras.metrics.CategoricalCrossentropy),
    keras.metrics.SparseCategoricalCrossentropy,
)
_SCALING = (
    *(keras.layers.Rescaling, keras.layers.Normalization, keras.layers.BatchNormalization),
    keras.layers.Lambda,  # may scale
    keras.layers.Embedding,  # its inputs are tokens
)
_SCALING_OPERATIONS = ("TrueDivide", "Divide", "Multiply", "Subtract")  # `inputs / 255` in a functional model
_PROBABILITIES = ("Softmax", "Sigmoid")
_LOGITS = ("BiasAdd", "MatMul", "BatchMatMulV2", "Conv2D", "Einsum")
_ROUNDING = 1e-5  # by how much soft targets may exceed 0 and 1


class Comparison:
    """A Keras loss with the target and the output that it compares.

    Args:
        loss: A `keras.Loss`.
        target, output: Tensors.
        path: The keys that lead to the target in y.
    """

    def __init__(self, loss: Any, target: tf.Tensor, output: tf.Tensor, path: tuple[Any, ...]):
        self._name, self._path, self._target, self._output = _name(loss), path, target.shape, output.shape
        self._y = "y" + "".join(f"[{key!r}]" for key in path)
        self._made_by = _made_by(output)
        is_cross_entropy = self._name in (*_LABELS, *_ONE_HOT, *_BINARY)
        self.takes_logits = is_cross_entropy and compat.takes_logits(loss)
        """Whether the loss is a cross-entropy of logits."""
        self._gets_logits = is_cross_entropy and not self.takes_logits and _are_logits(output)
        is_mean = loss.reduction in ("mean", "sum_over_batch_size", "mean_with_sample_weight")
        self.is_bounded = is_mean and self._name in _ERRORS and self._made_by in _PROBABILITIES
        """Whether the loss is at most 1 if the targets are in the range of the outputs, from 0 to 1."""
        # Targets are from 0 to `_most`; None if the loss takes any numbers, or if the number of classes is unknown.
        self._ignored = getattr(loss, "ignore_class", None)
        self._most: float | None = 1.0 if self._name in (*_ONE_HOT, *_BINARY, *_FRACTIONS) else None
        if self._name in _LABELS and self._output.rank and self._output[-1] is not None:
            self._most = self._output[-1] - 1

    def check_shapes(self) -> None:
        """Requires shapes that match: no labels for a loss of one-hot targets, or the reverse."""
        name, target, output = self._name, self._target, self._output
        if target.rank is None or not output.rank:
            return
        same_rank, classes = target.rank == output.rank, output[-1] if output[-1] != 1 else None
        found = f"got `{self._y}` of shape {target}, with outputs of shape {output}"
        longer = max(target, output, key=len)  # Keras squeezes a last dimension of 1
        is_squeezed = abs(target.rank - output.rank) == 1 and longer[-1] in (1, None)
        if name in _POINTWISE and not same_rank and not is_squeezed:
            raise ValueError(f"`loss` compares targets with outputs number by number; {found}. Give both one shape.")
        if name in _LABELS and same_rank and classes is not None and target[-1] == classes:
            raise ValueError(
                f"`loss` sparse_categorical_crossentropy takes labels, one whole number for each example; {found}: "
                f"they look one-hot. Pass `loss='categorical_crossentropy'`, or `y.argmax(-1)`."
            )
        if name in _ONE_HOT and (not same_rank or (target[-1] == 1 and classes is not None)):
            raise ValueError(
                f"`loss` categorical_crossentropy takes one-hot targets; {found}: they look like labels. "
                f"Pass `loss='sparse_categorical_crossentropy'`, or `keras.utils.to_categorical(y)`."
            )

    def checked(self, guard: Guard, target: tf.Tensor) -> tf.Tensor:
        """The target of a batch; values out of range are reported and become 0, since some devices would crash."""
        if self._most is None:
            return target
        wrong = self._out_of_range(target, self._most)
        guard.report(tf.reshape(tf.reduce_any(wrong), [1]), [self._range()])
        return tf.where(wrong, tf.zeros_like(target), target)

    def check_array(self, y: Any, name: str) -> None:
        """Requires that all targets are in the range; `name` is what errors call x."""
        if self._most is None:
            return
        for key in self._path:
            y = y[key]
        wrong = self._out_of_range(y, self._most).numpy()
        if wrong.any():
            first = tuple(int(index[0]) for index in np.nonzero(wrong))
            of = "" if name == "x" else f" of `{name}`"
            found = f"got {np.asarray(y)[first]}, at index {first[0]}{of}; {wrong.sum()} in all"
            raise ValueError(f"{self._range()}; {found}.")

    def _range(self) -> str:
        whole = f"whole numbers from 0 to {self._most}, the classes of the outputs"
        return f"`{self._y}` must be {whole if self._name in _LABELS else 'from 0 to 1'}"

    def _out_of_range(self, y: Any, most: float) -> tf.Tensor:
        """A bool for each target."""
        value = tf.cast(y, tf.float64)  # which holds any label
        slack = 0 if self._name in _LABELS else _ROUNDING
        wrong = ~((value >= -slack) & (value <= most + slack))  # NaN is wrong, too
        if self._name in _LABELS:
            wrong |= value != tf.floor(value)
        return wrong if self._ignored is None else wrong & (value != self._ignored)

    def doubts(self) -> Iterator[str]:
        """What looks wrong: shapes that broadcast, and outputs of another kind by the operation that computed them."""
        same_rank = self._target.rank is not None and self._target.rank == self._output.rank
        sizes = zip(self._target[1:], self._output[1:], strict=True) if same_rank else ()
        if self._name in _POINTWISE and any({1} < {*pair} for pair in sizes if None not in pair):
            yield (
                f"`{self._y}` has shape {self._target}, and the outputs have shape {self._output}: the loss compares "
                f"one number with several. Give both one shape."
            )
        if self.takes_logits and self._made_by in _PROBABILITIES:
            yield (
                f"`loss` has from_logits=True, but the model outputs probabilities (its last operation is "
                f"{self._made_by}): pass from_logits=False, or remove the {self._made_by.lower()} from the model."
            )
        if self._gets_logits:
            yield (
                f"`loss` expects probabilities, but the model outputs logits (its last operation is {self._made_by}): "
                f"pass from_logits=True, or end the model with a softmax or sigmoid."
            )


def target_kind(loss: Any) -> str:
    """What the `loss` of a trainer takes as targets: "labels", "one-hot" or "numbers"; "" if that is unknown."""
    if isinstance(loss, str):
        with contextlib.suppress(ValueError):  # "crossentropy" depends on the shapes
            loss = keras.losses.get(loss)
    kinds = {"labels": _LABELS, "one-hot": (*_ONE_HOT, *_FRACTIONS), "numbers": _BINARY}
    return next((kind for kind, names in kinds.items() if _name(loss) in names), "")


def expects_probabilities(metric: Any) -> bool:
    """Whether a Keras metric reads outputs as probabilities: it has thresholds between 0 and 1, or a logarithm."""
    if isinstance(metric, _CROSS_ENTROPY_METRICS):
        return not metric.from_logits
    if isinstance(metric, keras.metrics.AUC) and metric.get_config()["from_logits"]:
        return False
    thresholds = keras.tree.flatten([getattr(metric, name, None) for name in ("threshold", "thresholds")])
    return any(0 < float(value) < 1 for value in thresholds if value is not None)


def check_finite(name: str, values: Any) -> None:
    """Requires finite floating-point numbers in arrays."""
    for array in tf.nest.flatten(values):
        rows = np.asarray([] if isinstance(array, tf.RaggedTensor) else array)
        for first in range(0, len(rows) if np.issubdtype(rows.dtype, np.floating) else 0, 4096):  # to save memory
            finite = np.isfinite(rows[first : first + 4096])
            if not finite.all():
                row = first + int(np.nonzero(~finite)[0][0])
                raise ValueError(
                    f"`{name}` must be finite numbers; got NaN or infinity, first at index {row}. Remove or replace "
                    f"them; if the model expects them, pass a `tf.data.Dataset`, which is not checked."
                )


def raw_images(x: Any, model: Any) -> bool:
    """Whether x is images from 0 to 255, for a Keras model that does not scale them."""
    if not isinstance(x, np.ndarray) or x.ndim < 3 or not isinstance(model, keras.Model):
        return False
    shows_all = isinstance(model, keras.Sequential) or hasattr(model, "output_names")
    if x.dtype == np.uint8 and not shows_all:  # a subclassed model must convert these, and may scale them then
        return False
    if not (x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)) or _scales(model):
        return False
    some = x[:64]
    return bool(some.min() >= 0 and 128 < some.max() <= 255 and (some == np.floor(some)).all())


def _scales(model: keras.Model) -> bool:
    operations = (part for layer in compat.all_layers(model) for part in getattr(layer, "operations", [layer]))
    return any(isinstance(part, _SCALING) or type(part).__name__ in _SCALING_OPERATIONS for part in operations)


def _name(loss: Any) -> str:
    """The name of the Keras function that a loss is or wraps; "" for any other loss."""
    function = getattr(loss, "fn", loss)
    name = getattr(function, "__name__", "")
    return name if getattr(keras.losses, name, None) is function else ""


def _origin(tensor: Any) -> Any:
    """The operation that computed a tensor's values; None in eager mode."""
    operation = getattr(tensor, "op", None)
    while operation is not None and operation.type in ("Identity", "Cast", "Reshape", "Squeeze", "StopGradient"):
        operation = operation.inputs[0].op
    return operation


def _made_by(tensor: Any) -> str:
    return getattr(_origin(tensor), "type", "")


def _are_logits(output: tf.Tensor) -> bool:
    """Whether a layer without an activation computed a tensor: it is a product, or a sum with a bias.

    Other sums say nothing: the mean of two softmaxes is one, too.
    """
    if _made_by(output) in ("AddV2", "Add"):
        return any(_made_by(operand) == "ReadVariableOp" for operand in _origin(output).inputs)
    return _made_by(output) in _LOGITS
