"""What a user sees of `Trainer` on small models and data."""

import functools
import gc
import json
import os
import signal
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import looplab
from looplab.testing import read_images, read_scalars


class Affine(tf.Module):
    """Makes its variables at the first call, as Sonnet's modules do."""

    weight = None

    def __call__(self, x):
        if self.weight is None:
            self.weight = tf.Variable(tf.zeros((x.shape[-1], 1)))
            self.bias = tf.Variable(tf.zeros(1))
        return x @ self.weight + self.bias


class KerasInModule(tf.Module):
    def __init__(self):
        self.parts = {"dense": [layers.Dense(1)]}

    def __call__(self, x, training):
        return self.parts["dense"][0](x, training=training)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def call(self, x):
        return self.dense(x)


def function_over_variables():
    weight, bias = tf.Variable(tf.zeros((4, 1))), tf.Variable(tf.zeros(1))
    return lambda x: x @ weight + bias


def functional():
    inputs = layers.Input((4,))
    return keras.Model(inputs, layers.Dense(1)(inputs))


MODELS = {
    "function": function_over_variables,
    "tf.function": lambda: tf.function(function_over_variables()),
    "tf.Module": Affine,
    "tf.Module of Keras layers": KerasInModule,
    "sequential": lambda: keras.Sequential([layers.Dense(1)]),
    "functional": functional,
    "subclassed": Subclassed,
    "layer": lambda: layers.Dense(1),
}


@pytest.mark.parametrize("name", MODELS)
def test_trains_any_callable_with_variables(name, line, tmp_path):
    x, y = line
    trainer = looplab.Trainer(MODELS[name](), optimizer=keras.optimizers.SGD(0.1), loss="mse")
    losses = trainer.fit(x, y, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.05 < losses[0]
    assert sorted(weight.shape for weight in trainer.get_weights()) == [(1,), (4, 1)]
    np.testing.assert_allclose(trainer.predict(x), y, atol=1)

    file = tmp_path / "affine.weights.h5"
    trainer.save_weights(file)
    expected = trainer.predict(x)
    again = looplab.Trainer(MODELS[name](), optimizer="sgd", loss="mse")
    again.build(x, y)
    again.load_weights(file)
    np.testing.assert_array_equal(again.predict(x), expected)


class GAN(looplab.Trainer):
    """Two models, two optimizers, and of one model two calls in a step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.generator = keras.Sequential([layers.Dense(8, "relu"), layers.Dense(4)], name="generator")
        judge = layers.Dense(8, "relu", activity_regularizer=keras.regularizers.L2(0.1), name="hidden")
        self.discriminator = keras.Sequential([judge, layers.Dense(1, kernel_regularizer="l2")], name="judge")
        self.optimizers_of = {"g": keras.optimizers.Adam(1e-2), "d": keras.optimizers.Adam(1e-2)}
        self.cross_entropy = keras.losses.BinaryCrossentropy(from_logits=True)
        self.accuracy = keras.metrics.BinaryAccuracy("accuracy", threshold=0.0)

    def train_step(self, batch):
        noise = keras.random.normal((tf.shape(batch)[0], 2), seed=self.seed_generator)
        made = self.generator(noise, training=True)
        with tf.GradientTape() as tape:
            real, fake = self.discriminator(batch, training=True), self.discriminator(made, training=True)
            judged = self.cross_entropy(tf.ones_like(real), real) + self.cross_entropy(tf.zeros_like(fake), fake)
            d_loss = judged + sum(self.losses)
        self.minimize(tape, d_loss, self.discriminator.trainable_variables, self.optimizers_of["d"])
        self.accuracy.update_state(tf.ones_like(real), real)
        self.accuracy.update_state(tf.zeros_like(fake), fake)
        with tf.GradientTape() as tape:
            fake = self.discriminator(self.generator(noise, training=True), training=True)
            g_loss = self.cross_entropy(tf.ones_like(fake), fake)
        self.minimize(tape, g_loss, self.generator.trainable_variables, self.optimizers_of["g"])
        self.log("judged", judged)
        return {"d_loss": d_loss, "g_loss": g_loss, "accuracy": self.accuracy.result()}


def test_a_gan_is_a_subclass_with_its_own_step(line, tmp_path):
    x, _ = line
    trainer = GAN(seed=1, log_dir=tmp_path / "gan")
    history = trainer.fit(x, batch_size=32, epochs=3, verbose=0).history
    assert set(trainer.optimizers) == {"optimizers_of/g", "optimizers_of/d"}
    assert history["d_loss"][-1] < history["d_loss"][0]

    points = read_scalars(tmp_path / "gan" / "train")
    added = [f"batch_loss/judge/hidden{which}" for which in ("", "_2")]
    total = sum(points[tag][1] for tag in [*added, "batch_judged", "batch_loss/regularization"])
    np.testing.assert_allclose(points["batch_d_loss"][1], total, rtol=1e-6)
    assert not np.array_equal(*(points[tag][1] for tag in added))
    assert "batch_loss/regularization_2" not in points
    assert {tag for tag in points if "learning_rate" in tag} == {
        "batch_learning_rate/optimizers_of/g",
        "batch_learning_rate/optimizers_of/d",
    }
    # Values of a batch alone: of 2·32 judgements, or 2·4 in the last batch of an epoch; their mean is the epoch's.
    accuracy, sizes = points["batch_accuracy"][1], np.array([32, 32, 32, 4])
    np.testing.assert_allclose(accuracy[:4] * 2 * sizes, np.round(accuracy[:4] * 2 * sizes), atol=1e-4)
    assert history["accuracy"][0] == pytest.approx(np.average(accuracy[:4], weights=sizes), abs=1e-6)


def test_evaluation_leaves_everything_as_it_was(line):
    x, y = line

    class Noisy(looplab.Trainer):
        def test_step(self, batch):
            logs = super().test_step(batch)
            return {**logs, "noise": keras.random.normal((), seed=self.seed_generator)}

    model = keras.Sequential(
        [layers.Dense(8), layers.BatchNormalization(), layers.Dropout(0.5, seed=1), layers.Dense(1)]
    )
    trainer = Noisy(model, optimizer="adam", loss="mse", metrics=["mae"])
    trainer.fit(x, y, epochs=1, verbose=0)
    variables = [*model.variables, trainer.seed_generator.state, *trainer.metrics[1].variables]
    state = [variable.numpy() for variable in variables]
    first = trainer.evaluate(x, y, batch_size=30)
    trainer.predict(x)
    assert trainer.evaluate(x, y, batch_size=30) == first
    for variable, value in zip(variables, state, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert first["loss"] == pytest.approx(float(np.mean((trainer.predict(x) - y) ** 2)), rel=1e-5)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("kind", ["stateful", "spectral"])
def test_reading_leaves_states_and_trained_weights(kind, eager):
    """The states of a stateful RNN, which Keras does not list, and a kernel that its layer assigns as it is called."""

    class InTrainingMode(looplab.Trainer):
        def predict_step(self, batch):
            return self(batch, training=True)

    batches, y = np.random.default_rng(0).normal(size=(24, 5, 3)), np.ones((24, 1))
    layer = layers.LSTM(4, stateful=True) if kind == "stateful" else layers.SpectralNormalization(layers.Dense(4))
    model = keras.Sequential([keras.Input(batch_shape=(8, 5, 3)), layer, layers.Flatten(), layers.Dense(1)])
    trainer = InTrainingMode(model, optimizer="adam", loss="mse", run_eagerly=eager)
    trainer.fit(batches, y, batch_size=8, verbose=0)
    variables = [*model.variables, *(layer.states if kind == "stateful" else [])]
    before = [np.array(variable) for variable in variables]
    for read in (trainer.predict, functools.partial(trainer.evaluate, y=y)):
        read(batches, batch_size=8, verbose=0)
        for variable, value in zip(variables, before, strict=True):
            np.testing.assert_array_equal(variable, value)


class Jitter(layers.Layer):
    """Adds noise, in evaluation too, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(0)
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x):
        self.calls.assign_add(1.0)
        return x + 0.01 * keras.random.normal(tf.shape(x), seed=self.seed_generator)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("reads", ["evaluate", "predict"])
def test_reading_in_another_thread_changes_no_bit_of_a_training(line, reads, eager):
    x, y = line

    def run(with_reader):
        keras.utils.set_random_seed(0)
        parts = [layers.Dense(4, name="h"), layers.BatchNormalization(), Jitter(), layers.Dense(1, name="o")]
        model = keras.Sequential([keras.Input((4,)), *parts])
        trainer = looplab.Trainer(model, optimizer="adam", loss="mse", metrics=["mae"], seed=0, run_eagerly=eager)
        stop, read = threading.Event(), []

        def reader():
            while not stop.is_set():
                if reads == "evaluate":
                    read.append(trainer.evaluate(x[:20], y[:20], batch_size=8, verbose=0)["loss"])
                else:
                    read.append(trainer.predict(x[:3], verbose=0))

        thread = threading.Thread(target=reader)
        if with_reader:
            thread.start()
        epochs = 2 if eager else 8  # eager steps are slow
        history = trainer.fit(x, y, batch_size=8, epochs=epochs, validation_data=(x, y), verbose=0).history
        stop.set()
        if with_reader:
            thread.join()
            assert len(read) > 2
        return history, [np.asarray(variable) for variable in model.variables]

    (history, variables), (served_history, served) = run(False), run(True)
    assert served_history == history
    for one, other in zip(variables, served, strict=True):
        np.testing.assert_array_equal(one, other)


def test_history_matches_model_fit(line):
    """With the same weights and order, Keras's own loop tells the same numbers."""
    x, y = line
    weight = np.linspace(0, 2, 100, dtype="float32")
    options = {"loss": "mse", "metrics": ["mae"]}
    fit = {"batch_size": 32, "epochs": 3, "shuffle": False, "verbose": 0, "validation_split": 0.3}
    model = functional()
    start = model.get_weights()
    model.compile(optimizer=keras.optimizers.SGD(0.05), **options)
    expected = model.fit(x, y, sample_weight=weight, **fit).history
    model.set_weights(start)
    trainer = looplab.Trainer(model, optimizer=keras.optimizers.SGD(0.05), **options)
    ours = trainer.fit(x, y, sample_weight=weight, **fit).history
    for name, values in expected.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-5)


def test_several_inputs_and_outputs_have_a_loss_and_metrics_each(line, tmp_path):
    x, y = line
    inputs = {name: layers.Input((2,), name=name) for name in ("left", "right")}
    joined = layers.Concatenate()(list(inputs.values()))
    model = keras.Model(inputs, {"height": layers.Dense(1)(joined), "kind": layers.Dense(3)(joined)})
    kinds = np.arange(100) % 3
    trainer = looplab.Trainer(
        model,
        optimizer="adam",
        loss={"height": "mse", "kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
        loss_weights={"height": 2.0, "kind": 0.5},
        metrics={"height": ["mae"], "kind": ["accuracy"]},
        log_dir=tmp_path / "run",
    )
    data = {"left": x[:, :2], "right": x[:, 2:]}, {"height": y, "kind": kinds}
    history = trainer.fit(*data, epochs=2, verbose=0, validation_data=data).history
    assert {"height_loss", "kind_loss", "height_mae", "kind_accuracy", "val_kind_accuracy"} <= set(history)
    points = read_scalars(tmp_path / "run" / "train")
    parts = points["batch_loss/height_loss"][1] + points["batch_loss/kind_loss"][1]
    np.testing.assert_allclose(parts, points["batch_loss"][1], rtol=1e-5)
    weighed = 2 * np.array(history["height_loss"]) + 0.5 * np.array(history["kind_loss"])
    np.testing.assert_allclose(history["loss"], weighed, rtol=1e-5)


def test_a_step_logs_scalars_and_images_from_anywhere(line, tmp_path):
    x, y = line

    class Logging(looplab.Trainer):
        def train_step(self, batch):
            logs = super().train_step(batch)
            self.log("double", 2 * logs["loss"])
            self.log_image("pixel", tf.reshape(batch[0], (-1, 2, 2, 1)), every=3, max_outputs=2)
            return logs

    trainer = Logging(functional(), optimizer="sgd", loss="mse", log_dir=tmp_path / "run")
    history = trainer.fit(x, y, batch_size=10, verbose=0).history
    assert history["double"][0] == pytest.approx(2 * history["loss"][0])
    points = read_scalars(tmp_path / "run" / "train")
    np.testing.assert_array_equal(points["batch_double"][1], 2 * points["batch_loss"][1])
    images = read_images(tmp_path / "run" / "train")["pixel"]
    assert [step for step, _ in images] == [1, 4, 7, 10]
    assert tf.io.decode_png(images[0][1][1]).shape == (2, 2, 1)


def test_data_of_unknown_length_loses_no_step(line, tmp_path):
    x, y = line
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8).filter(lambda x, y: True)
    assert dataset.cardinality() == tf.data.UNKNOWN_CARDINALITY
    trainer = looplab.Trainer(
        functional(), optimizer="sgd", loss="mse", log_dir=tmp_path / "run", steps_per_execution=5
    )
    trainer.fit(dataset, epochs=2, verbose=0, validation_data=dataset)
    assert trainer.steps == 26
    for folder in ("train", "validation"):
        np.testing.assert_array_equal(read_scalars(tmp_path / "run" / folder)["batch_loss"][0], np.arange(1, 27))


def test_the_step_is_traced_once_for_a_whole_run(line):
    x, y = line
    traces = []

    class Counting(looplab.Trainer):
        def train_step(self, batch):
            traces.append("train")
            return super().train_step(batch)

        def test_step(self, batch):
            traces.append("test")
            return super().test_step(batch)

    trainer = Counting(functional(), optimizer="adam", loss="mse", metrics=["mae"], steps_per_execution=4)
    trainer.build(x, y)
    assert traces == ["train"]
    for _ in range(2):  # 7 batches an epoch, the last ragged
        trainer.fit(x, y, batch_size=16, epochs=2, verbose=0, validation_data=(x, y))
    trainer.evaluate(x, y)
    assert traces == ["train", "test"]


def test_a_second_fit_goes_on_with_its_counters(line, tmp_path):
    x, y = line
    trainer = looplab.Trainer(functional(), optimizer="sgd", loss="mse", log_dir=tmp_path / "run")
    for _ in range(2):
        assert trainer.fit(x, y, epochs=2, verbose=0).epoch == [0, 1]
    points = read_scalars(tmp_path / "run" / "train")
    np.testing.assert_array_equal(points["epoch_loss"][0], [1, 2, 3, 4])
    np.testing.assert_array_equal(points["batch_loss"][0], np.arange(1, 17))
    with pytest.raises(ValueError, match=r"`log_dir`.*holds the run of another trainer"):
        looplab.Trainer(functional(), optimizer="sgd", loss="mse", log_dir=tmp_path / "run").fit(x, y, verbose=0)


def test_without_a_log_dir_nothing_is_written(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    looplab.Trainer(functional(), optimizer="sgd", loss="mse").fit(*line, verbose=0)
    assert list(tmp_path.iterdir()) == []


def test_run_eagerly_steps_through_python_with_values(line):
    x, y = line
    seen = []

    class Looking(looplab.Trainer):
        def train_step(self, batch):
            seen.append(batch[0].numpy().shape)
            return super().train_step(batch)

    trainer = Looking(functional(), optimizer="sgd", loss="mse", run_eagerly=True)
    history = trainer.fit(x, y, batch_size=40, epochs=2, verbose=0).history
    assert seen == [(40, 4), (40, 4), (20, 4)] * 2
    assert history["loss"][1] < history["loss"][0]


def test_a_step_may_branch_on_tensors(line):
    class Branching(looplab.Trainer):
        def train_step(self, batch):
            logs = super().train_step(batch)
            big = tf.constant(0.0)
            if logs["loss"] > 1:
                big = tf.constant(1.0)
            return {**logs, "big": big}

    history = Branching(functional(), optimizer="sgd", loss="mse").fit(*line, epochs=1, verbose=0).history
    assert 0 <= history["big"][0] <= 1


def test_a_call_without_training_is_an_inference_whatever_was_called_before(line):
    """As in Keras outside of a layer: no call inherits `training` from another."""
    x, _ = line

    class Teacher(looplab.Trainer):
        def __init__(self, **options):
            super().__init__(**options)
            self.student, self.teacher = layers.Dense(4), layers.Dropout(0.9)

        def train_step(self, batch):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self.student(batch, training=True) ** 2)
            self.minimize(tape, loss)
            return {"loss": loss, "kept": tf.reduce_mean(tf.cast(self.teacher(batch) == batch, tf.float32))}

    assert Teacher(optimizer="sgd").fit(x, verbose=0).history["kept"] == [1.0]


# Callbacks.


def test_keras_callbacks_work(line, tmp_path):
    x, y = line
    trainer = looplab.Trainer(functional(), optimizer=keras.optimizers.SGD(0.1), loss="mse", metrics=["accuracy"])
    history = trainer.fit(
        x,
        y,
        epochs=50,
        verbose=0,
        validation_split=0.2,
        callbacks=[
            keras.callbacks.EarlyStopping(min_delta=0.01, patience=2, restore_best_weights=True),
            keras.callbacks.EarlyStopping("val_accuracy", patience=99),
            keras.callbacks.ReduceLROnPlateau(patience=1, min_delta=1.0),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.ModelCheckpoint(tmp_path / "best.weights.h5", save_weights_only=True),
        ],
    ).history
    assert 3 <= len(history["val_loss"]) < 50
    assert trainer.optimizer.learning_rate < 0.1
    assert (tmp_path / "log.csv").read_text().count("\n") == len(history["loss"]) + 1
    assert (tmp_path / "best.weights.h5").exists()
    assert trainer.evaluate(x[80:], y[80:])["loss"] == pytest.approx(min(history["val_loss"]), abs=0.01)


@pytest.mark.parametrize(("steps_per_execution", "done_at_third_hook"), [("auto", 3), (10, 10)])
def test_batch_hooks_see_each_step_with_its_own_values(line, tmp_path, steps_per_execution, done_at_third_hook):
    x, y = line
    calls, steps_done = [], []

    class Hook(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            calls.append(("begin", batch))

        def on_train_batch_end(self, batch, logs=None):
            calls.append(("end", batch))
            losses.append(logs["loss"])
            steps_done.append(self.model.steps)

    losses = []
    options = {"log_dir": tmp_path / "run", "steps_per_execution": steps_per_execution}
    trainer = looplab.Trainer(functional(), optimizer="sgd", loss="mse", **options)
    trainer.fit(x, y, batch_size=8, verbose=0, callbacks=[Hook()])
    assert calls == [(when, batch) for batch in range(13) for when in ("begin", "end")]
    np.testing.assert_array_equal(np.float32(losses), read_scalars(tmp_path / "run" / "train")["batch_loss"][1])
    assert steps_done[2] == done_at_third_hook
    assert steps_done[-1] == 13


def test_stop_training_ends_in_mid_epoch(line):
    x, y = line

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 4

    trainer = looplab.Trainer(functional(), optimizer="sgd", loss="mse")
    history = trainer.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=[Stop()])
    assert trainer.steps == 5
    assert len(history.history["loss"]) == 1


def test_after_an_interrupt_without_a_log_dir_counters_agree_with_the_optimizer(line):
    """Ctrl-C comes while a graph call of many steps runs."""
    x, y = line
    trainer = looplab.Trainer(functional(), optimizer="adam", loss="mse", steps_per_execution=10**6)
    trainer.fit(x, y, batch_size=1, verbose=0)
    interrupt = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(x, y, batch_size=1, steps_per_epoch=10**6, epochs=1, verbose=0)
    interrupt.join()
    assert 100 < trainer.steps < 10**6
    assert trainer.steps == int(trainer.optimizer.iterations)
    trainer.fit(x, y, batch_size=10, verbose=0)
    assert trainer.steps == int(trainer.optimizer.iterations)


def test_stop_training_before_the_first_step_does_one_as_in_keras(line):
    stop = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: setattr(trainer, "stop_training", True))
    trainer = looplab.Trainer(functional(), optimizer="sgd", loss="mse")
    history = trainer.fit(*line, epochs=3, verbose=0, callbacks=[stop]).history
    assert trainer.steps == 1
    assert len(history["loss"]) == 1


def test_callbacks_that_the_trainer_replaces_are_refused(line):
    trainer = looplab.Trainer(functional(), optimizer="sgd", loss="mse")
    with pytest.raises(ValueError, match="`log_dir`"):
        trainer.fit(*line, callbacks=[keras.callbacks.TensorBoard()])
    with pytest.raises(ValueError, match="`verbose=1`"):
        trainer.fit(*line, callbacks=[keras.callbacks.ProgbarLogger()])


# What a user gets wrong.


def returns(value):
    class Wrong(looplab.Trainer):
        def train_step(self, batch):
            super().train_step(batch)
            return value(batch)

    return Wrong


class NoGradient(looplab.Trainer):
    def train_step(self, batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(batch[0])
        self.minimize(tape, loss)
        return {"loss": loss}


class VectorLoss(looplab.Trainer):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return tf.square(y - y_pred)


@pytest.mark.parametrize(
    ("trainer", "data", "message"),
    [
        (returns(lambda batch: tf.constant(1.0)), None, "`train_step` must return a dict.*returned SymbolicTensor"),
        (returns(lambda batch: None), None, "`train_step` must return a dict.*returned NoneType"),
        (returns(lambda batch: {"x": batch[0]}), None, r"'x', which must be one number; got shape \(None, 4\)"),
        (returns(lambda batch: {"x": "high"}), None, "`train_step` returned 'x'.* got shape .* dtype string"),
        (returns(lambda batch: {1: 1.0}), None, "names must be strings"),
        (NoGradient, None, "none of the 2 `variables`"),
        (VectorLoss, None, r"`loss` must be one floating number; got shape \(None, 1\)"),
        (looplab.Trainer, "x", "needs targets, but the data has no y"),
    ],
)
def test_a_wrong_step_is_an_error_before_a_weight_changes(trainer, data, message, line):
    x, y = line
    model = functional()
    before = model.get_weights()
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(model, optimizer="sgd", loss="mse").fit(*((x,) if data == "x" else (x, y)), verbose=0)
    for value, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_other_errors_name_the_argument(line):
    x, y = line
    trainer = looplab.Trainer(functional(), optimizer="sgd", loss="mse")
    for name in ("epochs", "batch_size", "steps_per_epoch", "validation_steps"):
        for value in (0, -1, True, 1.5):
            with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least 1; got {value!r}"):
                trainer.fit(x, y, **{name: value})
    with pytest.raises(ValueError, match='`steps_per_execution` must be "auto" or a whole number of at least 1; got 0'):
        looplab.Trainer(functional(), steps_per_execution=0)
    with pytest.raises(ValueError, match="no optimizer"):
        looplab.Trainer(functional(), loss="mse").fit(x, y, verbose=0)
    with pytest.raises(ValueError, match="There is no loss"):
        looplab.Trainer(functional(), optimizer="sgd").fit(x, y, verbose=0)
    with pytest.raises(ValueError, match="call `build`"):
        looplab.Trainer(Subclassed(), optimizer="sgd").save_weights("never.weights.h5")
    assert trainer.steps == 0


def test_history_reads_back_from_json_to_the_same_bits(line):
    history = looplab.Trainer(functional(), optimizer="sgd", loss="mse").fit(*line, epochs=3, verbose=0).history
    assert json.loads(json.dumps(history)) == history


def test_an_exchanged_optimizer_is_the_one_that_trains(line):
    """Also where it lies in memory where the old one was."""
    x, y = line
    trainer = looplab.Trainer(functional(), optimizer="sgd", loss="mse")
    for _ in range(3):
        trainer.fit(x, y, batch_size=100, verbose=0)
        assert int(trainer.optimizer.iterations) == 1
        trainer.optimizer = None
        gc.collect()
        trainer.optimizer = keras.optimizers.SGD(0.01)


# Metrics.


class Sized(layers.Layer):
    """Owns a metric, which it updates in a graph function of its own."""

    def __init__(self):
        super().__init__()
        self.size = keras.metrics.Mean(name="size")

    @tf.function
    def call(self, x):
        self.size.update_state(tf.abs(x))
        return x


class Half(keras.metrics.Metric):
    """Half of the mean of another metric, which it holds."""

    def __init__(self, name="half"):
        super().__init__(name=name)
        self.whole = keras.metrics.Mean(name="whole")

    def update_state(self, values):
        self.whole.update_state(values)

    def result(self):
        return self.whole.result() / 2

    def reset_state(self):
        self.whole.reset_state()


class Measuring(looplab.Trainer):
    """Updates metrics in a branch, in a loop, and within another metric."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.branch, self.looped, self.half = keras.metrics.Sum("branch"), keras.metrics.Sum("looped"), Half()

    def train_step(self, batch):
        logs = super().train_step(batch)
        if tf.reduce_sum(batch[1]) > 0:
            self.branch.update_state(1.0)
        for _ in tf.range(3):
            self.looped.update_state(1.0)
        self.half.update_state(batch[1])
        return logs


def test_metrics_in_branches_loops_inner_graphs_and_metrics_tell_batch_and_epoch(line, tmp_path):
    x, y = line
    sized, dense = Sized(), layers.Dense(1)
    trainer = Measuring(lambda x: dense(sized(x)), optimizer="sgd", loss="mse", log_dir=tmp_path / "run")
    history = trainer.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0).history
    points = {tag: values for tag, (_, values) in read_scalars(tmp_path / "run" / "train").items()}
    by_batch = {
        "batch_branch": [float(y[i : i + 10].sum() > 0) for i in range(0, 100, 10)],
        "batch_looped": [3.0] * 10,
        "batch_half": [y[i : i + 10].mean() / 2 for i in range(0, 100, 10)],
        "batch_size": [np.abs(x[i : i + 10]).mean() for i in range(0, 100, 10)],
    }
    for tag, values in by_batch.items():
        np.testing.assert_allclose(points[tag], values * 2, rtol=1e-4, err_msg=tag)
    assert history["looped"] == [30.0, 30.0]
    assert history["half"] == pytest.approx([y.mean() / 2] * 2, rel=1e-4)


def test_a_metric_counts_for_the_step_that_updates_it(line):
    x, y = line

    class Mine(looplab.Trainer):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.mine = keras.metrics.MeanAbsoluteError(name="mae")

        def train_step(self, batch):
            return {**super().train_step(batch), "mae": tf.constant(7.0)}

        def test_step(self, batch):
            self.mine.update_state(batch[1], self(batch[0]))
            return super().test_step(batch)

    history = Mine(functional(), optimizer="sgd", loss="mse").fit(x, y, epochs=2, verbose=0, validation_data=(x, y))
    assert history.history["mae"] == [7.0, 7.0]
    assert all(0 < value < 7 for value in history.history["val_mae"])


def test_a_step_written_for_keras_runs_as_it_is(line):
    """As the guides write it: gradients by hand, and all of `metrics`."""
    x, y = line

    class Guide(looplab.Trainer):
        def train_step(self, data):
            inputs, targets = data
            with tf.GradientTape() as tape:
                outputs = self(inputs, training=True)
                loss = self.compute_loss(y=targets, y_pred=outputs)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss)
                else:
                    metric.update_state(targets, outputs)
            return {metric.name: metric.result() for metric in self.metrics}

    options = {"optimizer": "sgd", "loss": "mse", "metrics": ["mae"]}
    model = functional()
    start = model.get_weights()
    by_guide = Guide(model, seed=3, **options).fit(x, y, batch_size=20, epochs=2, verbose=0).history
    model.set_weights(start)
    by_default = looplab.Trainer(model, seed=3, **options).fit(x, y, batch_size=20, epochs=2, verbose=0).history
    for name in ("loss", "mae"):
        assert by_guide[name] == pytest.approx(by_default[name], rel=1e-5)


def test_the_loss_stands_among_the_metrics_for_callbacks(line):
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((float(self.model.metrics[0].result()), logs["loss"]))

    looplab.Trainer(functional(), optimizer="sgd", loss="mse").fit(*line, epochs=2, verbose=0, callbacks=[Look()])
    assert [one for one, _ in seen] == pytest.approx([other for _, other in seen])


def test_averaged_weights_are_the_weights_in_the_end(line):
    x, y = line
    results = []
    model = functional()
    start = model.get_weights()
    for trains in (lambda optimizer: model, lambda optimizer: looplab.Trainer(model, optimizer=optimizer, loss="mse")):
        model.set_weights(start)
        optimizer = keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.9)
        model.compile(optimizer, "mse")
        trains(optimizer).fit(x, y, batch_size=20, epochs=2, shuffle=False, verbose=0)
        results.append(model.get_weights())
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("recompiles", [False, True])
def test_averages_of_an_earlier_optimizer_leave_the_weights_as_they_are(line, recompiles):
    x, y = line

    def trained(of):
        keras.utils.set_random_seed(0)
        model = functional()
        model.compile(keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.9), "mse")
        one = of(model)
        one.fit(x, y, batch_size=20, shuffle=False, verbose=0)
        if recompiles or one is model:
            model.compile(keras.optimizers.SGD(0.1), "mse")
        else:
            one.optimizer = keras.optimizers.SGD(0.1)
        one.fit(x, y, batch_size=20, shuffle=False, verbose=0)
        return model.get_weights()

    for ours, expected in zip(trained(looplab.Trainer), trained(lambda model: model), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("eager", [False, True])
def test_a_rate_that_the_step_assigns_is_shown_as_the_update_has_used_it(line, tmp_path, eager):
    class Decaying(looplab.Trainer):
        def train_step(self, batch):
            x, y = batch
            self.optimizer.learning_rate.assign(0.1 / (1 + tf.cast(self.optimizer.iterations, "float32")))
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            self.minimize(tape, loss)
            self.optimizer.learning_rate.assign(0.0)
            return {"loss": loss}

    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    trainer = Decaying(model, optimizer="sgd", loss="mse", log_dir=tmp_path, run_eagerly=eager)
    trainer.fit(*line, batch_size=20, verbose=0)
    np.testing.assert_allclose(read_scalars(tmp_path / "train")["batch_learning_rate"][1], 0.1 / np.arange(1, 6))


# What a trainer finds.


def test_a_callable_object_is_found_whole(line, tmp_path):
    x, y = line

    class Net:
        def __init__(self):
            self.dense, self.normal = layers.Dense(1), layers.BatchNormalization()
            self.itself = {"net": self}

        def __call__(self, x, training):
            return self.normal(self.dense(x), training=training)

    trainer = looplab.Trainer(Net(), optimizer="sgd", loss="mse")
    trainer.fit(x, y, verbose=0)
    assert len(trainer.get_weights()) == 6
    expected = trainer.predict(x)
    trainer.save_weights(tmp_path / "net.weights.h5")
    trainer.fit(x, y, verbose=0)
    trainer.load_weights(tmp_path / "net.weights.h5")
    np.testing.assert_array_equal(trainer.predict(x), expected)


def test_a_full_model_checkpoint_is_the_model(line, tmp_path):
    model = functional()
    trainer = looplab.Trainer(model, optimizer="sgd", loss="mse")
    trainer.fit(*line, verbose=0, callbacks=[keras.callbacks.ModelCheckpoint(tmp_path / "model.keras")])
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(line[0], verbose=0), model.predict(line[0], verbose=0))


def test_a_function_of_the_epoch_may_change_the_shape_of_its_batches():
    def sizes(epoch):
        return tf.data.Dataset.from_tensors(tf.ones((2, 3 + epoch, 3 + epoch, 1)))

    class Sizes(looplab.Trainer):
        def train_step(self, images):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(self(images, training=True) ** 2)
            self.minimize(tape, loss)
            return {"pixels": tf.size(images)}

    trainer = Sizes(layers.Conv2D(1, 3), optimizer="sgd")
    with pytest.warns(UserWarning, match=r"third time.*`x` was \(2, 4, 4, 1\) float32, and is \(2, 5, 5, 1\)"):
        assert trainer.fit(sizes, epochs=4, verbose=0).history["pixels"] == [18, 32, 50, 72]


def test_logging_in_a_prediction_is_no_error(line):
    class Talking(keras.Model):
        def call(self, x):
            trainer.log("mean", tf.reduce_mean(x))
            return x

    trainer = looplab.Trainer(Talking())
    np.testing.assert_array_equal(trainer.predict(line[0]), line[0])


def test_autograph_converts_what_a_loss_passes_to_tensorflow():
    def halved(strategy, outputs):
        if tf.reduce_sum(outputs) > 0:
            return outputs / 2
        return outputs

    def loss(targets, outputs):
        return (tf.distribute.get_replica_context().merge_call(halved, (outputs,)) - targets) ** 2

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    ones = np.ones((4, 1), "float32")
    history = looplab.Trainer(model, optimizer="sgd", loss=loss).fit(ones, 2 * ones, verbose=0).history
    assert history == {"loss": [2.25]}
