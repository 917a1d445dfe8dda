"""What users can get wrong, as one table: each row is an error that changes no weights.

A row of `ERRORS` has the type of the error, what its message must contain (the argument in backticks, the value, what
was expected, the fix), and what triggers it. `WARNINGS` has what TensorFlow trains on, and may be intended.
"""

import contextlib
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import looplab
from looplab.checkpoint.store import Store

ROOT = Path(__file__).parent.parent
BATCH = 4
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(12, 4)).astype("float32")  # three batches
LABELS = np.arange(12) % 3
ONE_HOT = np.eye(3, dtype="float32")[LABELS]
TARGETS = RANDOM.normal(size=(12, 3)).astype("float32")
PIXELS = RANDOM.integers(0, 256, (12, 8, 8, 1))
OLDER, NEWEST = "step-4-epoch-1", "step-6-epoch-2"
NAN, INF = float("nan"), float("inf")

expected_weights: list = []  # (model, its weights as they must be in the end); filled by what triggers an error


@pytest.fixture(autouse=True)
def _forget_models():
    yield
    expected_weights.clear()


def sparse(**options):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def categorical():
    return keras.losses.CategoricalCrossentropy(from_logits=True)


def binary():
    return keras.losses.BinaryCrossentropy(from_logits=True)


class Subclassed(keras.Model):
    def __init__(self, activation=None):
        super().__init__()
        self.dense = layers.Dense(3, activation)

    def call(self, x):
        return self.dense(x)


def functional(activation=None):
    inputs = layers.Input((4,))
    return keras.Model(inputs, layers.Dense(3, activation)(inputs))


KINDS = {
    "Sequential": lambda activation=None: keras.Sequential([layers.Dense(3, activation)]),
    "functional": functional,
    "subclassed": Subclassed,
    "own layer of the activation": lambda activation=None: keras.Sequential(
        [layers.Dense(3), layers.Activation(activation)]
    ),
}


def sequential_of_images(*before):
    model = keras.Sequential([*before, layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(3)])
    model.build((None, 8, 8, 1))
    return model


def functional_of_images():
    inputs = layers.Input((8, 8, 1))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(layers.Conv2D(2, 3)(inputs))))


class OfImages(keras.Model):
    def __init__(self):
        super().__init__()
        self.parts = [layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(3)]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def subclassed_of_images():
    model = OfImages()
    model(tf.zeros((1, 8, 8, 1)))
    return model


def images_to_labels():
    inputs = layers.Input((8, 8, 1))
    return keras.Model(inputs, layers.Conv2D(3, 2, strides=2)(inputs))


def of_three_bits():
    return keras.Sequential([layers.Input((4,)), layers.Dense(3, "sigmoid")])


def two_outputs():
    inputs = layers.Input((4,))
    return keras.Model(inputs, {"kind": layers.Dense(3)(inputs), "height": layers.Dense(1)(inputs)})


def z_and_a(form=list):
    """Outputs whose order is not that of their names: bits and a class."""
    inputs = layers.Input((4,))
    outputs = {
        "z": layers.Dense(3, "sigmoid", name="z")(inputs),
        "a": layers.Dense(3, "softmax", name="a")(inputs),
    }
    return keras.Model(inputs, outputs if form is dict else form(outputs.values()))


def z_alone():
    inputs = layers.Input((4,))
    return keras.Model(inputs, layers.Dense(3, "sigmoid", name="z")(inputs))


def two_losses():
    return {"kind": sparse(), "height": "mse"}


def two_targets(kind):
    return {"kind": kind, "height": TARGETS[:, :1]}


def trainer(model=None, loss=None, optimizer=None, kind=looplab.Trainer, **options):
    """A trainer whose model must stay as it is."""
    model = functional() if model is None else model
    expected_weights.append((model, model.get_weights()))
    loss = sparse() if loss is None else loss
    return kind(model, optimizer=optimizer or keras.optimizers.SGD(0.1), loss=loss, **options)


def batches(x, y=None):
    parts = x if y is None else (x, y)
    return tf.data.Dataset.from_tensor_slices(parts).batch(BATCH)


def in_tuples(y):
    """For a dataset, which makes one tensor of a list."""
    return tuple(y) if isinstance(y, list) else y


def fit(x, y, make_model=functional, loss=None, **options):
    """Trains on arrays: what is wrong is found before the first step."""
    trainer(make_model(), loss).fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, **options)


def fit_batches(dataset, make_model=functional, loss=None, good=0, **options):
    """Trains on a dataset whose batch after `good` ones is wrong: what those taught is what the model must know."""
    pair = []
    for _ in range(2):
        keras.utils.set_random_seed(1)
        pair.append(make_model())
        if not pair[-1].built:
            pair[-1](X[:1])
    tested = trainer(pair[0], loss, **options)
    if good:
        taught = trainer(pair[1], loss, **options)
        taught.fit(dataset.take(good), verbose=0)
        assert taught.steps == good
        expected_weights[:] = [(tested.model, taught.get_weights())]
    try:
        tested.fit(dataset, verbose=0)
    finally:
        assert tested.steps == good


def changed(array, index, value):
    """A copy with another value at one place, as floating numbers if the value is no whole one."""
    array = np.array(array)
    if isinstance(value, float) and array.dtype.kind != "f":
        array = array.astype("float32")
    array[index] = value
    return array


BITS, CLASS = "binary_crossentropy", "sparse_categorical_crossentropy"
STRUCTURES = {  # in which Keras lets losses and targets meet outputs: model, losses, y of z and a, where z is in that
    "list of outputs, dicts": (z_and_a, {"a": CLASS, "z": BITS}, lambda z, a: {"a": a, "z": z}, "['z']"),
    "list of outputs, dict of losses": (z_and_a, {"a": CLASS, "z": BITS}, lambda z, a: [z, a], "[0]"),
    "list of outputs, dict of targets": (z_and_a, [BITS, CLASS], lambda z, a: {"a": a, "z": z}, "['z']"),
    "list of outputs, one without a loss": (z_and_a, [BITS, None], lambda z, a: [z], "[0]"),
    "tuple of outputs": (lambda: z_and_a(tuple), (BITS, CLASS), lambda z, a: [z, a], "[0]"),
    "dict of outputs, list of losses": (
        *(lambda: z_and_a(dict), [CLASS, BITS]),  # in the order of the keys
        *(lambda z, a: {"z": z, "a": a}, "['z']"),
    ),
    "dict of outputs, lists": (lambda: z_and_a(dict), [CLASS, BITS], lambda z, a: [a, z], "[1]"),
    "dict of outputs, list of targets": (
        *(lambda: z_and_a(dict), {"z": BITS, "a": CLASS}),
        *(lambda z, a: [a, z], "[1]"),
    ),
    "one output, list of a loss": (z_alone, [BITS], lambda z, a: z, ""),
    "one output, lists": (z_alone, [BITS], lambda z, a: [z], "[0]"),
    "one output, list of targets": (z_alone, BITS, lambda z, a: [z], "[0]"),
    "one output, dict of a loss": (z_alone, {"z": BITS}, lambda z, a: z, ""),
}


class Place:
    """Where a row may write, and a run which was was saved after the steps 4 and 6."""

    def __init__(self, folder, run):
        self.folder, self._run = folder, run

    def run(self):
        return Path(shutil.copytree(self._run, self.folder / "run"))


def resume(run, model=None, epochs=2, resume=True, seed=None, batch_size=BATCH, **options):
    tested = trainer(model, log_dir=run, seed=seed, checkpoint=looplab.Checkpoint(every=4, keep=3))
    if model is None:  # so that only a checkpoint can bring the weights of the run
        tested.model.set_weights([weight + 1 for weight in tested.model.get_weights()])
        expected_weights[-1] = (tested.model, tested.model.get_weights())
    x, y = options.pop("data", (X, LABELS))
    tested.fit(x, y, batch_size=batch_size, epochs=epochs, resume=resume, verbose=0, **options)
    return tested


def built(place):
    tested = trainer(log_dir=place.run())
    tested.build(X, LABELS)
    return tested


def of_one(dataset):
    tested = trainer()
    try:
        tested.fit(lambda epoch: dataset, epochs=2, verbose=0)
    finally:
        assert tested.steps == 3
        expected_weights[:] = [(tested.model, tested.get_weights())]


def fit_skipping(steps):
    tested = trainer()
    tested.skip_nonfinite = steps
    tested.fit(X, LABELS, verbose=0)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    keras.utils.set_random_seed(0)
    run = tmp_path_factory.mktemp("saved") / "run"
    tested = looplab.Trainer(
        functional(),
        optimizer=keras.optimizers.SGD(0.1),
        loss=sparse(),
        seed=1,
        log_dir=run,
        checkpoint=looplab.Checkpoint(every=4, keep=3),
    )
    tested.fit(X, LABELS, batch_size=BATCH, epochs=2, verbose=0)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [OLDER, NEWEST]
    np.savez(run.parent / "weights.npz", *tested.model.get_weights())
    return run


def weights_of(saved_run):
    with np.load(saved_run.parent / "weights.npz") as file:
        return list(file.values())


def without_log_dir(run):
    shutil.rmtree(run)
    run.write_text("a file")
    return run


def without(run, name):
    shutil.rmtree(run / name)
    return run


def of_keras(run):
    model = keras.Sequential([layers.Input((4,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 4)), np.ones((4, 1)), callbacks=[keras.callbacks.TensorBoard(run)], verbose=0)
    return run


HOLD = """
import sys, time
import keras, numpy as np, looplab

class Hold(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        print("held", flush=True)
        time.sleep(600)

model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
looplab.Trainer(model, optimizer="sgd", loss="mse", log_dir=sys.argv[1], seed=1).fit(
    np.ones((4, 4)), np.ones((4, 1)), verbose=0, callbacks=[Hold()]
)
"""


@contextlib.contextmanager
def another_process(log_dir):
    """One that trains there, and is killed in the end."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(log_dir)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            assert process.stdout.readline() == "held\n", process.stderr.read()
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def in_use(place):
    """The error of `fit` while another process trains there; once that is killed the folder is free."""

    def model():
        return keras.Sequential([layers.Input((4,)), layers.Dense(1)])

    caught = None
    with another_process(place.folder / "run") as process:
        for go_on in (True, False):
            try:
                tested = trainer(model(), "mse", keras.optimizers.SGD(0.01), log_dir=place.folder / "run", seed=1)
                tested.fit(np.ones((4, 4)), np.ones((4, 1)), resume=go_on, verbose=0)
            except ValueError as error:
                if go_on:
                    caught = error
    assert f"process {process.pid} on" in str(caught)
    free = looplab.Trainer(model(), optimizer="sgd", loss="mse", log_dir=place.folder / "run", seed=1)
    free.fit(np.ones((4, 4)), np.ones((4, 1)), resume=True, verbose=0)
    assert free.steps == 1
    raise caught


def newest(run):
    return run / "checkpoints" / NEWEST


def rewrite_manifest(run, **values):
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | values))
    return run


def endless():
    return batches(X, LABELS).repeat()


def batches_with_an_empty_one():
    parts = [slice(0, 4), slice(4, 8), slice(0, 0), slice(8, 12)]
    signature = tf.TensorSpec((None, 4)), tf.TensorSpec((None,), tf.int64)
    return tf.data.Dataset.from_generator(lambda: ((X[p], LABELS[p]) for p in parts), output_signature=signature)


class VectorLoss(looplab.Trainer):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return tf.reduce_sum(tf.square(y_pred), -1)


class NoLoss(looplab.Trainer):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return None


class NoGradient(looplab.Trainer):
    def train_step(self, batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(batch[0])
        self.minimize(tape, loss)
        return {"loss": loss}


class TwoValues(looplab.Trainer):
    def train_step(self, batch):
        logs = super().train_step(batch)
        self.log("loss", logs["loss"])
        return logs


class MeasuredLayer(layers.Layer):
    def __init__(self):
        super().__init__()
        self.size = keras.metrics.Mean(name="size")

    def call(self, x):
        self.size.update_state(x)
        return x


def npz(place, save=np.savez, **changed):
    """A data file of a few small images."""
    arrays = {"x_train": np.zeros((6, 3, 3), "uint8"), "y_train": np.zeros(6, "uint8")}
    arrays |= {"x_test": np.zeros((4, 3, 3), "uint8"), "y_test": np.zeros(4, "uint8")}
    path = place.folder / "mnist.npz"
    save(path, **(arrays | changed))
    return path


def load(path):
    looplab.Data("mnist", data_dir=str(path.parent)).load((3, 3))


def cut(path, part=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    return path


def measured_twice():
    return keras.Sequential([layers.Input((4,)), MeasuredLayer(), MeasuredLayer(), layers.Dense(3)])


class Trap:
    """Unpickling it ends the tests."""

    def __reduce__(self):
        return os._exit, (99,)


def overwritten(path, content):
    path.write_bytes(content)
    return path


CLASSES = "`y` must be whole numbers from 0 to 2, the classes of the outputs"
UNTAUGHT = "Nothing was learned from that batch."
BATCH_3 = ["step 3 (batch 3 of epoch 1)", UNTAUGHT]
INFINITE = ["not finite", "at step 3 (batch 3 of epoch 1)", "The update was not made"]

ERRORS = {
    # Nothing to learn from.
    "empty arrays": (ValueError, ["`x` is empty", "0 examples", "at least one"], lambda _: fit(X[:0], LABELS[:0])),
    "empty dataset": (
        ValueError,
        ["`x` is an empty dataset", "at least one batch"],
        lambda _: fit_batches(batches(X, LABELS).take(0)),
    ),
    "empty dataset of unknown length": (
        ValueError,
        ["`train_step` has no batch", "at least one"],
        lambda _: fit_batches(batches(X, LABELS).filter(lambda x, y: False)),
    ),
    "empty validation arrays": (
        ValueError,
        ["`validation_data` is empty", "0 examples", "at least one"],
        lambda _: fit(X, LABELS, validation_data=(X[:0], LABELS[:0])),
    ),
    "empty validation dataset": (
        ValueError,
        ["`validation_data` is an empty dataset", "at least one batch"],
        lambda _: fit(X, LABELS, validation_data=batches(X, LABELS).take(0)),
    ),
    "validation split that leaves nothing": (
        ValueError,
        ["`validation_split=0.99` of 12 examples", "at least 1"],
        lambda _: fit(X, LABELS, validation_split=0.99),
    ),
    "batch without rows": (
        ValueError,
        ["no rows", "filter empty ones out", *BATCH_3],
        lambda _: fit_batches(batches_with_an_empty_one(), good=2),
    ),
    "batch without rows in one graph call with others": (
        ValueError,
        ["no rows", "filter empty ones out", *BATCH_3],
        lambda _: fit_batches(batches_with_an_empty_one(), good=2, steps_per_execution=10),
    ),
    # Labels.
    **{
        f"label {label} in arrays": (
            ValueError,
            [CLASSES, f"{label:.3g}"[:3], "index 9", "1 in all"],
            lambda _, label=label: fit(X, changed(LABELS, 9, label)),
        )
        for label in (3, 255, -1, 1.7, NAN)
    },
    **{
        f"label {label} in a dataset": (
            ValueError,
            [CLASSES, f"{label:.3g}"[:3], *BATCH_3],
            lambda _, label=label: fit_batches(batches(X, changed(LABELS, 9, label)), good=2),
        )
        for label in (3, 255, -1, 1.7)
    },
    "label NaN in a dataset": (
        ValueError,
        [CLASSES, "`y` itself is not finite, first in row 1", *BATCH_3],
        lambda _: fit_batches(batches(X, changed(LABELS, 9, NAN)), good=2),
    ),
    "label 3 in a dataset, ten steps in a graph call": (
        ValueError,
        [CLASSES, "`y` is from 1 to 3", *BATCH_3],
        lambda _: fit_batches(batches(X, changed(LABELS, 9, 3)), good=2, steps_per_execution=10),
    ),
    "label 3 in a dataset, compiled by XLA": (
        ValueError,
        [CLASSES, *BATCH_3],
        lambda _: fit_batches(batches(X, changed(LABELS, 9, 3)), good=2, jit_compile=True),
    ),
    "label 3 in a dataset, run eagerly": (
        ValueError,
        [CLASSES, *BATCH_3],
        lambda _: fit_batches(batches(X, changed(LABELS, 9, 3)), good=2, run_eagerly=True),
    ),
    "label 3 in a dataset, to a subclassed model": (
        ValueError,
        [CLASSES, *BATCH_3],
        lambda _: fit_batches(batches(X, changed(LABELS, 9, 3)), KINDS["subclassed"], good=2),
    ),
    "label 3 in validation arrays": (
        ValueError,
        [CLASSES, "got 3", "index 9", "`validation_data`"],
        lambda _: fit(X, LABELS, validation_data=(X, changed(LABELS, 9, 3))),
    ),
    "label 3 in arrays to evaluate": (
        ValueError,
        [CLASSES, "`y` is from 1 to 3", "batch 3 of an evaluation"],
        lambda _: trainer().evaluate(X, changed(LABELS, 9, 3), batch_size=BATCH, verbose=0),
    ),
    "label beside the ignored class": (
        ValueError,
        [CLASSES, "got -2", "index 9"],
        lambda _: fit(X, changed(changed(LABELS, 3, -1), 9, -2), loss=sparse(ignore_class=-1)),
    ),
    "label beside the ignored class in a dataset": (
        ValueError,
        [CLASSES, "`y` is from -2", *BATCH_3],
        lambda _: fit_batches(batches(X, changed(changed(LABELS, 3, -1), 9, -2)), loss=sparse(ignore_class=-1), good=2),
    ),
    "label of one of several outputs in arrays": (
        ValueError,
        ["`y['kind']` must be whole numbers from 0 to 2", "got 3", "index 9"],
        lambda _: fit(X, two_targets(changed(LABELS, 9, 3)), two_outputs, two_losses()),
    ),
    "label of one of several outputs in a dataset": (
        ValueError,
        ["`y['kind']` must be whole numbers from 0 to 2", *BATCH_3],
        lambda _: fit_batches(batches(X, two_targets(changed(LABELS, 9, 3))), two_outputs, two_losses(), good=2),
    ),
    "one-hot targets to a loss of labels": (
        ValueError,
        ["`loss` sparse_categorical_crossentropy", "got `y` of shape (None, 3)", "one-hot", "argmax"],
        lambda _: fit(X, ONE_HOT),
    ),
    "one-hot targets to a loss of labels in a dataset": (
        ValueError,
        ["`loss` sparse_categorical_crossentropy", "got `y` of shape (None, 3)", "one-hot", "argmax"],
        lambda _: fit_batches(batches(X, ONE_HOT)),
    ),
    "labels to a loss of one-hot targets": (
        ValueError,
        ["`loss` categorical_crossentropy", "got `y` of shape (None,)", "labels", "to_categorical"],
        lambda _: fit(X, LABELS, loss=categorical()),
    ),
    "labels in a column to a loss of one-hot targets": (
        ValueError,
        ["`loss` categorical_crossentropy", "got `y` of shape (None, 1)", "labels", "to_categorical"],
        lambda _: fit(X, LABELS[:, None], loss=categorical()),
    ),
    "labels to a loss of one-hot targets in a dataset": (
        ValueError,
        ["`loss` categorical_crossentropy", "got `y` of shape (None,)", "labels", "to_categorical"],
        lambda _: fit_batches(batches(X, LABELS), loss=categorical()),
    ),
    "binary targets from 0 to 255": (
        ValueError,
        ["`y` must be from 0 to 1", "got 255", "index 0"],
        lambda _: fit(X, np.full((12, 3), 255), loss=binary()),
    ),
    "binary targets from 0 to 255 in a dataset": (
        ValueError,
        ["`y` must be from 0 to 1", "`y` is from 1 to 255", *BATCH_3],
        lambda _: fit_batches(batches(X, changed(np.ones((12, 3), "int64"), 9, 255)), loss=binary(), good=2),
    ),
    "one-hot targets of 255": (
        ValueError,
        ["`y` must be from 0 to 1", "255", "index 0"],
        lambda _: fit(X, 255 * ONE_HOT, loss=categorical()),
    ),
    **{
        f"targets of 255 to {loss}": (
            ValueError,
            ["`y` must be from 0 to 1", "255", "index 0"],
            lambda _, loss=loss: fit(X, 255 * ONE_HOT, lambda: functional("softmax"), loss),
        )
        for loss in ("kl_divergence", "dice", "tversky")
    },
    "binary target beyond rounding": (
        ValueError,
        ["`y` must be from 0 to 1", "1.00", "index 9"],
        lambda _: fit(X, changed(ONE_HOT, (9, 0), 1.01), loss=binary()),
    ),
    **{
        f"targets of 255, {form}": (
            ValueError,
            [f"`y{where}` must be from 0 to 1", "255", "index 0"],
            lambda _, make=make, loss=loss, y=y: fit(X, y(255 * ONE_HOT, LABELS), make, loss),
        )
        for form, (make, loss, y, where) in STRUCTURES.items()
    },
    **{
        f"target of 255 in a dataset, {form}": (
            ValueError,
            [f"`y{where}` must be from 0 to 1", "is from 0 to 255", *BATCH_3],
            lambda _, make=make, loss=loss, y=y: fit_batches(
                batches(X, in_tuples(y(changed(ONE_HOT, (9, 0), 255), LABELS))), make, loss, good=2
            ),
        )
        for form, (make, loss, y, where) in STRUCTURES.items()
        if form.endswith("dicts")
    },
    **{
        f"one target for several outputs, {loss}": (
            ValueError,
            ["`loss` compares", "got `y` of shape (None,), with outputs of shape (None, 3)", "one shape"],
            lambda _, loss=loss: fit(X, LABELS % 2, loss=loss),
        )
        for loss in ("mse", "binary_crossentropy", "huber")
    },
    # Parts of the data.
    "x and y of different length": (
        ValueError,
        ["`x` has 12", "`y` has 11", "same number"],
        lambda _: fit(X, LABELS[:11]),
    ),
    "sample_weight of another length": (
        ValueError,
        ["`x` has 12", "`sample_weight` has 3", "same number"],
        lambda _: fit(X, LABELS, sample_weight=np.ones(3)),
    ),
    "objects": (
        TypeError,
        ["`x`", "got an array of objects", "one shape and type"],
        lambda _: fit(X.astype(object), LABELS),
    ),
    "objects as targets": (
        TypeError,
        ["`y`", "got an array of objects", "one shape and type"],
        lambda _: fit(X, np.array([None, *LABELS[1:]])),
    ),
    "strings": ((TypeError, ValueError), ["`x`", "string", "numbers"], lambda _: fit(X.astype(str), LABELS)),
    "strings as targets": (
        (TypeError, ValueError),
        ["`y`", "string", "numbers"],
        lambda _: fit(X, LABELS.astype(str)),
    ),
    "strings as targets in a dataset": (
        (TypeError, ValueError),
        ["`y`", "string", "numbers"],
        lambda _: fit_batches(batches(X, LABELS.astype(str))),
    ),
    "batch of four parts": (
        ValueError,
        ["batch must be x, (x, y) or (x, y, sample_weight)", "got one of 4 parts", "dict", "override the step"],
        lambda _: fit_batches(tf.data.Dataset.from_tensor_slices((X, LABELS, LABELS, LABELS)).batch(BATCH)),
    ),
    "no y": (
        ValueError,
        ["`loss`", "needs targets", "no y", "Pass y", "`loss=None`"],
        lambda _: fit(X, None),
    ),
    "no y in a dataset": (
        ValueError,
        ["`loss`", "needs targets", "no y", "(x, y)"],
        lambda _: fit_batches(batches(X)),
    ),
    "endless dataset": (
        ValueError,
        ["`x` is an endless dataset", "`steps_per_epoch`"],
        lambda _: fit_batches(endless()),
    ),
    "endless validation dataset": (
        ValueError,
        ["`validation_data` is an endless dataset", "`validation_steps`"],
        lambda _: fit(X, LABELS, validation_data=endless()),
    ),
    **{
        f"{model.__name__} of 8×8×1, given {'×'.join(map(str, shape))}": (
            ValueError,
            ["incompatible" if model is subclassed_of_images else "`x`", "8"],
            lambda _, model=model, shape=shape: fit(np.zeros((12, *shape), "float32"), LABELS, model),
        )
        for model in (functional_of_images, sequential_of_images, subclassed_of_images)
        for index, shape in enumerate([(9, 8, 1), (8, 9, 1), (8, 8, 3)])
    },
    "features of another width": (
        ValueError,
        ["`x`", "(None, 4)", "(None, 3)"],
        lambda _: fit(X[:, :3], LABELS),
    ),
    "features of another width in a dataset": (
        ValueError,
        ["`x`", "(None, 4)", "(None, 3)"],
        lambda _: fit_batches(batches(X[:, :3], LABELS)),
    ),
    "function that returns one shuffled dataset for all epochs": (
        ValueError,
        ["`x` returned one dataset for the epochs 0 and 1", "within the function"],
        lambda _: of_one(batches(X, LABELS).shuffle(9, seed=1)),
    ),
    # Numbers that are not finite.
    **{
        f"{value} in features": (
            ValueError,
            ["`x` must be finite", "first at index 9", "replace"],
            lambda _, value=value: fit(changed(X, (9, 1), value), LABELS),
        )
        for value in (NAN, INF)
    },
    **{
        f"{value} in features of a dataset": (
            FloatingPointError,
            [*INFINITE, "`x` itself is not finite, first in row 1", "`trainer.skip_nonfinite"],
            lambda _, value=value: fit_batches(batches(changed(X, (9, 1), value), LABELS), good=2),
        )
        for value in (NAN, INF)
    },
    "NaN in features of a dataset, ten steps in a graph call": (
        FloatingPointError,
        [*INFINITE, "`x` itself is not finite, first in row 1"],
        lambda _: fit_batches(batches(changed(X, (9, 1), NAN), LABELS), good=2, steps_per_execution=10),
    ),
    "NaN in validation features": (
        ValueError,
        ["`validation_data` must be finite", "first at index 9"],
        lambda _: fit(X, LABELS, validation_data=(changed(X, (9, 1), NAN), LABELS)),
    ),
    "loss NaN": (
        FloatingPointError,
        [*INFINITE, "loss = nan", "loss/mse = nan"],
        lambda _: fit_batches(batches(X, changed(TARGETS, (9, 1), NAN)), loss="mse", good=2),
    ),
    "loss infinite": (
        FloatingPointError,
        [*INFINITE, "loss = inf", "global_clipnorm"],
        lambda _: fit_batches(batches(X, changed(TARGETS, (9, 1), 1e30)), loss="mse", good=2),
    ),
    # The step.
    "loss of each example": (
        ValueError,
        ["`loss` must be one floating number", "got shape (None,) and dtype float32", "`tf.reduce_mean`"],
        lambda _: trainer(kind=VectorLoss).fit(X, LABELS, verbose=0),
    ),
    "loss None": (
        ValueError,
        ["`loss` is None", "`compute_loss`"],
        lambda _: trainer(kind=NoLoss).fit(X, LABELS, verbose=0),
    ),
    "no gradient": (
        ValueError,
        ["none of the 2 `variables`", "kernel", "no gradient", "`tf.GradientTape`"],
        lambda _: trainer(kind=NoGradient).fit(X, LABELS, verbose=0),
    ),
    "one name logged twice": (
        ValueError,
        ["`train_step` has two values named 'loss'", "returned by `train_step`", "`self.log`", "Rename"],
        lambda _: trainer(kind=TwoValues).fit(X, LABELS, verbose=0),
    ),
    "one metric name used twice": (
        ValueError,
        ["'size'", "the result of metric 'size'", "Rename"],
        lambda _: fit(X, LABELS, measured_twice),
    ),
    "metric with the name of the loss": (
        ValueError,
        ["'loss'", "the loss", "of `metrics`", "Rename"],
        lambda _: trainer(metrics=[keras.metrics.SparseCategoricalAccuracy("loss")]).fit(X, LABELS, verbose=0),
    ),
    # Numbers in arguments.
    **{
        f"{name}={value}": (
            ValueError,
            [f"`{name}` must be a whole number of at least 1", f"got {value!r}"],
            lambda _, name=name, value=value: trainer().fit(X, LABELS, **{name: value}),
        )
        for name, value in itertools.product(
            ("epochs", "batch_size", "steps_per_epoch", "validation_steps", "validation_batch_size", "validation_freq"),
            (0, -1, True, 1.5, np.array([1])),
        )
        if not (name == "validation_freq" and np.ndim(value))
    },
    **{
        f"initial_epoch={value}": (
            ValueError,
            ["`initial_epoch` must be a whole number of at least 0", f"got {value!r}"],
            lambda _, value=value: trainer().fit(X, LABELS, initial_epoch=value),
        )
        for value in (-1, True, 1.0, None)
    },
    "epochs=None": (
        ValueError,
        ["`epochs` must be a whole", "got None"],
        lambda _: trainer().fit(X, LABELS, epochs=None),
    ),
    **{
        f"{method} with {name}={value}": (
            ValueError,
            [f"`{name}` must be a whole number of at least 1", f"got {value!r}"],
            lambda _, method=method, name=name, value=value: getattr(trainer(), method)(X, **{name: value}),
        )
        for method, name, value in itertools.product(
            ("evaluate", "predict"), ("batch_size", "steps"), (0, -1, True, 2.0)
        )
    },
    **{
        f"steps_per_execution={value}": (
            ValueError,
            ["`steps_per_execution`", '"auto"', "at least 1", f"got {value!r}"],
            lambda _, value=value: looplab.Trainer(functional(), steps_per_execution=value),
        )
        for value in (0, -1, True, 1.5, None, "fast")
    },
    **{
        f"{name}={value}": (
            ValueError,
            [f"`{name}` must be True, False{others}; got {value!r}."],
            lambda _, name=name, value=value: looplab.Trainer(functional(), **{name: value}),
        )
        for (name, others), value in itertools.product(
            (("jit_compile", ', None or "auto"'), ("run_eagerly", " or None")), ("no", 1, 0.5, [])
        )
    },
    "fused_updates=yes": (
        ValueError,
        ["`fused_updates` must be True or False; got 'yes'."],
        lambda _: looplab.Trainer(functional(), fused_updates="yes"),
    ),
    **{
        f"learning_rate={rate}": (
            ValueError,
            ["`learning_rate` of `optimizer`", "finite number of at least 0", f"got {rate}"],
            lambda _, rate=rate: trainer(optimizer=keras.optimizers.SGD(rate)).fit(X, LABELS, verbose=0),
        )
        for rate in (-0.1, NAN, INF)
    },
    "negative learning_rate beneath loss scaling": (
        ValueError,
        ["`learning_rate` of `optimizer`", "at least 0", "got -1.0"],
        lambda _: trainer(optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(-1.0))).fit(
            X, LABELS, verbose=0
        ),
    ),
    **{
        f"Checkpoint(every={every!r})": (
            ValueError,
            ["`every` must be", "at least 1", '"epoch"', f"got {every!r}"],
            lambda _, every=every: looplab.Checkpoint(every=every),
        )
        for every in (
            0,
            -5,
            True,
            1.5,
            None,
            "",
            "0 steps",
            "000 epochs",
            "-1 steps",
            "5 parsecs",
            "steps 5",
            "1.5 epochs",
        )
    },
    **{
        f"Checkpoint(keep={keep!r})": (
            ValueError,
            ["`keep` must be a whole number of at least 1", f"got {keep!r}"],
            lambda _, keep=keep: looplab.Checkpoint(keep=keep),
        )
        for keep in (0, -1, True, 1.0, "2", None)
    },
    'Checkpoint(mode="min") without a monitor': (
        ValueError,
        ["`mode` is 'min', but there is no `monitor`"],
        lambda _: looplab.Checkpoint(mode="min"),
    ),
    "checkpoint without a folder": (
        ValueError,
        ["`checkpoint` needs `log_dir`"],
        lambda _: looplab.Trainer(functional(), checkpoint=looplab.Checkpoint(every=5)),
    ),
    **{
        f"skip_nonfinite={value!r}": (
            ValueError,
            ["`skip_nonfinite` must be a whole number of at least 0", f"got {value!r}"],
            lambda _, value=value: fit_skipping(value),
        )
        for value in (-1, True, 1.5, "3")
    },
    **{
        f"class_weight of {key!r}": (
            ValueError,
            ["`class_weight` must be a dict from classes, which are whole numbers", f"{key!r}"],
            lambda _, key=key: fit(X, LABELS, class_weight={key: 2.0}),
        )
        for key in ("a", True, 1.5)
    },
    "class_weight for several targets of each example": (
        ValueError,
        ["`class_weight` needs one class for each example", "(None, 3)", "`sample_weight`"],
        lambda _: fit(X, ONE_HOT, of_three_bits, "binary_crossentropy", class_weight={0: 1.0, 1: 2.0}),
    ),
    'Checkpoint(mode="best")': (
        ValueError,
        ["`mode` must be", '"min"', '"max"', "got 'best'"],
        lambda _: looplab.Checkpoint(mode="best"),
    ),
    "Checkpoint(monitor=3)": (
        ValueError,
        ["`monitor` must be a name", "got 3"],
        lambda _: looplab.Checkpoint(monitor=3),
    ),
    "checkpoint that is none": (
        TypeError,
        ["`checkpoint` must be a `looplab.Checkpoint`", "got 'epoch'"],
        lambda _: looplab.Trainer(functional(), checkpoint="epoch"),
    ),
    "monitor that no epoch logs": (
        ValueError,
        ["`monitor`", "got 'val_loss'", "'loss'"],
        lambda place: trainer(log_dir=place.folder / "run", checkpoint=looplab.Checkpoint(monitor="val_loss")).fit(
            X, LABELS, verbose=0
        ),
    ),
    "model that is a class": (
        TypeError,
        ["`model` must be a Keras model or layer", "got the class Subclassed", "create a model of it"],
        lambda _: looplab.Trainer(Subclassed, loss="mse"),
    ),
    "model that is no function": (
        TypeError,
        ["`model` must be a Keras model or layer", "got 'vae'"],
        lambda _: looplab.Trainer("vae"),
    ),
    "train_on_batch(dataset)": (
        TypeError,
        ["`x` must be one batch, an array", "got _TensorSliceDataset"],
        lambda _: trainer().train_on_batch(tf.data.Dataset.from_tensor_slices((X, LABELS))),
    ),
    # Names of arguments.
    "Trainer(optimiser=…)": (
        TypeError,
        ["`Trainer` has no argument `optimiser`", "did you mean `optimizer`"],
        lambda _: looplab.Trainer(functional(), optimiser="sgd"),
    ),
    "Trainer(logdir=…)": (
        TypeError,
        ["`Trainer` has no argument `logdir`", "did you mean `log_dir`"],
        lambda _: looplab.Trainer(functional(), logdir="run"),
    ),
    "fit(epoch=…)": (
        TypeError,
        ["`Trainer.fit` has no argument `epoch`", "did you mean `epochs`"],
        lambda _: fit(X, LABELS, epoch=3),
    ),
    "fit(workers=…)": (
        TypeError,
        ["`Trainer.fit` has no argument `workers`", "it has x, y, batch_size"],
        lambda _: fit(X, LABELS, workers=3),
    ),
    "evaluate(epochs=…)": (
        TypeError,
        ["`Trainer.evaluate` has no argument `epochs`", "it has x, y, batch_size"],
        lambda _: trainer().evaluate(X, LABELS, epochs=2),
    ),
    "evaluate(batchsize=…)": (
        TypeError,
        ["`Trainer.evaluate` has no argument `batchsize`", "did you mean `batch_size`"],
        lambda _: trainer().evaluate(X, LABELS, batchsize=3),
    ),
    "predict(batch=…)": (
        TypeError,
        ["`Trainer.predict` has no argument `batch`", "did you mean `batch_size`"],
        lambda _: trainer().predict(X, batch=3),
    ),
    "Checkpoint(evry=…)": (
        TypeError,
        ["`Checkpoint` has no argument `evry`", "did you mean `every`"],
        lambda _: looplab.Checkpoint(evry=3),
    ),
    # The folder.
    "log_dir that is a file": (
        ValueError,
        ["`log_dir`", "must be a folder", "is a file"],
        lambda place: trainer(log_dir=without_log_dir(place.run())).fit(X, LABELS, verbose=0),
    ),
    "log_dir that is a file, to resume": (
        ValueError,
        ["`log_dir` must be a folder", "is a file", "another folder"],
        lambda place: resume(without_log_dir(place.run())),
    ),
    "log_dir that cannot be made": (
        ValueError,
        ["`log_dir` /proc/looplab cannot be written to", "another folder"],
        lambda _: trainer(log_dir="/proc/looplab").fit(X, LABELS, verbose=0),
    ),
    "log_dir that holds another run": (
        ValueError,
        ["`log_dir`", "holds the run of another trainer", "`fit(..., resume=True)`", "new folder"],
        lambda place: resume(place.run(), resume=False),
    ),
    "log_dir that holds another run, without its event files": (
        ValueError,
        ["`log_dir`", "holds the run of another trainer"],
        lambda place: resume(without(place.run(), "train"), resume=False),
    ),
    "log_dir to resume in, with event files of Keras": (
        ValueError,
        ["`resume`: `log_dir`", "event files that looplab did not write", "new folder"],
        lambda place: resume(of_keras(place.folder / "run")),
    ),
    "log_dir in use by another process": (ValueError, ["`log_dir`", "is in use by process", "another folder"], in_use),
    "resume without log_dir": (
        ValueError,
        ["`resume`", "`log_dir`"],
        lambda _: trainer().fit(X, LABELS, resume=True, verbose=0),
    ),
    "resume that is a folder": (
        TypeError,
        ["`resume` must be True or False", "got 'run'", "`log_dir`"],
        lambda place: trainer(log_dir=place.folder / "run").fit(X, LABELS, resume="run", verbose=0),
    ),
    # Checkpoints.
    "all checkpoints of another architecture": (
        ValueError,
        ["checkpoint", "of another architecture", "(4, 3) float32", "(4, 5) float32", "`load_weights`"],
        lambda place: resume(place.run(), keras.Sequential([layers.Input((4,)), layers.Dense(5), layers.Dense(3)])),
    ),
    "all checkpoints of a newer format": (
        ValueError,
        ["step-6-epoch-2 has format 2", "reads up to 1", "install a newer one"],
        lambda place: resume(rewrite_manifest(place.run(), format=2)),
    ),
    "all checkpoints of an unknown format": (
        ValueError,
        ["no checkpoint in", "manifest.json is malformed", "another `log_dir`"],
        lambda place: resume(rewrite_manifest(place.run(), format="new")),
    ),
    "restoring the best without a monitor": (
        ValueError,
        ['`restore("best")` needs a `monitor`'],
        lambda place: built(place).restore("best"),
    ),
    "restoring from a folder that is no checkpoint": (
        ValueError,
        ["checkpoint", "manifest.json is missing"],
        lambda place: built(place).restore(place.folder),
    ),
    "restoring from what is not there": (
        ValueError,
        ['`checkpoint` must be "newest", "best" or an existing folder', "got 'last'"],
        lambda place: built(place).restore("last"),
    ),
    "restoring before there are variables": (
        ValueError,
        ["`restore` needs all variables", "`build`"],
        lambda place: trainer(log_dir=place.run()).restore("newest"),
    ),
    "resuming with another seed": (
        ValueError,
        ["`resume`", "has seed 1", "now it is 2", "another `log_dir`"],
        lambda place: resume(place.run(), seed=2),
    ),
    "resuming with another batch_size": (
        ValueError,
        ["`resume`", "has batch_size 4", "now it is 3", "another `log_dir`"],
        lambda place: resume(place.run(), batch_size=3),
    ),
    "resuming with fewer examples": (
        ValueError,
        ["`resume`", "has examples 12", "now it is 11", "another `log_dir`"],
        lambda place: resume(place.run(), data=(X[:11], LABELS[:11])),
    ),
    "resuming without shuffling": (
        ValueError,
        ["`resume`", "has shuffle True", "now it is False", "another `log_dir`"],
        lambda place: resume(place.run(), shuffle=False),
    ),
    "resuming with a dataset that shuffles without a seed": (
        ValueError,
        ["`x` has `shuffle` without a `seed`", "`dataset.shuffle(1000, seed=0)`"],
        lambda place: shuffled(place, resume=True),
    ),
    # Data files.
    **{
        f"{save.__name__} file of which {part:.0%} are there": (
            ValueError,
            ["`data_dir`", "mnist.npz is damaged", "Download it again"],
            lambda place, save=save, part=part: load(cut(npz(place, save), part)),
        )
        for save in (np.savez, np.savez_compressed)
        for part in (0, 0.5, 0.99)
    },
    "data file that is a pickle": (
        ValueError,
        ["`data_dir`", "mnist.npz is damaged", "Download it again"],
        lambda place: load(overwritten(npz(place), pickle.dumps(Trap()))),
    ),
    **{
        f"data file whose {key} is pickled": (
            ValueError,
            ["`data_dir`", "mnist.npz is damaged", "pickle"],
            lambda place, key=key: load(npz(place, **{key: np.array([Trap()], object)})),
        )
        for key in ("x_train", "y_train", "x_test", "y_test")
    },
}


@pytest.mark.filterwarnings("ignore:.*received `from_logits=True`:UserWarning")
@pytest.mark.parametrize(("error", "needles", "call"), ERRORS.values(), ids=ERRORS)
def test_a_mistake_is_an_error_and_nothing_is_learned_from_it(error, needles, call, tmp_path, saved_run):
    with pytest.raises(Exception) as caught:  # noqa: PT011  (the type is asserted below, so that a wrong one is shown)
        call(Place(tmp_path, saved_run))
    assert isinstance(caught.value, error), f"{type(caught.value).__name__}: {caught.value}"
    assert [needle for needle in needles if needle not in str(caught.value)] == [], str(caught.value)
    for model, expected in expected_weights:
        for weight, value in zip(model.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(weight, value)


# What is trained on, with a warning.


def logits_and_classes():
    inputs = layers.Input((4,))
    return keras.Model(inputs, [layers.Dense(3, name="z")(inputs), layers.Dense(3, "softmax", name="a")(inputs)])


def mean_of_two(activation):
    inputs = layers.Input((4,))
    return keras.Model(inputs, sum(0.5 * layers.Dense(3, activation)(inputs) for _ in range(2)))


def of_images(convert):
    """A model of images that an operation, not a layer, converts."""
    inputs = layers.Input((8, 8, 1))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(convert(inputs))))


def of_tokens():
    return keras.Sequential([layers.Embedding(256, 2), layers.Flatten(), layers.Dense(3)])


def unused():
    """A model of which a layer's weights have no gradient."""
    inputs = layers.Input((4,))
    dead = layers.Dense(3, name="dead")(inputs)
    return keras.Model(inputs, layers.Dense(3)(inputs) + 0 * keras.ops.stop_gradient(dead))


def reconstruct(make_data):
    """An auto-encoder whose outputs are from 0 to 1, of images from 0 to 255."""
    model = keras.Sequential([layers.Input((64,)), layers.Dense(64, "sigmoid")])
    images = PIXELS.reshape(12, 64).astype("float32")
    looplab.Trainer(model, optimizer="sgd", loss="mse").fit(*make_data(images), verbose=0)


def shuffled(place, resume=False):
    tf.random.set_seed(None)  # else the order is the same in each process, as it is with a seed of its own
    data = batches(X, LABELS).shuffle(100)
    trainer(log_dir=place.folder / "run").fit(data, resume=resume, verbose=0)


def of_several():
    tf.random.set_seed(None)
    return tf.data.Dataset.range(2).flat_map(lambda number: batches(X, LABELS).shuffle(9))


def unordered(x, y):
    pairs = tf.data.Dataset.from_tensors((x, y))
    return pairs.map(lambda x, y: (x, y), num_parallel_calls=2, deterministic=False)


def in_no_order():
    options = tf.data.Options()
    options.deterministic = False
    return options


def with_generator():
    generator = tf.random.Generator.from_seed(1)
    return batches(X, LABELS).map(lambda x, y: (x + generator.normal(tf.shape(x)), y))


LOGITS_WANTED = "`loss` has from_logits=True, but the model outputs probabilities"
PROBABILITIES_WANTED = "`loss` expects probabilities, but the model outputs logits"
PIXELS_DOUBTED = "`x` looks like images from 0 to 255.*divide by 255.*Rescaling"

WARNINGS = {
    **{
        f"softmax to a loss of logits, {kind}": (
            f"{LOGITS_WANTED}.*pass from_logits=False",
            lambda _, make=make: fit(X, LABELS, lambda: make("softmax")),
        )
        for kind, make in KINDS.items()
    },
    **{
        f"logits to a loss of probabilities, {kind}": (
            f"{PROBABILITIES_WANTED}.*pass from_logits=True",
            lambda _, make=make: fit(X, LABELS, lambda: make("linear"), "sparse_categorical_crossentropy"),
        )
        for kind, make in KINDS.items()
    },
    "sigmoid to a binary loss of logits": (
        f"{LOGITS_WANTED}.*sigmoid",
        lambda _: fit(X, ONE_HOT, lambda: functional("sigmoid"), binary()),
    ),
    "logits to a binary loss of probabilities": (
        PROBABILITIES_WANTED,
        lambda _: fit(X, ONE_HOT, functional, "binary_crossentropy"),
    ),
    "softmax to a loss of logits, in a dataset": (
        LOGITS_WANTED,
        lambda _: trainer(functional("softmax")).fit(batches(X, LABELS), verbose=0),
    ),
    "softmax to a loss of logits, compiled by XLA": (
        LOGITS_WANTED,
        lambda _: trainer(functional("softmax"), jit_compile=True).fit(X, LABELS, verbose=0),
    ),
    "logits of one of several outputs": (
        PROBABILITIES_WANTED,
        lambda _: fit(
            X, two_targets(LABELS), two_outputs, {"kind": "sparse_categorical_crossentropy", "height": "mse"}
        ),
    ),
    **{
        f"images from 0 to 255, {make.__name__}": (
            PIXELS_DOUBTED,
            lambda _, make=make: fit(PIXELS.astype("float32"), LABELS, make),
        )
        for make in (functional_of_images, sequential_of_images, subclassed_of_images)
    },
    **{
        f"uint8 images, {make.__name__}": (
            PIXELS_DOUBTED,
            lambda _, make=make: fit(PIXELS.astype("uint8"), LABELS, make),
        )
        for make in (functional_of_images, sequential_of_images)
    },
    "uint8 images without channels": (
        PIXELS_DOUBTED,
        lambda _: fit(
            PIXELS[..., 0].astype("uint8"), LABELS, lambda: keras.Sequential([layers.Flatten(), layers.Dense(3)])
        ),
    ),
    "logits with a bias, of one of several outputs in a list": (
        PROBABILITIES_WANTED,
        lambda _: fit(X, [ONE_HOT, LABELS], logits_and_classes, {"a": CLASS, "z": BITS}),
    ),
    "images from 0 to 255 to outputs from 0 to 1": (
        "outputs are all from 0 to 1, but the targets are not.*scale",
        lambda _: reconstruct(lambda images: (images, images)),
    ),
    "images from 0 to 255 to outputs from 0 to 1 in a dataset": (
        "outputs are all from 0 to 1, but the targets are not.*scale",
        lambda _: reconstruct(lambda images: (batches(images, images),)),
    ),
    "targets in one column for several outputs": (
        "`y` of shape \\(None, 1\\), with outputs of shape \\(None, 3\\).*one shape",
        lambda _: fit(X, TARGETS[:, :1], loss="mse"),
    ),
    "weights without a gradient": ("Gradients do not exist for variables.*dead", lambda _: fit(X, LABELS, unused)),
    "dataset that shuffles without a seed, to be saved": (
        "`x` has `shuffle` without a `seed`.*`dataset.shuffle\\(1000, seed=0\\)`",
        shuffled,
    ),
    "dataset that shuffles within another without a seed, to be saved": (
        "`x` has `shuffle` without a `seed` in `flatmap`.*seed",
        lambda place: trainer(log_dir=place.folder / "run").fit(of_several(), verbose=0),
    ),
    "dataset with a generator of its own, to be saved": (
        "`x` has RngReadAndSkip in `map`.*seed",
        lambda place: trainer(log_dir=place.folder / "run").fit(with_generator(), verbose=0),
    ),
    "dataset that draws without a seed, to be saved": (
        "`x` has RandomUniform in `map`.*seed",
        lambda place: trainer(log_dir=place.folder / "run").fit(
            batches(X, LABELS).map(lambda x, y: (x + tf.random.uniform(tf.shape(x)), y)), verbose=0
        ),
    ),
    **{
        f"dataset in no order, by its {what}, to be saved": (
            f"`x` has {name} with `deterministic=False`.*leave out `deterministic=False`",
            lambda place, change=change: trainer(log_dir=place.folder / "run").fit(
                change(batches(X, LABELS)), verbose=0
            ),
        )
        for what, name, change in [
            ("map", "`map`", lambda data: data.map(lambda x, y: (x, y), num_parallel_calls=2, deterministic=False)),
            ("options", "options", lambda data: data.with_options(in_no_order())),
            (
                "interleave",
                "`interleave`",
                lambda data: data.interleave(unordered, num_parallel_calls=2, deterministic=False),
            ),
            ("function", "`flatmap`", lambda data: data.flat_map(unordered)),
        ]
    },
    "dataset with fewer batches than steps": (
        "data ended after 3 of 5 batches",
        lambda _: trainer().evaluate(batches(X, LABELS), steps=5, verbose=0),
    ),
    "checkpoint of a callback that is not passed": (
        "has the state of EarlyStopping",
        lambda place: resume_without_its_callback(place.folder / "run"),
    ),
    "data file of another checksum": (
        "mnist.npz.*(checksum|sha256)",
        lambda place: load(npz(place)),
    ),
}


def resume_without_its_callback(run):
    for callbacks in ([keras.callbacks.EarlyStopping("loss")], []):
        trainer(log_dir=run, seed=1).fit(X, LABELS, callbacks=callbacks, epochs=2, resume=True, verbose=0)


@pytest.mark.parametrize(("text", "call"), WARNINGS.values(), ids=WARNINGS)
def test_what_may_be_intended_is_a_warning(text, call, tmp_path, saved_run):
    with pytest.warns(UserWarning, match=f"(?s){text}") as warned:
        call(Place(tmp_path, saved_run))
    matching = [warning for warning in warned if re.search(text, str(warning.message), re.DOTALL)]
    if not text.startswith("Gradients do not exist"):  # a warning of Keras
        assert matching[0].filename == __file__  # the line that made the mistake, and none of the library


SOUND = {
    "logits": lambda: fit(X, LABELS),
    "probabilities": lambda: fit(X, LABELS, lambda: functional("softmax"), "sparse_categorical_crossentropy"),
    "one-hot": lambda: fit(X, ONE_HOT, loss=categorical()),
    "soft targets": lambda: fit(X, 0.8 * ONE_HOT + 0.1, loss=categorical()),
    "binary": lambda: fit(X, ONE_HOT, lambda: functional("sigmoid"), "binary_crossentropy"),
    "bool": lambda: fit(X, ONE_HOT.astype(bool), loss=binary()),
    "labels as floating numbers": lambda: fit(X, LABELS.astype("float32")),
    "labels as uint8 in a column": lambda: fit(X, LABELS.astype("uint8")[:, None]),
    "ignored class": lambda: fit(X, changed(LABELS, slice(0, 5), -1), loss=sparse(ignore_class=-1)),
    "ignored class 255": lambda: fit(X, changed(LABELS.astype("uint8"), 0, 255), loss=sparse(ignore_class=255)),
    "images from 0 to 1": lambda: fit((PIXELS / 255).astype("float32"), LABELS, functional_of_images),
    "images that the model scales": lambda: fit(
        PIXELS.astype("float32"), LABELS, lambda: sequential_of_images(layers.Rescaling(1 / 255))
    ),
    "uint8 images that the model scales": lambda: fit(
        PIXELS.astype("uint8"), LABELS, lambda: sequential_of_images(layers.Rescaling(1 / 255))
    ),
    **{
        f"images of {kind} that {what} scales": lambda kind=kind, convert=convert: fit(
            PIXELS.astype(kind), LABELS, lambda: of_images(convert)
        )
        for kind in ("uint8", "float32")
        for what, convert in {"/": lambda x: x / 255, "a Lambda": layers.Lambda(lambda x: x / 255)}.items()
    },
    "uint8 images of two colours": lambda: fit((PIXELS > 127).astype("uint8"), LABELS, functional_of_images),
    **{
        f"tokens of {kind}": lambda kind=kind: fit(PIXELS.astype(kind), LABELS, of_tokens)
        for kind in ("uint8", "float32")
    },
    **{
        f"mean of two with {activation}": lambda activation=activation, y=y, loss=loss: fit(
            X, y, lambda: mean_of_two(activation), loss
        )
        for activation, y, loss in (("softmax", LABELS, CLASS), ("sigmoid", ONE_HOT, BITS))
    },
    "soft targets that rounding led beyond 0 and 1": lambda: fit(
        X, changed(changed(ONE_HOT, (0, 0), 1.0000001), (1, 0), -1e-7), loss=categorical()
    ),
    **{
        f"targets from 0 to 1 to {loss}": lambda loss=loss: fit(X, ONE_HOT, lambda: functional("softmax"), loss)
        for loss in ("kl_divergence", "dice", "tversky", "crossentropy")
    },
    **{
        form: lambda make=make, loss=loss, y=y: fit(X, y(ONE_HOT, LABELS), make, loss)
        for form, (make, loss, y, _) in STRUCTURES.items()
        if "without" not in form  # what has no loss has no gradient, of which Keras warns
    },
    "sum of errors of outputs from 0 to 1": lambda: fit(
        X, ONE_HOT, lambda: functional("sigmoid"), keras.losses.MeanSquaredError(reduction="sum")
    ),
    "no images": lambda: fit(np.arange(48, dtype="float32").reshape(12, 4) * 5, LABELS),
    "one target for one output": lambda: fit(
        X, TARGETS[:, 0], lambda: keras.Sequential([layers.Dense(1)]), loss=keras.losses.MeanSquaredError()
    ),
    "two outputs": lambda: fit(X, two_targets(LABELS), two_outputs, two_losses()),
    "dataset": lambda: trainer().fit(batches(X, LABELS).shuffle(100), verbose=0),  # nothing is saved
    "NaN in targets that have no weight": lambda: fit(X, LABELS, sample_weight=np.zeros(12, "float32")),
}


@pytest.mark.parametrize("call", SOUND.values(), ids=SOUND)
def test_sound_data_gives_no_warning(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call()


# Damaged checkpoints.


def flipped(path, part):
    content = bytearray(path.read_bytes())
    content[min(int(len(content) * part), len(content) - 1)] ^= 0x10
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: cut(path),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "first byte": lambda path: flipped(path, 0),
    "middle byte": lambda path: flipped(path, 0.5),
    "last byte": lambda path: flipped(path, 1),
    "another one's": lambda path: shutil.copy(path.parent.with_name(OLDER) / path.name, path),
}
FILES = ("arrays.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_an_older_one_is_resumed(name, saved_run, tmp_path):
    run = Place(tmp_path, saved_run).run()
    DAMAGES["middle byte"](newest(run) / name)
    with pytest.warns(UserWarning, match=rf"Skipped: checkpoint {newest(run)} is damaged: ") as warned:
        tested = resume(run)
    assert len(warned) == 1
    assert tested.steps == 6
    for weight, expected in zip(tested.get_weights(), weights_of(saved_run), strict=True):
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_each_damage_is_detected(name, damage, saved_run, tmp_path):
    run = Place(tmp_path, saved_run).run()
    damaged, older = newest(run), run / "checkpoints" / OLDER
    DAMAGES[damage](damaged / name)
    with pytest.warns(UserWarning, match="Skipped: ") as warned:
        saved = Store(run / "checkpoints", looplab.Checkpoint()).newest()
    assert saved.path == older
    (reason,) = (str(warning.message) for warning in warned)
    assert f"checkpoint {damaged} is damaged: " in reason
    if name != "manifest.json":  # a checksum in that may be damaged
        assert name in reason


@pytest.mark.parametrize("name", FILES)
def test_if_all_checkpoints_are_damaged_nothing_starts(name, saved_run, tmp_path):
    run = Place(tmp_path, saved_run).run()
    for path in (run / "checkpoints").iterdir():
        DAMAGES["half"](path / name)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: .*another `log_dir`") as caught:
        resume(run)
    assert all(path.name in str(caught.value) for path in (run / "checkpoints").iterdir())
    for model, expected in expected_weights:
        for weight, value in zip(model.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(weight, value)
    assert {path: path.read_bytes() for path in before} == before


def test_a_checkpoint_that_is_skipped_takes_no_room_from_whole_ones(saved_run, tmp_path):
    """Else what is saved next would be the oldest, and the first to go."""
    run = Place(tmp_path, saved_run).run()
    flipped(newest(run) / "state.json", 0.5)

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = True

    tested = trainer(log_dir=run, checkpoint=looplab.Checkpoint(every=1, keep=1))
    with pytest.warns(UserWarning, match="Skipped"):
        tested.fit(X, LABELS, batch_size=BATCH, epochs=2, callbacks=[Stop()], resume=True, verbose=0)
    assert tested.steps == 5
    tested = trainer(log_dir=run, checkpoint=looplab.Checkpoint(every=1, keep=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged one may still lie there
        tested.build(X, LABELS)
        tested.restore("newest")
    assert int(tested.optimizer.iterations) == 5
