"""Batch values of metrics, alone: no hook is installed, so each test passes the metric's own methods."""

import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from looplab.checkpoint.policy import lower_is_better
from looplab.loop.metrics import BatchMetrics, Source


def update(step, metric, *values):
    step.update(metric, lambda: metric.update_state(*values))


def result(step, metric):
    return step.result(metric, metric.result)


def test_a_result_is_that_of_the_batch_and_the_metric_has_that_of_the_epoch():
    both, mean = BatchMetrics(), keras.metrics.Mean()
    for values, of_batch, of_epoch in ([1.0, 3.0], 2, 2), ([11.0], 11, 5):
        step = both.step("train", [mean])
        update(step, mean, values)
        assert float(result(step, mean)) == of_batch
        assert float(step.running(mean)) == of_epoch
        both.reset()
    assert both.updated == {"train": [mean], "test": []}
    assert len(both.variables) == len(mean.variables)


def test_a_metric_that_no_step_updates_has_its_own_result():
    both, mean = BatchMetrics(), keras.metrics.Mean()
    mean.update_state(4.0)
    step = both.step("train", [mean])
    value = result(step, mean)
    assert float(value) == 4
    assert not step.is_updated(value)
    assert step.is_updated(tf.constant(1.0))


def test_a_reset_forgets_the_batch_and_what_was_returned():
    both, mean = BatchMetrics(), keras.metrics.Mean("m")
    step = both.step("train", [mean])
    update(step, mean, 3.0)
    value = result(step, mean)
    assert step.named("m", value)[0].source == Source(mean)
    step.reset(mean, mean.reset_state)
    assert step.named("m", value)[0].source is None
    update(step, mean, 5.0)
    assert float(result(step, mean)) == float(mean.result()) == 5


def test_values_know_the_metric_and_the_keys_that_they_come_from():
    class Both(keras.metrics.Mean):
        def result(self):
            return {"once": super().result(), "twice": {"x": 2 * super().result()}}

    metric = Both("both")
    step = BatchMetrics().step("train", [metric])
    update(step, metric, 3.0)
    named = step.named("logs", result(step, metric))
    assert [(one.name, float(one.value), one.source) for one in named] == [
        ("once", 3, Source(metric, ("once",))),
        ("x", 6, Source(metric, ("twice", "x"))),
    ]
    assert float(named[1].source.of(metric.result())) == 6
    assert str(named[1].source) == "entry 'twice/x' of the result of metric 'both'"
    other = step.named("y", {"a": 1.0}, "returned")[0]
    assert (other.name, other.origin, other.source) == ("a", "returned under 'y'", None)


def test_adds_the_results_that_a_step_did_not_ask_for():
    asked, missing = keras.metrics.Mean("asked"), keras.metrics.Mean("missing")
    step = BatchMetrics().step("train", [asked, missing])
    for metric in (asked, missing):
        update(step, metric, 3.0)
    result(step, asked)
    with step.passive():
        assert [one.name for one in step.not_returned()] == ["missing"]


def test_metrics_inside_a_metric_are_left_to_it():
    both, outer, inner = BatchMetrics(), keras.metrics.Mean("outer"), keras.metrics.Mean("inner")
    step = both.step("train", [outer, inner])
    step.update(outer, lambda: update(step, inner, 1.0))
    assert both.updated["train"] == [outer]


class InPython(keras.metrics.Metric):
    """Keeps its state in an attribute of Python's."""

    def __init__(self, state, change):
        super().__init__(name="rows")
        self.state, self.change = state, change

    def update_state(self, values):
        self.change(self)

    def result(self):
        return 1.0


def replace(metric):
    metric.state = metric.state + 1


PYTHON_STATE = {
    "a number": (0, replace),
    "a list": ([], lambda m: m.state.append(0)),
    "a dict of lists": ({"a": []}, lambda m: m.state["a"].append(0)),
    "an array": (np.zeros(2), lambda m: m.state.__iadd__(1)),
    "a set": (set(), lambda m: m.state.add(len(m.state))),
    "an object": (types.SimpleNamespace(n=0), lambda m: setattr(m.state, "n", m.state.n + 1)),
    "tensors": (tf.zeros(()), replace),
}


@pytest.mark.parametrize(("state", "change"), PYTHON_STATE.values(), ids=PYTHON_STATE)
def test_state_that_a_graph_does_not_update_is_an_error(state, change):
    metric = InPython(state, change)
    step = BatchMetrics().step("train", [metric])
    with pytest.raises(ValueError, match="Metric 'rows' keeps state in the Python attribute `state`"):
        update(step, metric, 1.0)


def test_a_result_in_an_inner_function_is_an_error():
    mean = keras.metrics.Mean("m")
    step = BatchMetrics().step("train", [mean])

    @tf.function
    def inner():
        return result(step, mean)

    with pytest.raises(ValueError, match="`result` of metric 'm' is called in an inner"):
        inner()


def test_the_direction_of_a_monitored_value():
    metrics = [keras.metrics.BinaryAccuracy("right"), keras.metrics.MeanSquaredError("wrong")]
    assert lower_is_better("val_right", "min", metrics)
    assert lower_is_better("val_loss", "auto", metrics)
    assert lower_is_better("val_wrong", "auto", metrics)
    assert not lower_is_better("right", "auto", metrics)
    with pytest.raises(ValueError, match="`monitor` is 'other'"):
        lower_is_better("other", "auto", metrics)
