"""What is left of a trainer that nothing refers to any more, in processes of its own."""

import gc
import json
import os
import subprocess
import sys
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import looplab

# Trains, evaluates and discards one model after another, and prints what each leaves behind.
PROGRAM = """
import ctypes, gc, json, os, sys, weakref
import keras, numpy as np, tensorflow as tf
import looplab

kind, log_dir, warm_up, count = *sys.argv[1:3], *map(int, sys.argv[3:])
x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
y = x[:, :1] - x[:, 1:2]


def train(number):
    model = keras.Sequential([keras.layers.Dense(16, activation="silu"), keras.layers.Dense(1)])
    settings = {"optimizer": keras.optimizers.Adam(), "loss": "mse", "metrics": ["mae"]}
    if kind == "keras":
        model.compile(**settings)
        trainer = model
    else:
        trainer = looplab.Trainer(model, log_dir=f"{log_dir}/{number}" if number % 2 else None, **settings)
    trainer.fit(x, y, validation_data=(x, y), verbose=0)
    trainer.evaluate(x, y, verbose=0)
    trainer.predict(x, verbose=0)
    return weakref.ref(trainer)


def megabytes():
    gc.collect()
    if sys.platform != "linux":
        return 0.0  # the test that needs it is skipped
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def graphs():
    return sum(isinstance(thing, tf.Graph) for thing in gc.get_objects())


for number in range(warm_up):
    train(number)
gc.collect()
before = megabytes(), graphs()
trainers = [train(warm_up + number) for number in range(count)]
growth = (megabytes() - before[0]) / count
alive = sum(trainer() is not None for trainer in trainers)
print(json.dumps({"megabytes": growth, "graphs": graphs() - before[1], "trainers": alive}))
"""
WARM_UP, COUNT = 4, 6


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What a model trained by Keras, and one trained by looplab, leaves behind."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = {}
    for kind in ("keras", "looplab"):
        command = [sys.executable, "-c", PROGRAM, kind, str(tmp_path_factory.mktemp(kind)), str(WARM_UP), str(COUNT)]
        processes[kind] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    printed = {kind: process.communicate()[0] for kind, process in processes.items()}
    assert [process.returncode for process in processes.values()] == [0, 0]
    return {kind: json.loads(text) for kind, text in printed.items()}


def test_a_discarded_trainer_leaves_no_graph(left):
    assert (left["looplab"]["trainers"], left["looplab"]["graphs"]) == (0, 0), left


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_a_discarded_trainer_leaves_no_more_memory_than_a_discarded_keras_model(left):
    # Keras leaves the graphs of its steps (5 MB and more); both leave TensorFlow's cached kernels, one per variable
    # (0.5 MB). The tolerance is the noise of a process.
    assert left["looplab"]["megabytes"] < left["keras"]["megabytes"] + 0.4, left


@tf.custom_gradient
def tripled(x):
    return tf.identity(x), lambda upstream: 3 * upstream


def test_a_function_first_traced_in_a_step_has_its_gradient_after_the_trainer_is_gone(line):
    @tf.function
    def penalty(x):
        for _ in tf.range(2):
            x = tripled(x)
        return tf.reduce_sum(x)

    class Penalized(looplab.Trainer):
        def train_step(self, batch):
            return super().train_step(batch) | {"penalty": penalty(batch[0])}  # traced here, outside of any tape

    def train():
        trainer = Penalized(keras.Sequential([keras.layers.Dense(1)]), optimizer="sgd", loss="mse")
        trainer.fit(*line, verbose=0)
        return weakref.ref(trainer)

    trainer = train()
    gc.collect()
    assert trainer() is None

    @tf.function
    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = penalty(x)
        return tape.gradient(value, x)

    np.testing.assert_array_equal(slope(tf.ones((2, 2))), np.full((2, 2), 9))


def test_gradients_of_functions_within_a_step_are_their_own(line):
    class Sloped(looplab.Trainer):
        def train_step(self, batch):
            x, _ = batch
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = tf.cond(tf.reduce_sum(x) > 1e9, lambda: x, lambda: tripled(x))
                for _ in tf.range(2):
                    value = tripled(value)
            slope = tape.gradient(value, x)
            return super().train_step(batch) | {"slope": tf.reduce_mean(slope)}

    trainer = Sloped(keras.Sequential([keras.layers.Dense(1)]), optimizer="sgd", loss="mse")
    np.testing.assert_allclose(trainer.fit(*line, verbose=0).history["slope"], [27])
