"""What goes wrong in a step: looplab's errors are short and say what to do, and the users' own stay their own."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import looplab

X = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
Y = X[:, :1]


def functional():
    return keras.Sequential([keras.Input((3,)), layers.Dense(1, name="dense")])


class Model(keras.Model):
    def __init__(self, raises=None, **options):
        super().__init__(**options)
        self.dense, self.raises = layers.Dense(1), raises

    def call(self, x):
        if self.raises is not None:
            raise self.raises
        return self.dense(x)


class OptionError(Exception):
    def __init__(self, option, value="none"):
        super().__init__(option, value)


OWN = {
    "ValueError": ValueError("the option `heads` must divide the width"),
    "a shape's": ValueError("expected 4 heads, got 3"),
    "TypeError": TypeError("no such option"),
    "KeyError": KeyError("option"),
    "of a class of its own": OptionError("no such option"),
    "RuntimeError": RuntimeError("the service is down"),
    "IndexError": IndexError("of no row"),
    "FileNotFoundError": FileNotFoundError(2, "no such file"),
    "ZeroDivisionError": ZeroDivisionError("by zero"),
}


@pytest.mark.parametrize(
    ("error", "call", "eager"),
    [
        *((error, "fit", False) for error in OWN.values()),
        *((error, "fit", True) for error in OWN.values()),
        (OWN["TypeError"], "evaluate", False),
        (OWN["of a class of its own"], "predict", False),
    ],
)
def test_an_error_of_the_model_stays_what_it_is(error, call, eager):
    trainer = looplab.Trainer(Model(error), optimizer="sgd", loss="mse", run_eagerly=eager)
    arguments = [X] if call == "predict" else [X, Y]
    with pytest.raises(Exception) as caught:  # noqa: PT011  (a wrong type is shown)
        getattr(trainer, call)(*arguments, verbose=0)
    assert str(error.args[0]) in str(caught.value)
    assert isinstance(caught.value, type(error))
    for advice in ("does not fit", "Bring it", "batch the data set", "run_eagerly"):
        assert advice not in str(caught.value)


class Branching(looplab.Trainer):
    what = ""

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            p = self(x, training=True)
            loss = tf.reduce_mean((p - y) ** 2)
        if self.what == "nested":
            self.minimize(tape, loss, [self.model.trainable_variables, []])
        elif self.what == "dict":
            self.minimize(tape, loss, [{"dense": self.model.trainable_variables}])
        else:
            self.minimize(tape, loss)
        if self.what == "if" and loss > 0:
            self.log("big", loss)
        if self.what == "for":
            for _ in tf.range(3):
                self.log("again", loss)
        if self.what == "image" and loss > 0:
            self.log_image("image", tf.zeros((1, 2, 2, 1)))
        return {"loss": loss}


def branching(what):
    trainer = Branching(functional(), optimizer="sgd")
    trainer.what = what
    return trainer.fit(X, Y, verbose=0)


class AddsInBranch(keras.Model):
    def call(self, x):
        tf.cond(tf.reduce_sum(x) > 0, lambda: self.add_loss(tf.reduce_sum(x)), lambda: None)
        return x


class Forgets(looplab.Trainer):
    def __init__(self, model):
        self.net = model


class UsesEarly(looplab.Trainer):
    def __init__(self, model):
        self.first = self.optimizer
        super().__init__(model)


class NoTest(looplab.Trainer):
    def __init__(self, **options):
        super().__init__(**options)
        self.net = functional()

    def train_step(self, batch):
        return {"loss": tf.reduce_mean((self.net(batch[0]) - batch[1]) ** 2)}


def single(x, y):
    return tf.data.Dataset.from_tensor_slices((x, y))


def trainer(model=None, **options):
    return looplab.Trainer(functional() if model is None else model, **{"optimizer": "sgd", "loss": "mse", **options})


ERRORS = {
    "a value logged in a condition": (
        lambda: branching("if"),
        ["`log` got 'big' inside a tensor condition", "Log it outside", "`tf.where"],
    ),
    "a value logged in a loop": (lambda: branching("for"), ["`log` got 'again' inside a tensor condition or loop"]),
    "an image logged in a condition": (lambda: branching("image"), ["`log_image` got 'image' inside"]),
    "a loss added in a condition": (
        lambda: trainer(AddsInBranch(name="adds")).fit(X, Y, verbose=0),
        ["adds' calls `add_loss` inside a tensor condition", "Call it outside"],
    ),
    "nested variables": (
        lambda: branching("nested"),
        ["`variables` must be a flat list", "got list at index 0", "[*a.trainable_variables"],
    ),
    "variables in a dict": (lambda: branching("dict"), ["`variables` must be a flat list", "got dict at index 0"]),
    "a forgotten super().__init__()": (
        lambda: Forgets(functional()).fit(X, Y),
        ["`Forgets.__init__` must call `super().__init__(...)`"],
    ),
    "a late super().__init__()": (
        lambda: UsesEarly(functional()),
        ["`UsesEarly.__init__` must call `super().__init__(...)` before"],
    ),
    "validation without test_step": (
        lambda: NoTest().fit(X, Y, validation_data=(X, Y), verbose=0),
        ["`validation_data` needs `NoTest` to override `test_step`", "no `model`"],
    ),
    "evaluation without test_step": (lambda: NoTest().evaluate(X, Y, verbose=0), ["`evaluate` needs `NoTest` to"]),
    "an unbatched dataset": (
        lambda: trainer().fit(single(X, Y), verbose=0),
        ["`x` of shape (3,)", "takes (None, 3)", "single example", "`dataset.batch(32)`"],
    ),
    "an unbatched dataset, and a model without `Input`": (
        lambda: trainer(Model()).fit(single(X, Y), verbose=0),
        ["`x` of shape (3,)", "the model takes 2", "`dataset.batch(32)`"],
    ),
    "an unbatched dataset of numbers": (
        lambda: trainer(Model()).fit(single(X[:, None], Y[:, 0]), verbose=0),
        ["`y` is a single number", "`dataset.batch(32)`"],
    ),
    "an unbatched dataset to predict": (
        lambda: trainer().predict(tf.data.Dataset.from_tensor_slices(X), verbose=0),
        ["single example", "`dataset.batch(32)`"],
    ),
    "a typo in a loss": (lambda: trainer(loss="mes"), ["`loss` has 'mes'", "did you mean 'mse'?"]),
    "a typo in metrics": (
        lambda: trainer(metrics={"a": ["mae", "acuracy"]}),
        ["`metrics` has 'acuracy'", "did you mean 'accuracy'?"],
    ),
    "a loss that is not Keras's": (
        lambda: trainer(loss="wholly_mine"),
        ["'wholly_mine'", "pass the function or object"],
    ),
    "compile": (lambda: trainer().compile(loss="mse"), ["no `compile`: pass optimizer", "to its constructor"]),
    "prediction without a model": (
        lambda: NoTest().predict(X, verbose=0),
        ["`NoTest` has no `model`: pass one, or override `predict_step`."],
    ),
    "a function of the epoch that returns a generator": (
        lambda: trainer().fit(lambda epoch: (x for x in [(X, Y)]), verbose=0),
        ["`x` is a function of the epoch", "must return a `tf.data.Dataset`", "returned generator"],
    ),
    "outputs and targets of different structures": (
        lambda: trainer(two_outputs()).fit(X, [Y, Y, Y], verbose=0),
        ["`loss`, `y` must have the structure of the model's outputs, [(None, 1), (None, 1)]"],
    ),
    "losses of unknown outputs": (
        lambda: trainer(two_outputs(), loss={"a": "mse", "c": "mse"}).fit(X, [Y, Y], verbose=0),
        ["`loss`, `y` must have the structure of the model's outputs", "{'a': 'mse', 'c': 'mse'}"],
    ),
    "loss weights of another number": (
        lambda: trainer(two_outputs(), loss_weights=[1.0, 2.0, 3.0]).fit(X, [Y, Y], verbose=0),
        ["`loss_weights`", "must have the structure of the model's outputs", "[1.0, 2.0, 3.0]"],
    ),
    "metrics of unknown outputs": (
        lambda: trainer(two_outputs(), metrics={"c": ["mae"]}).fit(X, [Y, Y], verbose=0),
        ["`y`, `metrics` must have the structure of the model's outputs", "{'c': ['mae']}"],
    ),
}


def two_outputs():
    inputs = keras.Input((3,))
    return keras.Model(inputs, [layers.Dense(1, name=name)(inputs) for name in "ab"])


@pytest.mark.parametrize(("call", "needles"), ERRORS.values(), ids=ERRORS)
def test_an_error_says_what_to_do_without_frames_of_libraries(call, needles):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    text = str(caught.value)
    assert isinstance(caught.value, (ValueError, TypeError, AttributeError)), repr(caught.value)
    assert [needle for needle in needles if needle not in text] == [], text
    assert "in user code" not in text
    files = [str(entry.path) for entry in caught.traceback]
    assert not [file for file in files if "tensorflow" in file or "/keras/" in file], files


def test_all_names_of_keras_are_names_of_losses_and_metrics():
    for loss in "mse", "MSE", "MeanSquaredError", {"a": "mae", "b": None}, ["crossentropy", "CE"], keras.losses.huber:
        trainer(loss=loss)
    for metrics in ["acc", "Accuracy", "mae", "AUC"], {"a": ["accuracy"]}, [["mse"], []], [keras.metrics.Mean()], None:
        trainer(metrics=metrics)


@pytest.mark.parametrize("eager", [False, True])
def test_an_attribute_error_in_a_property_stays_what_it_is(eager):
    class Owner(looplab.Trainer):
        @property
        def broken(self):
            return self.model.no_such_thing

        def train_step(self, batch):
            return {"loss": self.broken}

    with pytest.raises(AttributeError, match="no_such_thing"):
        Owner(functional(), optimizer="sgd", run_eagerly=eager).fit(X, Y, verbose=0)


@pytest.mark.parametrize("eager", [False, True])
def test_a_step_that_is_a_tf_function_is_a_step(eager):
    class Plain(looplab.Trainer):
        def train_step(self, batch):
            return {**super().train_step(batch), "twice": 2 * tf.reduce_sum(batch[0])}

        def test_step(self, batch):
            return super().test_step(batch)

    class Decorated(looplab.Trainer):
        @tf.function
        def train_step(self, batch):
            return {**super().train_step(batch), "twice": 2 * tf.reduce_sum(batch[0])}

        @tf.function(reduce_retracing=True)
        def test_step(self, batch):
            return super().test_step(batch)

        @tf.function
        def predict_step(self, batch):
            return super().predict_step(batch)

    def run(kind):
        keras.utils.set_random_seed(0)
        made = kind(functional(), optimizer="adam", loss="mse", metrics=["mae"], run_eagerly=eager)
        history = made.fit(X, Y, batch_size=7, epochs=2, validation_data=(X, Y), shuffle=False, verbose=0).history
        return history, made.predict(X, verbose=0).tolist()

    assert run(Decorated) == run(Plain)


@pytest.mark.parametrize(
    ("code", "text", "status"),
    [
        ("import math\nmath.squrt(3)", "AttributeError: module 'math' has no attribute 'squrt'", 1),
        ("import of_the_users", "ModuleNotFoundError: No module named 'of_the_users'", 1),
        ("raise KeyError('mine')", "KeyError: 'mine'", 1),
        ("", "python -m looplab: broken:build names no recipe function: module 'broken' has no attribute 'build'", 1),
    ],
)
def test_an_error_of_a_recipes_module_stays_what_it_is(code, text, status, tmp_path):
    (tmp_path / "broken.py").write_text(code)
    command = [sys.executable, "-m", "looplab", "broken:build"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (text in done.stderr, done.returncode) == (True, status)
    assert ("names no recipe" in done.stderr) == (not code)


# States of a fixed size.


@pytest.mark.parametrize(
    "call",
    [
        lambda trainer: trainer.fit(X[:6, :, None], Y[:6], batch_size=4, verbose=0),
        lambda trainer: trainer.train_on_batch(X[:3, :, None], Y[:3]),
        lambda trainer: trainer.predict(X[:6, :, None], batch_size=4, verbose=0),
    ],
    ids=["fit", "train_on_batch", "predict"],
)
def test_a_batch_that_does_not_fit_the_states_of_a_layer(call):
    inner = keras.Sequential([layers.GRU(2, stateful=True, name="memory")])
    model = keras.Sequential([keras.Input((3, 1), batch_size=4), inner, layers.Dense(1)])
    trainer = looplab.Trainer(model, optimizer="sgd", loss="mse")
    with pytest.raises(ValueError, match=r"the states of the stateful layer 'memory', 4.*drop_remainder=True"):
        call(trainer)
