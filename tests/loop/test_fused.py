"""Updates of large variables by one kernel, which equal Keras's up to rounding."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import looplab

SIZE = 320  # SIZE * SIZE numbers are enough for the kernel
GRADIENTS = np.random.default_rng(0).normal(size=(20, SIZE, SIZE)).astype("float32")


class Given(looplab.Trainer):
    """Trains a variable with the batches as gradients."""

    def __init__(self, optimizer, dtype="float32", **options):
        super().__init__(optimizer=optimizer, seed=0, **options)
        self.large = keras.Variable(np.ones((SIZE, SIZE)), dtype=dtype, name="large")

    def train_step(self, batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(self.large * tf.cast(batch[0], self.large.dtype))
        self.minimize(tape, loss, [self.large])
        return {"loss": loss}


def fitted(optimizer, epochs=2, resume=False, **options):
    trainer = Given(optimizer, **options)
    trainer.fit(GRADIENTS, batch_size=1, epochs=epochs, verbose=0, resume=resume)
    return trainer


def values(trainer):
    return [trainer.large.numpy(), *(variable.numpy() for variable in trainer.optimizer.variables)]


def distance(one, other):
    return np.linalg.norm(one - other) / max(np.linalg.norm(one), 1e-30)


def test_a_thousand_fused_updates_equal_those_of_keras():
    plain, fused = (
        values(fitted(keras.optimizers.Adam(1e-3), epochs=50, fused_updates=is_fused)) for is_fused in (False, True)
    )
    assert distance(plain[0], fused[0]) <= 2e-6
    # The kernel rounds 1 - beta_2 after the subtraction, in float32.
    assert max(distance(one, other) for one, other in zip(plain, fused, strict=True)) <= 1e-5
    assert (plain[0] != fused[0]).any()  # otherwise the kernel has not run


@pytest.mark.parametrize(
    ("optimizer", "is_fused"),
    [
        (lambda: keras.optimizers.AdamW(1e-3, weight_decay=0.1, clipnorm=1.0), True),
        (lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(1e-2, 5, 0.5), epsilon=1e-3), True),
        (lambda: keras.optimizers.Adam(amsgrad=True), False),
        (lambda: keras.optimizers.Nadam(), False),
        (lambda: keras.optimizers.SGD(1e-3, momentum=0.9), False),
    ],
)
def test_only_adam_is_fused_and_with_all_its_settings(optimizer, is_fused):
    plain = values(fitted(optimizer()))
    with contextlib.nullcontext() if is_fused else pytest.warns(UserWarning, match="`fused_updates` has no effect: "):
        fused = values(fitted(optimizer(), fused_updates=True))
    for one, other in zip(plain, fused, strict=True):
        assert distance(one, other) <= 5e-5
    assert distance(plain[0], fused[0]) <= 1e-5
    assert (plain[0] != fused[0]).any() == is_fused


@pytest.mark.parametrize(("dtype", "is_fused"), [("float64", True), ("float16", False)])
def test_numbers_of_16_bits_are_not_fused(dtype, is_fused):
    """The kernel computes 1 - beta with the precision of the variable."""
    plain, fused = (
        fitted(keras.optimizers.Adam(1e-2, epsilon=1e-3), dtype=dtype, fused_updates=fuses) for fuses in (False, True)
    )
    assert (plain.large.numpy() != fused.large.numpy()).any() == is_fused


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole = fitted(keras.optimizers.Adam(), epochs=3, fused_updates=True)
    fitted(keras.optimizers.Adam(), epochs=2, fused_updates=True, log_dir=tmp_path)
    resumed = fitted(keras.optimizers.Adam(), epochs=3, resume=True, fused_updates=True, log_dir=tmp_path)
    for one, other in zip(values(whole), values(resumed), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("size", "options", "text"),
    [
        (SIZE, {"optimizer": "sgd"}, "no effect: it is for `Adam` and `AdamW`, and the optimizer is `SGD`."),
        (SIZE, {"optimizer": keras.optimizers.Adam(amsgrad=True)}, "no effect: `Adam` has `amsgrad`."),
        (300, {}, "no effect: no variable has 100,000 numbers."),
        (SIZE, {"run_eagerly": True}, "no effect with `run_eagerly`."),
        (SIZE, {"jit_compile": True}, "no use with `jit_compile`: XLA fuses the updates itself."),
    ],
)
def test_a_step_that_no_kernel_makes_faster_is_a_warning(size, options, text):
    model = keras.Sequential([keras.Input((size,)), keras.layers.Dense(size)])
    trainer = looplab.Trainer(model, loss="mse", fused_updates=True, **{"optimizer": "adam", **options})
    x = np.ones((4, size), "float32")
    with pytest.warns(UserWarning, match=f"`fused_updates` has {text}") as caught:
        trainer.fit(x, x, batch_size=1, epochs=2, verbose=0)
    assert len(caught) == 1


def test_several_replicas_have_no_kernel(two_devices):
    x = np.ones((4, SIZE), "float32")
    with two_devices.scope():
        model = keras.Sequential([keras.Input((SIZE,)), keras.layers.Dense(SIZE)])
        trainer = looplab.Trainer(model, optimizer="adam", loss="mse", fused_updates=True)
    with pytest.warns(UserWarning, match="`fused_updates` has no effect on several replicas"):
        trainer.fit(x, x, batch_size=2, verbose=0)
    trace = trainer._looplab.tracer.compiled("train", trainer._looplab.batches("x", x, x, batch_size=2).element_spec)
    assert "ResourceApplyAdam" not in str(trace.graph.as_graph_def())
