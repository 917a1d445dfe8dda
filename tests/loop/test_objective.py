"""Loss and metrics, matched with outputs."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from looplab.loop.context import Step, recording, running
from looplab.loop.guard import Guard
from looplab.loop.metrics import BatchMetrics
from looplab.loop.objective import Objective
from looplab.warn import Warnings

Y, PRED = np.float32([[1.0], [3.0]]), np.float32([[2.0], [5.0]])


def objective(loss, metrics=None, loss_weights=None, doubts=None):
    given = {"loss": loss, "loss_weights": loss_weights, "metrics": metrics}
    return Objective(None, given, doubts or Warnings())


def step_of(one):
    return Step("train", Guard(), BatchMetrics().step("train", one.compiled.metrics), {})


def loss_of(one, step, y, y_pred, sample_weight=None):
    with recording(), running(step):
        return float(one.compute_loss(step, y, y_pred, sample_weight))


def parts(step):
    return {name: float(value) for name, value in step.ledger.all().items()}


def as_tensors(*arrays):
    return [tf.nest.map_structure(tf.constant, array) for array in arrays]


def test_computes_the_loss_and_names_it():
    one = objective("mse")
    step = step_of(one)
    assert loss_of(one, step, *as_tensors(Y, PRED)) == 2.5
    assert parts(step) == {"mse": 2.5}
    assert step.ledger.take() == []  # `compute_loss` has taken it
    step = step_of(one)
    assert loss_of(one, step, *as_tensors(Y, PRED, np.float32([2.0, 0.0]))) == 1


def test_several_outputs_have_a_loss_each():
    one = objective(["mse", "mae"], loss_weights=[1.0, 10.0])
    step = step_of(one)
    y, y_pred = as_tensors([Y, Y], [PRED, PRED])
    assert loss_of(one, step, y, y_pred) == 2.5 + 15
    assert parts(step) == {"mse_loss": 2.5, "mae_loss": 15}
    with recording(), running(step):
        assert {name: float(value) for name, value in one.compute_metrics(step, y, y_pred, None).items()} == {
            "mse_loss": 2.5,
            "mae_loss": 1.5,
        }


def test_metrics_have_the_value_of_the_batch():
    one = objective("mse", ["mae"])
    for y_pred, expected in (PRED, 1.5), (Y, 0):
        step = step_of(one)
        with recording(), running(step):
            results = one.compute_metrics(step, *as_tensors(Y, y_pred), None)
            named = [result for name, value in results.items() for result in step.metrics.named(name, value)]
        assert {value.name: float(value.value) for value in named} == {"mae": expected}


def test_reports_targets_that_the_loss_cannot_take_and_searches_arrays_for_them():
    one = objective("sparse_categorical_crossentropy")
    step = step_of(one)
    assert np.isfinite(loss_of(one, step, tf.constant([0, 5]), tf.constant([[0.5, 0.5], [0.5, 0.5]])))
    assert "`y` must be whole numbers from 0 to 1" in step.guard.message(int(step.guard.fault()))
    with pytest.raises(ValueError, match=r"`y` must be whole numbers from 0 to 1.*got 5, at index 1"):
        one.check_arrays("x", (np.zeros((2, 1)), np.array([0, 5])), None)
    with pytest.raises(ValueError, match="`x` must be finite"):
        one.check_arrays("x", (np.array([np.nan]),), None)


def test_warns_of_what_looks_wrong():
    doubts = Warnings()
    one = objective("mse", doubts=doubts)
    step = step_of(one)

    @tf.function
    def graph(y, x):
        one.compute_loss(step, y, tf.sigmoid(x), None)

    with recording(), running(step):
        graph(tf.constant(Y), tf.constant(PRED))
    one.check_loss({"loss/mse": [0.5]})
    one.check_loss({"loss/mse": [1.5]})
    model = keras.Sequential([keras.layers.Input((4, 4, 1)), keras.layers.Flatten()])
    one.check_arrays("x", (np.full((2, 4, 4, 1), 200.0),), model)
    with pytest.warns() as caught:
        doubts.give()
    texts = [str(warning.message) for warning in caught]
    assert ["outputs are all from 0 to 1" in texts[0], "looks like images from 0 to 255" in texts[1]] == [True, True]


def test_structures_that_do_not_match_are_an_error():
    one = objective({"a": "mse", "b": "mse"})
    with pytest.raises(ValueError, match="`loss`"):
        loss_of(one, step_of(one), *as_tensors({"a": Y}, {"a": PRED, "b": PRED}))
    one = objective("mse")
    with pytest.raises(ValueError, match="y"):
        loss_of(one, step_of(one), None, tf.constant(PRED))
