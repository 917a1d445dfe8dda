"""Updates of variables by TensorFlow's fused kernels, instead of a dozen operations each."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from looplab.compat import adam_slots

_LEAST = 10**5
"""Elements of a variable; for smaller ones Keras's operations are faster."""


class FusedUpdates:
    """The updates of one step by `Adam` and `AdamW`, each of which equals Keras's up to rounding.

    Training amplifies the difference, like any change of rounding. Both keep their averages in the same variables as
    without, so that checkpoints and saved models do not depend on it.
    """

    def __init__(self) -> None:
        self._left = -1, "the step applies no Keras optimizer"  # the largest variable without a kernel, and why
        self._has_any = False

    def update(self, optimizer: Any, gradient: Any, variable: tf.Variable, learning_rate: Any) -> bool:
        """Updates a variable, or does nothing and returns False if no kernel can."""
        size = variable.shape.num_elements() or 0
        if reason := _obstacle(optimizer, gradient, variable, size):
            self._left = max(self._left, (size, reason))
            return False
        _update(optimizer, gradient, variable, learning_rate)
        self._has_any = True
        return True

    def warning(self, is_distributed: bool, jit_compile: bool) -> str:
        """Why no step is faster; "" if one may be."""
        if tf.executing_eagerly():
            return "`fused_updates` has no effect with `run_eagerly`."
        if is_distributed:
            return "`fused_updates` has no effect on several replicas."
        if not self._has_any:
            return f"`fused_updates` has no effect: {self._left[1]}."
        return "`fused_updates` has no use with `jit_compile`: XLA fuses the updates itself." if jit_compile else ""


def _obstacle(optimizer: Any, gradient: Any, variable: tf.Variable, size: int) -> str:
    """Why no kernel can update a variable; "" if one can."""
    name = type(optimizer).__name__
    if type(optimizer) not in (keras.optimizers.Adam, keras.optimizers.AdamW):
        return f"it is for `Adam` and `AdamW`, and the optimizer is `{name}`"
    if optimizer.amsgrad:
        return f"`{name}` has `amsgrad`"
    if size < _LEAST:
        return f"no variable has {_LEAST:,} numbers"
    if variable.dtype not in (tf.float32, tf.float64):  # with 16 bits, 1 - beta would lose most of its digits
        return f"the largest variable is of {tf.as_dtype(variable.dtype).name}"
    is_dense = isinstance(gradient, tf.Tensor) and gradient.dtype == variable.dtype
    return "" if is_dense else "the gradient of the largest variable is sparse, or has another dtype"


def _update(optimizer: Any, gradient: tf.Tensor, variable: tf.Variable, learning_rate: Any) -> None:
    momentum, velocity = adam_slots(optimizer, variable)
    dtype = variable.dtype
    step = tf.cast(tf.convert_to_tensor(optimizer.iterations) + 1, dtype)
    beta_1, beta_2 = tf.constant(optimizer.beta_1, dtype), tf.constant(optimizer.beta_2, dtype)
    tf.raw_ops.ResourceApplyAdam(
        var=variable.handle,
        m=momentum.handle,
        v=velocity.handle,
        beta1_power=beta_1**step,
        beta2_power=beta_2**step,
        lr=tf.cast(learning_rate, dtype),
        beta1=beta_1,
        beta2=beta_2,
        epsilon=tf.constant(optimizer.epsilon, dtype),
        grad=gradient,
    )
