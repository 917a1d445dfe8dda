"""The running step, and what Keras objects record in it."""

import contextlib
import logging
import threading

import keras
import pytest
import tensorflow as tf

from looplab.compat import converted
from looplab.loop.context import Step, current, recording, running
from looplab.loop.graphs import concrete
from looplab.loop.guard import Guard
from looplab.loop.metrics import BatchMetrics


class Penalty(keras.layers.Layer):
    def call(self, x):
        self.add_loss(tf.reduce_sum(x))
        return x


def new_step(metrics=None):
    return Step("train", Guard(), metrics, {})


def test_steps_nest_and_end():
    outer, inner = new_step(), new_step()
    with running(outer):
        with running(inner):
            assert current() is inner
        with contextlib.suppress(ZeroDivisionError), running(inner):
            raise ZeroDivisionError
        assert current() is outer
    assert current() is None


@pytest.mark.parametrize("fails", [False, True])
def test_what_autograph_runs_as_it_is_matters_only_if_the_step_fails(fails, caplog, monkeypatch):
    class Private:
        __factor = 2.0

        def step(self, x):
            if fails and x > 0:
                x = -x
            return self.__factor * x

    step = new_step()

    def run(x):
        with running(step):
            return converted(Private().step)(x)

    monkeypatch.setattr(logging.getLogger("tensorflow"), "propagate", True)
    with pytest.raises(TypeError, match="symbolic") if fails else contextlib.nullcontext():
        concrete(run, tf.TensorSpec((), tf.float32))
    assert ("AutoGraph could not transform" in caplog.text) == fails


def test_each_thread_has_its_own_step():
    seen = []
    with running(new_step()):
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_a_layer_records_its_losses_in_the_running_step():
    before = keras.Layer.add_loss
    step, layer = new_step(), Penalty(name="penalty")
    with recording():
        layer(tf.ones(2))  # no step runs
        with running(step):
            layer(tf.ones(3))
    layer(tf.ones(4))
    assert {name: float(value) for name, value in step.ledger.parts([]).items()} == {"penalty": 3}
    assert keras.Layer.add_loss is before


def test_metrics_have_batch_values_in_the_running_step():
    mean = keras.metrics.Mean()
    step = new_step(BatchMetrics().step("train", [mean]))
    mean.update_state(10.0)
    with recording(), running(step):
        mean.update_state(2.0)
        assert float(mean.result()) == 2
    assert float(mean.result()) == 6
    with recording(), running(new_step()):  # leaves metrics to Keras
        assert float(mean.result()) == 6
    with recording(), running(step):
        mean.reset_state()
    assert float(mean.result()) == 0


def test_a_step_may_inspect_what_a_loss_gets():
    step, mse = new_step(), keras.losses.MeanSquaredError()
    seen, one = [], tf.ones(1)

    def inspect(loss, target, output, weight):
        seen.append((loss, weight))
        return target + 1, None

    with recording(), running(step):
        assert float(mse(one, one)) == 0
        step.inspect = inspect
        assert float(mse(one, one, 5.0)) == 1
    assert seen == [(mse, 5.0)]
