"""The guard, alone."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from looplab.loop.guard import NO_ROWS, Fault, Guard


@pytest.fixture
def kernel():
    return tf.Variable([1.0, 2.0], name="kernel")


def apply(guard, kernel, gradient=(1.0, 1.0), loss=0.0, rows=1, optimizer=None):
    optimizer = optimizer or keras.optimizers.SGD(0.5)
    optimizer.build([kernel])
    guard.apply(optimizer, [tf.constant(gradient)], [kernel], tf.constant(loss), rows)
    return guard.message(int(guard.fault()))


def test_keeps_the_first_fault_until_it_is_cleared():
    guard = Guard()
    guard.report(tf.constant([False, False]), ["a", "b"])
    assert int(guard.fault()) == 0
    guard.report(tf.constant([False, True]), ["a", "b"])
    guard.report(tf.constant([True]), ["c"])
    assert int(guard.fault()) < 0
    assert guard.message(int(guard.fault())) == "b"
    guard.variables[0].assign(0)
    guard.report(tf.constant([True, True]), ["c", NO_ROWS], skippable=True)
    assert int(guard.fault()) > 0
    assert guard.message(int(guard.fault())) == "c"
    guard.variables[0].assign(0)
    guard.report(tf.constant([True]), [NO_ROWS], skippable=True)
    assert int(guard.fault()) < 0  # never skipped


def test_applies_sound_gradients(kernel):
    guard = Guard()
    assert apply(guard, kernel) == ""
    np.testing.assert_array_equal(kernel, [0.5, 1.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": (1.0, np.inf)}, "the gradient of kernel.* is not finite"),
        ({"gradient": (1e30, 1.0)}, "the gradient of kernel.* overflows when squared"),
        ({"loss": np.nan}, "the loss is not finite"),
        ({"rows": 0}, "the batch has no rows"),
    ],
)
def test_applies_nothing_else(kernel, options, message):
    guard = Guard()
    assert re.match(message, apply(guard, kernel, **options))
    np.testing.assert_array_equal(kernel, [1, 2])


def test_applies_nothing_after_a_fault(kernel):
    guard = Guard()
    guard.report(tf.constant([True]), ["an earlier fault"])
    assert apply(guard, kernel) == "an earlier fault"
    np.testing.assert_array_equal(kernel, [1, 2])


def test_a_loss_scale_deals_with_infinite_gradients_itself(kernel):
    guard = Guard()
    assert (
        apply(guard, kernel, (np.inf, 1.0), optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())) == ""
    )
    np.testing.assert_array_equal(kernel, [1, 2])


def test_checks_what_a_step_changed_by_itself(kernel):
    guard = Guard()
    guard.report_applied({"loss": tf.constant(1.0)}, [kernel])
    assert int(guard.fault()) == 0
    kernel.assign([np.nan, 0.0])
    guard.report_applied({"loss": tf.constant(1.0)}, [kernel])
    assert "is not finite after the step changed it" in guard.message(int(guard.fault()))


def test_knows_what_a_traced_step_changes_outside_of_apply_and_what_must_be_restored(kernel):
    guard, sgd, counter = Guard(), keras.optimizers.SGD(0.5), tf.Variable(0)
    sgd.build([kernel])
    found = {}

    @tf.function
    def step(reports):
        guard.start()
        guard.apply(sgd, [tf.ones(2)], [kernel], tf.constant(0.0), 1)
        counter.assign_add(1)
        if reports:
            guard.report(tf.constant([False]), ["late"])
        found["changed_otherwise", reports] = guard.changed_otherwise([kernel, counter])

    def trace(reports):
        graph = step.get_concrete_function(reports).graph
        found["to_restore", reports] = guard.to_restore([kernel, counter], graph)

    trace(False)
    trace(True)
    for reports in (False, True):
        assert [v.name for v in found["changed_otherwise", reports]] == [counter.name]
    assert [v.name for v in found["to_restore", False]] == [counter.name]  # the guard decided about the kernel
    assert [v.name for v in found["to_restore", True]] == [kernel.name, counter.name]


def test_an_error_names_step_batch_and_values_and_writes_the_batch(tmp_path):
    batch = {"x": np.array([[1.0], [np.nan]]), "y": {"a": np.array([3, 5])}, "sample_weight": None}
    fault = Fault(1, "the loss is not finite", "train", 2, batch, {"loss": np.inf, "loss/kl": 1.0})
    error = fault.error(7, 3, tmp_path)
    assert isinstance(error, FloatingPointError)
    assert str(error).startswith(
        "The loss is not finite, at step 7 (batch 2 of epoch 3). loss = inf; `x` itself is not finite, first in row 1 "
        "of the batch; `y.a` is from 3 to 5. The update was not made."
    )
    with np.load(tmp_path / "nonfinite" / "step-7.npz") as file:
        assert sorted(file) == ["x", "y.a"]
    error = Fault(-1, NO_ROWS, "test", 2, {}, {}).error(7, 3, None)
    assert isinstance(error, ValueError)
    assert "at batch 2 of an evaluation" in str(error)
