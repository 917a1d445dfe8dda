"""Updates of variables by TensorFlow's fused kernels, instead of a dozen operations each."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from looplab.compat import adam_slots

_LEAST = 10**5
"""Elements of a variable; for smaller ones Keras's operations are faster."""


def updates(optimizer: Any, gradient: Any, variable: tf.Variable, learning_rate: Any) -> bool:
    """Updates a large variable as `Adam` and `AdamW` do, up to rounding; does nothing and returns False for others.

    Both keep their averages in the same variables as without, so that checkpoints and saved models do not depend on it.
    """
    is_adam = type(optimizer) in (keras.optimizers.Adam, keras.optimizers.AdamW) and not optimizer.amsgrad
    is_dense = isinstance(gradient, tf.Tensor) and gradient.dtype == variable.dtype
    is_precise = variable.dtype in (tf.float32, tf.float64)  # with 16 bits, 1 - beta would lose most of its digits
    if not is_adam or not is_dense or not is_precise or (variable.shape.num_elements() or 0) < _LEAST:
        return False
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
    return True
