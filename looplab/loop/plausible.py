"""Whether data, outputs and losses match: mistakes with which TensorFlow trains silently."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab import compat
from looplab.loop.guard import Guard

# Keras's loss functions by what they take as targets. All but the first two compare a target with an output of its
# shape, number by number.
_LOSSES = {
    "labels": ("sparse_categorical_crossentropy",),
    "one-hot": ("categorical_crossentropy", "categorical_focal_crossentropy"),
    "bits": ("binary_crossentropy", "binary_focal_crossentropy"),
    "fractions": ("kl_divergence", "dice", "tversky"),
    "errors": ("mean_squared_error", "mean_absolute_error"),
    "numbers": (
        *("mean_absolute_percentage_error", "mean_squared_logarithmic_error", "huber", "log_cosh"),
        *("poisson", "hinge", "squared_hinge", "categorical_hinge"),
    ),
}
_SCALING = (
    *(keras.layers.Rescaling, keras.layers.Normalization, keras.layers.BatchNormalization),
    keras.layers.Lambda,  # may scale
    keras.layers.Embedding,  # its inputs are tokens
)
_SCALING_OPERATIONS = ("TrueDivide", "Divide", "Multiply", "Subtract")  # `inputs / 255` in a functional model
_ROUNDING = 1e-5  # by how much soft targets may exceed 0 and 1


class Comparison:
    """A Keras loss with the target and the output that it compares.

    Args:
        loss: A `keras.Loss`.
        target, output: Tensors.
        path: The keys that lead to the target in y.
    """

    def __init__(self, loss: Any, target: tf.Tensor, output: tf.Tensor, path: tuple[Any, ...]):
        self._takes, self._target, self._output = targets_of(loss), target.shape, output.shape
        self._path, self._y = path, "y" + "".join(f"[{key!r}]" for key in path)
        self._ignored = getattr(loss, "ignore_class", None)
        operation = _origin(output)
        self._operation, self._outputs = getattr(operation, "type", ""), _meaning(operation)
        self._from_logits = compat.takes_logits(loss)
        is_mean = loss.reduction in ("mean", "sum_over_batch_size", "mean_with_sample_weight")
        self.is_bounded = is_mean and self._takes == "errors" and self._outputs == "probabilities"
        """Whether the loss is at most 1 if the targets are in the range of the outputs, from 0 to 1."""
        self.has_logits = self._from_logits and self._outputs != "probabilities"
        """Whether the outputs are logits, as far as the loss shows it."""
        # Targets are from 0 to `_most`; None if the loss takes any numbers, or if the number of classes is unknown.
        self._most: float | None = 1.0 if self._takes in ("one-hot", "bits", "fractions") else None
        if self._takes == "labels" and self._output.rank and self._output[-1] is not None:
            self._most = self._output[-1] - 1

    def check(self) -> list[str]:
        """What looks wrong but may be intended.

        Raises:
            ValueError: The shapes do not match, such as those of labels for a loss of one-hot targets.
        """
        doubts, (target, output) = [], (self._target, self._output)
        if target.rank is not None and output.rank:
            found = f"got `{self._y}` of shape {target}, with outputs of shape {output}"
            same_rank, classes = target.rank == output.rank, output[-1] if output[-1] != 1 else None
            if self._takes == "labels" and same_rank and classes and target[-1] == classes:
                raise ValueError(
                    f"`loss` sparse_categorical_crossentropy takes labels, one whole number for each example; {found}: "
                    f"they look one-hot. Pass `loss='categorical_crossentropy'`, or `y.argmax(-1)`."
                )
            if self._takes == "one-hot" and (not same_rank or (classes and target[-1] == 1)):
                raise ValueError(
                    f"`loss` categorical_crossentropy takes one-hot targets; {found}: they look like labels. "
                    f"Pass `loss='sparse_categorical_crossentropy'`, or `keras.utils.to_categorical(y)`."
                )
            if self._takes not in ("labels", "one-hot", ""):
                message = f"`loss` compares targets with outputs number by number; {found}. Give both one shape."
                longer = max(target, output, key=len)  # Keras squeezes a last dimension of 1
                if not same_rank and not (abs(target.rank - output.rank) == 1 and longer[-1] in (1, None)):
                    raise ValueError(message)
                sizes = zip(target[1:], output[1:], strict=True) if same_rank else ()
                if any({1} < {*pair} for pair in sizes if None not in pair):  # they broadcast
                    doubts.append(message)
        if self._from_logits and self._outputs == "probabilities":
            doubts.append(
                f"`loss` has from_logits=True, but the model outputs probabilities (its last operation is "
                f"{self._operation}): pass from_logits=False, or remove the {self._operation.lower()} from the model."
            )
        if self._takes in ("labels", "one-hot", "bits") and not self._from_logits and self._outputs == "logits":
            doubts.append(
                f"`loss` expects probabilities, but the model outputs logits (its last operation is "
                f"{self._operation}): pass from_logits=True, or end the model with a softmax or sigmoid."
            )
        return doubts

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
            first = tuple(np.argwhere(wrong)[0])
            of = "" if name == "x" else f" of `{name}`"
            found = f"got {np.asarray(y)[first]}, at index {first[0]}{of}; {wrong.sum()} in all"
            raise ValueError(f"{self._range()}; {found}.")

    def _range(self) -> str:
        whole = f"whole numbers from 0 to {self._most}, the classes of the outputs"
        return f"`{self._y}` must be {whole if self._takes == 'labels' else 'from 0 to 1'}"

    def _out_of_range(self, y: Any, most: float) -> tf.Tensor:
        """A bool for each target."""
        value = tf.cast(y, tf.float64)  # which holds any label
        slack = 0 if self._takes == "labels" else _ROUNDING
        wrong = ~((value >= -slack) & (value <= most + slack))  # NaN is wrong, too
        if self._takes == "labels":
            wrong |= value != tf.floor(value)
        return wrong if self._ignored is None else wrong & (value != self._ignored)


def targets_of(loss: Any) -> str:
    """What a loss takes as targets: "labels", "one-hot", "bits", "fractions", "errors" or "numbers"; "" if unknown."""
    if isinstance(loss, str):
        with contextlib.suppress(ValueError):  # "crossentropy" depends on the shapes
            loss = keras.losses.get(loss)
    function = getattr(loss, "fn", loss)
    name = getattr(function, "__name__", "")
    is_of_keras = getattr(keras.losses, name, None) is function
    return next((targets for targets, names in _LOSSES.items() if is_of_keras and name in names), "")


def expects_probabilities(metric: Any) -> bool:
    """Whether a Keras metric reads outputs as probabilities: it has thresholds between 0 and 1, or a logarithm."""
    from_logits = getattr(metric, "from_logits", None)
    if isinstance(metric, keras.metrics.AUC):
        from_logits = metric.get_config()["from_logits"]
    if from_logits is not None:
        return not from_logits
    thresholds = keras.tree.flatten([getattr(metric, name, None) for name in ("threshold", "thresholds")])
    return any(0 < float(value) < 1 for value in thresholds if value is not None)


def check_finite(name: str, values: Any) -> None:
    """Requires finite floating-point numbers in arrays."""
    for array in tf.nest.flatten(values):
        numbers = np.asarray([] if isinstance(array, tf.RaggedTensor) else array)
        if not numbers.size or not np.issubdtype(numbers.dtype, np.floating):
            continue
        if not np.isfinite([numbers.min(), numbers.max()]).all():  # both are NaN if there is one
            row = np.argwhere(~np.isfinite(numbers))[0][0]
            raise ValueError(
                f"`{name}` must be finite numbers; got NaN or infinity, first at index {row}. Remove or replace them; "
                f"if the model expects them, pass a `tf.data.Dataset`, which is not checked."
            )


def raw_images(x: Any, model: Any) -> bool:
    """Whether x is images from 0 to 255, for a Keras model that does not scale them."""
    if not isinstance(x, np.ndarray) or x.ndim < 3 or not isinstance(model, keras.Model):
        return False
    shows_all = isinstance(model, keras.Sequential) or hasattr(model, "output_names")
    if x.dtype == np.uint8 and not shows_all:  # a subclassed model must convert these, and may scale them then
        return False
    operations = (part for layer in compat.all_layers(model) for part in getattr(layer, "operations", [layer]))
    if any(isinstance(part, _SCALING) or type(part).__name__ in _SCALING_OPERATIONS for part in operations):
        return False
    some = x[:64]
    is_image = x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)
    return bool(is_image and some.min() >= 0 and 128 < some.max() <= 255 and (some == np.floor(some)).all())


def _origin(tensor: Any) -> Any:
    """The operation that computed a tensor's values; None in eager mode."""
    operation = getattr(tensor, "op", None)
    while operation is not None and operation.type in ("Identity", "Cast", "Reshape", "Squeeze", "StopGradient"):
        operation = operation.inputs[0].op
    return operation


def _meaning(operation: Any) -> str:
    """Whether an operation computes "probabilities", "logits", or numbers of unknown meaning ("")."""
    kind = getattr(operation, "type", "")
    if kind in ("AddV2", "Add"):  # with a bias: other sums may be of probabilities, such as the mean of two softmaxes
        operands = [getattr(_origin(operand), "type", "") for operand in operation.inputs]
        return "logits" if "ReadVariableOp" in operands else ""
    if kind in ("BiasAdd", "MatMul", "BatchMatMulV2", "Conv2D", "Einsum"):
        return "logits"
    return "probabilities" if kind in ("Softmax", "Sigmoid") else ""
