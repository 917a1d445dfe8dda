"""One step on one replica, run eagerly."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from looplab.loop import context
from looplab.loop.guard import NO_ROWS
from looplab.loop.weights import ClassWeights

X = tf.constant([1.0, 3.0])


def run(trainer, kind="train", batch=X, step=None):
    with context.recording():
        return trainer.runner.run(kind, step or getattr(trainer, f"{kind}_step"), None, batch)


def numbers(logs):
    return {name: float(value) for name, value in logs.scalars.items()}


def test_returns_the_values_of_the_batch_and_what_they_mean(bare):
    trainer = bare(optimizer=keras.optimizers.SGD(0.5))
    first, second = run(trainer), run(trainer, batch=tf.constant([5.0]))
    assert numbers(first) == {"learning_rate": 0.5, "loss": 2, "seen": 4}
    assert numbers(second) == {"learning_rate": 0.5, "loss": 5, "seen": 5}
    assert float(trainer.seen.result()) == 9
    assert (int(first.weight), int(second.weight)) == (2, 1)
    assert first.meaning.sources["seen"].metric is trainer.seen
    assert (first.meaning.rates, first.meaning.parts) == ({"learning_rate"}, set())
    assert float(trainer.weight) == 1
    assert int(first.fault) == 0


def test_logs_parts_of_the_loss_and_what_the_step_logs(bare):
    trainer = bare()

    def step(batch):
        running = context.current()
        running.ledger.add("kl", tf.constant(4.0))
        running.scalars["mine"] = tf.constant(5.0)
        running.images["dots"] = tf.zeros((1, 1, 1, 1), tf.uint8)
        return {}

    logs = run(trainer, "test", step=step)
    assert numbers(logs) == {"mine": 5, "loss/kl": 4}
    assert logs.meaning.parts == {"loss/kl"}
    assert list(logs.images) == ["dots"]


def test_two_values_with_one_name_are_an_error(bare):
    def step(batch):
        context.current().scalars["loss"] = tf.constant(5.0)
        return {"loss": tf.constant(4.0)}

    with pytest.raises(ValueError, match="'loss'"):
        run(bare(), step=step)


def test_checks_what_changes_without_the_guard(bare):
    trainer = bare()

    def step(batch):
        trainer.weight.assign(np.nan)
        return {"loss": tf.constant(1.0)}

    logs = run(trainer, step=step)
    assert "is not finite after the step changed it" in trainer.runner.guard.message(int(logs.fault))


def test_an_empty_batch_is_a_fault(bare):
    trainer = bare()
    logs = run(trainer, "test", X[:0], lambda batch: {"loss": tf.constant(1.0)})
    assert trainer.runner.guard.message(int(logs.fault)) == NO_ROWS


def test_class_weights_are_for_training(bare):
    trainer, seen = bare(), []
    trainer.runner.class_weights = ClassWeights.of({1: 5.0})

    def step(batch):
        seen.append(tf.nest.map_structure(lambda part: part.numpy().tolist(), batch))
        return {"loss": tf.constant(1.0)}

    for kind in ("train", "test"):
        run(trainer, kind, (X, tf.constant([0, 1])), step)
    assert seen == [([1, 3], [0, 1], [1, 5]), ([1, 3], [0, 1])]


def test_prediction_returns_the_outputs(bare):
    assert bare().runner.predict(lambda x: 2 * x, X).numpy().tolist() == [2, 6]


def test_what_a_step_trains_is_held_and_bare_variables_are_named(bare):
    trainer = bare()
    optimizer, variable = keras.optimizers.SGD(), tf.Variable(1.0)
    trainer.runner.prepare(optimizer, [variable])
    assert optimizer in trainer.optimizers.values()
    assert trainer.runner.minimized[id(optimizer)] == (optimizer, [variable])
    assert any(held is variable for held in trainer.runner.variables.held())
    trainer.runner.warn_of_bare_variables([trainer.weight], [None])
    trainer.runner.warn_of_bare_variables([trainer.weight], [tf.constant(1.0)])
    with pytest.warns(UserWarning, match="looplab trains weight, which Keras 3 would not"):
        trainer.runner.warnings.give()
