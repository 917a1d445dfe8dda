"""The metrics of a pass, and their copies in an evaluation."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

from looplab.loop.pass_metrics import PassMetrics
from looplab.loop.tracing import Tracer
from looplab.state import Means, Progress

SPEC = tf.TensorSpec((None,), tf.float32)


@pytest.fixture
def trainer(bare):
    return bare()


@pytest.fixture
def passes(trainer):
    return PassMetrics(trainer.runner)


def compiled(trainer, kind, eagerly=False):
    return Tracer(trainer.runner).compiled(kind, SPEC, eagerly)


def run(step, *rows):
    return step(iter(tf.data.Dataset.from_tensor_slices(np.float32(rows)).batch(9)), 1, 1)


def progress(loss=2.0):
    return Progress(batches=1, means=Means({"loss": 3 * loss, "seen": 0.0}, 3.0))


def test_results_are_those_of_metrics_and_the_means_of_everything_else(trainer, passes):
    step = compiled(trainer, "train")
    run(step, 1.0, 2.0)
    run(step, 3.0)
    assert passes.results("train", step, progress()) == {"loss": 2, "seen": 6}
    assert float(trainer.runner.objective.mean.result()) == 2  # for callbacks
    passes.reset()
    assert float(trainer.seen.result()) == 0


def test_an_evaluation_has_metrics_of_its_own(trainer, passes):
    trainer.seen.update_state(100.0)
    step = compiled(trainer, "test")
    with passes.unchanged(step):
        passes.reset(step.copies)
        assert float(trainer.seen.result()) == 100
        run(step, 1.0, 2.0)
        assert passes.results("test", step, progress()) == {"loss": 2, "seen": 3}
        with passes.visible(step, [object()], loss=7.0):
            assert float(trainer.seen.result()) == 3
            assert float(trainer.runner.objective.mean.result()) == 7
        assert float(trainer.seen.result()) == 100
    assert float(trainer.seen.result()) == 100
    assert float(trainer.runner.objective.mean.result()) == 0


def test_an_evaluation_may_run_inside_another(trainer, passes):
    step = compiled(trainer, "test")
    with passes.unchanged(step):
        passes.reset(step.copies)
        run(step, 1.0)
        with passes.unchanged(step):
            passes.reset(step.copies)
            run(step, 5.0)
            assert passes.results("test", step, progress())["seen"] == 5
        assert passes.results("test", step, progress())["seen"] == 1


def test_nothing_is_shown_to_who_does_not_look(trainer, passes):
    class Stateless:
        stateless = True

    step = compiled(trainer, "test")
    with passes.unchanged(step):
        run(step, 5.0)
        with passes.visible(step, [Stateless()]):
            assert float(trainer.seen.result()) == 0


def test_an_eager_pass_restores_all_variables(trainer, passes):
    trainer.seen.update_state(100.0)
    step = compiled(trainer, "test", eagerly=True)
    with contextlib.suppress(ZeroDivisionError), passes.unchanged(step):
        passes.reset(step.copies)
        run(step, 5.0)
        trainer.weight.assign(9.0)
        assert float(trainer.seen.result()) == 5
        raise ZeroDivisionError
    np.testing.assert_array_equal([trainer.seen.result(), trainer.weight], [100, 0])
