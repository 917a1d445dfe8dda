"""1, 2 and 4 replicas compute what one device computes, and continue each other's runs.

TensorFlow mixes up what several strategies of one process reduce, so this file runs itself for 4 replicas.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import looplab
from looplab.testing import read_scalars

BATCH = 24
ROWS = [66 * BATCH + 1, 66 * BATCH + 14, 65 * BATCH + 23]  # of three passes: 200 steps, and three uneven last batches
random = np.random.default_rng(0)
X = random.normal(size=(max(ROWS), 4)).astype("float32")
Y = (X @ np.array([[1], [-2], [3], [0.5]]) + np.sin(X[:, :1])).astype("float32")
WEIGHTS = np.linspace(0.1, 3, max(ROWS)).astype("float32")


class Two(looplab.Trainer):
    """One optimizer for each layer."""

    def __init__(self, model, loss, **options):
        super().__init__(model, **options)
        self.second = keras.optimizers.Adam(0.01)

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
        first, second = (layer.trainable_variables for layer in self.model.layers)
        self.minimize(tape, loss, first)
        self.minimize(tape, loss, second, self.second)
        return {"loss": loss}


SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam
CASES = {
    "SGD": (looplab.Trainer, lambda: SGD(0.05), False),
    "Adam": (looplab.Trainer, lambda: Adam(0.01), False),
    "two optimizers": (Two, lambda: SGD(0.05), False),
    "sample weights": (looplab.Trainer, lambda: SGD(0.02), True),
    "clipped by value": (looplab.Trainer, lambda: SGD(0.05, clipvalue=0.1), False),
    "clipped by norm": (looplab.Trainer, lambda: SGD(0.05, clipnorm=0.1), False),
    "clipped by global norm": (looplab.Trainer, lambda: Adam(0.01, global_clipnorm=0.1), False),
}


class Losses(keras.callbacks.Callback):
    """Those of all steps."""

    async_safe = True

    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(logs["loss"])


def table(strategy, cases=CASES):
    """By case, the losses of all steps, and by another name the weights after them."""
    found = {}
    for case in cases:
        kind, optimizer, is_weighted = CASES[case]
        keras.utils.set_random_seed(0)
        with scope(strategy):
            net = keras.Sequential([keras.Input((4,)), layers.Dense(8, "tanh"), layers.Dense(1)])
            trainer, losses = kind(net, optimizer=optimizer(), loss="mse", seed=0), Losses()
        for rows in ROWS:
            weights = WEIGHTS[:rows] if is_weighted else None
            trainer.fit(X[:rows], Y[:rows], sample_weight=weights, batch_size=BATCH, verbose=0, callbacks=[losses])
        found[case] = np.array(losses.values)
        found[f"weights: {case}"] = np.concatenate([weight.ravel() for weight in trainer.get_weights()])
    return found


class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.steps == 33:
            raise KeyboardInterrupt


def losses(strategy, log_dir, resume=False, callbacks=()):
    """Those of 80 steps, in epochs of 20 with an uneven last batch; of a run that may resume one of other replicas."""
    train(strategy, log_dir, resume, callbacks)
    steps, values = read_scalars(log_dir / "train")["batch_loss"]
    assert steps.tolist() == [*range(1, 81)]
    return values


def train(strategy, log_dir, resume=False, callbacks=()):
    """The run of `losses`."""
    rows = 19 * BATCH + 7
    keras.utils.set_random_seed(0)
    with scope(strategy):
        inner = [layers.Dense(8, "tanh"), layers.BatchNormalization(synchronized=True), layers.Dense(1)]
        trainer = looplab.Trainer(
            keras.Sequential([keras.Input((4,)), *inner]),
            optimizer=Adam(0.01, global_clipnorm=1.0),
            loss="mse",
            metrics=["mae"],
            seed=0,
            log_dir=log_dir,
            checkpoint=looplab.Checkpoint(every=30),
        )
    trainer.fit(X[:rows], Y[:rows], batch_size=BATCH, epochs=4, verbose=0, resume=resume, callbacks=list(callbacks))


def interrupted(strategy, *folders):
    """Runs that were interrupted, with a checkpoint at step 30."""
    with pytest.raises(KeyboardInterrupt):
        losses(strategy, folders[0], callbacks=[Stop()])
    for folder in folders[1:]:
        shutil.copytree(folders[0], folder)


def scope(strategy):
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def of_four(folder):
    """What 4 replicas do, in a process of its own."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(4)])
    found = table(strategy)
    found["continued"] = losses(strategy, folder / "2 to 4", resume=True)
    interrupted(strategy, folder / "4 to 2")
    found["whole"] = losses(strategy, folder / "whole on 4")
    np.savez(folder / "found.npz", **found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, two_devices):
    """Has runs of 2 replicas to resume."""
    folder = tmp_path_factory.mktemp("replicas")
    interrupted(two_devices, folder / "2 to 1", folder / "2 to 4")
    return folder


@pytest.fixture(scope="module")
def four(folder):
    environment = {**os.environ, "PYTHONPATH": str(Path(looplab.__file__).parent.parent)}
    command = [sys.executable, __file__, str(folder)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    return np.load(folder / "found.npz")


@pytest.fixture(scope="module")
def one():
    return table(None)


@pytest.fixture(scope="module")
def whole_on_two(folder, two_devices):
    return losses(two_devices, folder / "whole on 2")


def assert_equal_but_for_rounding(found, expected, cases=CASES):
    for case in cases:
        assert len(expected[case]) == 200
        np.testing.assert_allclose(found[case], expected[case], rtol=2e-6, err_msg=case)
        weights = f"weights: {case}"
        np.testing.assert_allclose(found[weights], expected[weights], rtol=0, atol=2e-6, err_msg=weights)


def test_one_replica_computes_the_same_bits(one):
    found = table(tf.distribute.MirroredStrategy(["CPU:0"]))
    for name, values in one.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_two_replicas_compute_what_one_device_computes(one, two_devices):
    assert_equal_but_for_rounding(table(two_devices), one)


def test_four_replicas_compute_what_one_device_computes(one, four):
    assert_equal_but_for_rounding(four, one)


def test_one_device_continues_what_two_replicas_started(folder, whole_on_two):
    with pytest.warns(UserWarning, match="there were 2 replicas, and now 1: the run continues, but not"):
        found = losses(None, folder / "2 to 1", resume=True)
    np.testing.assert_allclose(found, whole_on_two, rtol=1e-5)


def test_four_replicas_continue_what_two_started(four, whole_on_two):
    np.testing.assert_allclose(four["continued"], whole_on_two, rtol=1e-5)


def test_two_replicas_continue_what_four_started(folder, four, two_devices):
    with pytest.warns(UserWarning, match="there were 4 replicas, and now 2: the run continues, but not"):
        found = losses(two_devices, folder / "4 to 2", resume=True)
    np.testing.assert_allclose(found, four["whole"], rtol=1e-5)


if __name__ == "__main__":
    of_four(Path(sys.argv[1]))
