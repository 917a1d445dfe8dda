"""Several steps in one graph call, with a step that is a plain function."""

import numpy as np
import pytest
import tensorflow as tf

from looplab.loop.call_logs import CallLogs
from looplab.loop.compiled import Compiled
from looplab.loop.pace import Pace
from looplab.loop.predictor import Predictor
from looplab.loop.step import Meaning, StepLogs

SPEC = tf.TensorSpec((None,), tf.float32)


class Summing:
    """A step that sums its batch into a variable, with a fault if the sum is 9, or -1 if it is 15."""

    def __init__(self):
        self.total, self.stop = tf.Variable(0.0), tf.Variable(False)

    def step(self, batch):
        total = tf.reduce_sum(batch)
        self.total.assign_add(total)
        fault = tf.where(total == 9, 3, tf.where(total == 15, -1, 0))
        image = tf.cast(tf.fill((1, 1, 1, 1), total), tf.uint8)
        return StepLogs({"sum": total, "whole": tf.cast(total, tf.int32)}, {"dot": image}, fault, tf.size(batch))

    def compiled(self, keep=False, **options):
        compiled = Compiled(self.step, SPEC, {"dot": 2}, tf.distribute.get_strategy(), self.stop, **options)
        compiled.restored = lambda: [self.total] if keep else []
        return compiled


def batches(*rows, size=2):
    return iter(tf.data.Dataset.from_tensor_slices(np.float32(rows)).batch(size))


@pytest.fixture
def summing():
    return Summing()


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_runs_up_to_k_steps_and_returns_the_values_of_each(summing, run_eagerly):
    compiled, data = summing.compiled(run_eagerly=run_eagerly), batches(1, 2, 3, 4, 5)
    assert float(summing.total) == 0  # nothing has run
    first, last = compiled(data, 2, 1), compiled(data, 7, 3)
    assert (first.done, last.done) == (2, 1)
    assert first.batch.has_value()
    assert not last.batch.has_value()
    for logs, sums, weights in (first, [3, 7], [2, 2]), (last, [5], [1]):
        np.testing.assert_array_equal(logs.scalars["sum"], sums)
        np.testing.assert_array_equal(logs.scalars["whole"], sums)
        np.testing.assert_array_equal(logs.weights, weights)
        np.testing.assert_array_equal(logs.faults, [0] * len(sums))
    assert [index for index, _, _ in first.images + last.images] == [0, 0]  # of steps 1 and 3
    assert compiled.names == ["sum", "whole"]
    assert float(summing.total) == 15


def test_a_fault_is_undone_and_ends_the_call(summing):
    compiled, data = summing.compiled(keep=True), batches(1, 4, 9, 9, 5, 15, 1, size=1)
    assert [compiled(data, 9, 1).faults.tolist() for _ in range(5)] == [[0, 0, 3], [3], [0, -1], [0], []]
    assert float(summing.total) == 11


def test_stops_after_the_running_step(summing):
    compiled, data = summing.compiled(), batches(1, 2, 3, 4)
    summing.stop.assign(True)
    assert compiled(data, 9, 1).done == 1


def test_a_step_that_only_reads_changes_copies(summing):
    compiled = summing.compiled(read_only=True)
    assert compiled(batches(1, 2), 9, 1).done == 1
    assert float(summing.total) == 0
    assert float(compiled.copies.of(summing.total)) == 3
    assert any(variable is summing.total for variable in compiled.written)


def test_knows_what_it_uses_and_writes(summing):
    compiled = summing.compiled()
    assert any(variable is summing.total for variable in compiled.written)
    assert any(variable is summing.total for variable in compiled.used)


def test_eager_errors_undo_the_step(summing):
    def failing(batch):
        Summing.step(summing, batch)
        raise ZeroDivisionError

    summing.step = failing
    compiled = summing.compiled(keep=True, run_eagerly=True)
    with pytest.raises(ZeroDivisionError):
        compiled(batches(1, 2), 1, 1)
    assert float(summing.total) == 0


def test_first_steps_of_a_call():
    images = [(0, "dot", [b"a"]), (1, "dot", [b"b"])]
    logs = CallLogs(2, np.array([4.0, 5.0]), {"sum": np.array([1.0, 2.0])}, images, np.array([0, 3]), None)
    first = logs.first(1)
    assert (first.done, first.weights.tolist(), first.faults.tolist()) == (1, [4], [0])
    assert (first.scalars["sum"].tolist(), first.images) == ([1], images[:1])


def test_predicts_one_batch_per_call():
    counter = tf.Variable(0)

    def step(batch):
        counter.assign_add(1)
        return 2 * batch

    predictor = Predictor(step, SPEC, tf.distribute.get_strategy(), jit_compile=False, run_eagerly=False)
    data = batches(1, 2, 3)
    outputs = [predictor(data, 9).outputs.numpy().tolist() for _ in range(2)]
    assert outputs == [[2, 4], [6]]
    assert predictor(data, 9).done == 0
    assert int(counter) == 0  # it counted on a copy
    assert predictor.meaning == Meaning({}, frozenset(), frozenset())


def test_pace_is_fixed_or_follows_the_time_of_a_step():
    assert Pace(7).next() == 7
    assert Pace(7).next(3, 9) == 3
    assert Pace("auto", start=30).next(50) == 30
    pace = Pace("auto", seconds=1.0)
    assert pace.next() == 1
    pace.took(1, 0.25)
    assert pace.next() == 4
    pace.took(4, 0.0001)
    assert pace.next() == 40  # at most ten times as many
    pace.took(40, 100.0)
    assert pace.next() == 1
    pace.took(0, 0.0)
    assert pace.next() == 1
