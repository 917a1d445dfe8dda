"""Training that resumes, within one process; `tests/faults` kills real ones."""

import functools
import json
import os
import shutil
import signal
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.hparams.api import HParam, IntInterval, hparams_config

import looplab
from looplab.testing import assert_resume_exact, read_scalars

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(25, 6)).astype("float32")
Y = RANDOM.integers(0, 3, 25)


def net(*first):
    inner = [layers.Dense(8, "relu"), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(3)]
    return keras.Sequential([*first, *inner], name="net")


def recipe(
    train,
    validation=(X, Y),
    batch_size=None,
    callbacks=(),
    epochs=3,
    trainer=looplab.Trainer,
    is_built=True,
    **options,
):
    options.setdefault("optimizer", keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, 20)))
    options.setdefault("loss", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    made = trainer(net(keras.Input((6,))) if is_built else net(), metrics=["accuracy"], **options)
    return looplab.Recipe(made, train, validation, epochs, batch_size, callbacks)


def batches(shuffled=True):
    dataset = tf.data.Dataset.from_tensor_slices((X, Y))
    return (dataset.shuffle(25, seed=1) if shuffled else dataset).batch(13)


class WithOwnLoop(looplab.Trainer):
    """Two optimizers, a variable, noise without a seed of its own, and two calls of one model."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.scale = tf.Variable(1.0)
        self.slow = keras.optimizers.SGD(0.1, momentum=0.9)

    def train_step(self, batch):
        x, y = batch
        noise = keras.random.normal(tf.shape(x)) * 0.1
        with tf.GradientTape(persistent=True) as tape:
            y_pred = self(x * self.scale + noise, training=True)
            loss = self.compute_loss(x, y, y_pred)
            penalty = tf.reduce_mean(self(x, training=True) ** 2) + self.scale**2
        self.minimize(tape, loss, self.model.trainable_variables)
        self.minimize(tape, penalty, [self.scale], self.slow)
        return {"loss": loss, "penalty": penalty, **self.compute_metrics(x, y, y_pred)}


class Remembering(keras.callbacks.Callback):
    """Has state of each kind that a checkpoint can hold."""

    def __init__(self):
        super().__init__()
        self.seen = {"losses": [], 3: (1, None)}
        self.total = np.zeros(2)

    def on_train_batch_end(self, batch, logs=None):
        self.total += logs["loss"]
        if batch % 2:
            self.seen["losses"].append((batch, np.float32(logs["loss"])))


def kept():
    stopping = keras.callbacks.EarlyStopping("loss", patience=5, restore_best_weights=True)
    return [stopping, keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=1.0), Remembering()]


CASES = {
    "arrays, and a model that its first step builds": lambda **o: recipe((X, Y), batch_size=13, is_built=False, **o),
    "callbacks": lambda **o: recipe((X, Y), batch_size=13, callbacks=kept(), optimizer="adam", **o),
    "datasets that shuffle in each iteration": lambda **o: recipe(batches(), validation=batches().cache(), **o),
    "one that is validated on, too": lambda **o: (lambda dataset: recipe(dataset, dataset, **o))(batches()),
    "a dataset of unknown length that shuffles twice in each epoch": lambda **o: recipe(
        batches().unbatch().repeat(2).batch(25).filter(lambda x, y: True), **o
    ),
    "a function of the epoch": lambda **o: recipe(lambda epoch: batches(False).skip(epoch).concatenate(batches()), **o),
    "an own step": lambda **o: recipe((X, Y), batch_size=13, trainer=WithOwnLoop, steps_per_execution=2, **o),
    "accumulation and averages": lambda **o: recipe(
        (X, Y), batch_size=13, optimizer=keras.optimizers.Adam(gradient_accumulation_steps=3, use_ema=True), **o
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_resumes_from_any_step_to_the_same_bits(name):
    """Each epoch has two steps, the last of them ragged: so from mid-epoch, and from its end."""
    in_second_epoch = name in ("callbacks", "datasets that shuffle in each iteration")
    assert_resume_exact(CASES[name], 3 if in_second_epoch else 2)


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate


class Scaled(layers.Layer):
    def __init__(self, scale):
        super().__init__()
        self.holder = {0: lambda: scale}

    def call(self, x):
        return x * self.holder[0]()


class ScaledError(keras.losses.Loss):
    def __init__(self, scale):
        super().__init__()
        self.scaled = lambda value: value * scale

    def call(self, y_true, y_pred):
        return self.scaled(tf.reduce_mean((y_true - y_pred) ** 2, -1))


# Models, optimizers and losses over a variable that only a callback changes, and no attribute leads to.
READ_ONLY = {
    "schedule": lambda value: ([], keras.optimizers.SGD(Schedule(value)), "mse"),
    "layer": lambda value: ([Scaled(value)], "sgd", "mse"),
    "lambda": lambda value: ([layers.Lambda(lambda x: x * value)], "sgd", "mse"),
    "regularizer": lambda value: ([layers.Dense(2, kernel_regularizer=lambda w: value * tf.norm(w))], "sgd", "mse"),
    "loss": lambda value: ([], "sgd", ScaledError(value)),
}


@pytest.mark.parametrize("kind", READ_ONLY)
def test_a_variable_that_only_a_callback_changes_is_saved(kind, line, tmp_path):
    def run(log_dir, epochs):
        keras.utils.set_random_seed(0)
        value = tf.Variable(0.1, trainable=False)
        inner, optimizer, loss = READ_ONLY[kind](value)
        model = keras.Sequential([keras.Input((4,)), *inner, layers.Dense(1)])
        anneal = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: value.assign(value / 2))
        trainer = looplab.Trainer(model, optimizer=optimizer, loss=loss, log_dir=tmp_path / log_dir, seed=0)
        history = trainer.fit(*line, epochs=epochs, callbacks=[anneal], verbose=0, resume=True).history
        return history["loss"], value.numpy()

    run("resumed", 2)
    assert run("resumed", 4) == run("whole", 4)


TABLES = {
    "MutableHashTable": lambda: tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, 0.0),
    "FIFOQueue": lambda: tf.queue.FIFOQueue(100, [tf.float32], [()]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_or_queue_that_a_step_changes_is_refused_where_it_would_have_to_be_saved(kind, line, tmp_path):
    class Counting(looplab.Trainer):
        def train_step(self, batch):
            if kind == "FIFOQueue":
                self.table.enqueue(1.0)
            elif tf.reduce_any(batch[0] > -100):  # in a branch, too
                self.table.insert(tf.constant(0, tf.int64), 1.0)
            return super().train_step(batch)

    def run(**options):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
        trainer = Counting(model, optimizer="sgd", loss="mse", **options)
        trainer.table = TABLES[kind]()
        trainer.fit(*line, verbose=0)
        return int(trainer.table.size())

    with pytest.raises(ValueError, match="`train_step` changes a table or queue"):
        run(log_dir=tmp_path / "saved")
    assert not list(tmp_path.glob("saved/train/*"))
    assert run(log_dir=tmp_path / "unsaved", checkpoint=None) > 0
    assert run() > 0


def test_tables_that_a_step_only_reads_are_saved_by_nobody(line, tmp_path):
    keys = tf.constant([0, 1], tf.int64)
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, [0.0, 1.0]), 0.0)
    model = keras.Sequential([keras.Input((4,)), layers.Lambda(lambda x: x + table[keys[1]]), layers.Dense(1)])
    trainer = looplab.Trainer(model, optimizer="sgd", loss="mse", log_dir=tmp_path)
    assert len(trainer.fit(*line, verbose=0).history["loss"]) == 1


def test_what_cannot_resume_exactly_is_reported():
    class Noisy(looplab.Trainer):
        def train_step(self, batch):
            x, y = batch
            return super().train_step((x + tf.random.normal(tf.shape(x)), y))

    build = functools.partial(recipe, (X, Y), batch_size=13, epochs=1, trainer=Noisy)
    with pytest.warns(UserWarning, match=r"random numbers that no checkpoint can restore \(RandomStandardNormal\)"):
        with pytest.raises(AssertionError, match=r"Resumed after step 1, .* differs"):
            assert_resume_exact(build, 1)
    with pytest.raises(ValueError, match="`steps` must be at most 2, the steps of the training; got 9"):
        assert_resume_exact(functools.partial(recipe, (X, Y), batch_size=13, epochs=1), 9)


def trained(log_dir, epochs, **options):
    """`fit` of a new trainer: what a program does each time it is started."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    trainer = recipe((X, Y), log_dir=log_dir, **options).trainer
    history = trainer.fit(X, Y, batch_size=10, epochs=epochs, validation_data=(X, Y), verbose=0, resume=True)
    return trainer, history.history


def contents(log_dir):
    return {path: path.read_bytes() for path in log_dir.rglob("*") if path.is_file() and path.name != ".lock"}


def points(log_dir):
    found = {part: read_scalars(log_dir / part) for part in ("train", "validation")}
    return {
        (part, tag): (steps.tolist(), values.tobytes())
        for part, tags in found.items()
        for tag, (steps, values) in tags.items()
    }


def test_a_finished_run_stays_as_it_is_and_more_epochs_extend_it(tmp_path, capsys):
    _, whole = trained(tmp_path / "whole", 4)
    _, first = trained(tmp_path / "parts", 2)
    assert capsys.readouterr().out.count("has no checkpoint: starting at step 1") == 2
    files = contents(tmp_path / "parts")
    trainer, again = trained(tmp_path / "parts", 2)
    assert (again, trainer.steps, trainer.epochs) == (first, 6, 2)
    assert contents(tmp_path / "parts") == files
    _, more = trained(tmp_path / "parts", 4)
    assert more == whole
    assert points(tmp_path / "parts") == points(tmp_path / "whole")


def test_a_run_may_resume_without_saving_any_more(tmp_path):
    _, whole = trained(tmp_path / "whole", 3)
    trained(tmp_path / "parts", 2)
    before = sorted((tmp_path / "parts" / "checkpoints").iterdir())
    _, more = trained(tmp_path / "parts", 3, checkpoint=None)
    assert more == whole
    assert sorted((tmp_path / "parts" / "checkpoints").iterdir()) == before


def test_early_stopping_has_stopped_for_good(tmp_path):
    def run():
        keras.utils.set_random_seed(0)
        trainer = recipe((X, Y), log_dir=tmp_path, optimizer="adam").trainer
        stopping = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=9.0, restore_best_weights=True)
        history = trainer.fit(X, Y, epochs=9, verbose=0, callbacks=[stopping], resume=True).history
        return history, trainer.get_weights()

    history, weights = run()
    assert len(history["loss"]) == 2
    again, restored = run()
    assert again == history
    for one, other in zip(weights, restored, strict=True):
        np.testing.assert_array_equal(one, other)


class StopInTheMidst(keras.callbacks.Callback):
    """Stops after the third step, and sends a signal in the validation that comes then."""

    def __init__(self, number=None):
        super().__init__()
        self.number = number

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = np.float32(self.model.steps) >= 3  # a bool of NumPy's

    def on_test_batch_end(self, batch, logs=None):
        if self.number is not None:
            os.kill(os.getpid(), self.number)
            time.sleep(0.1)


def test_an_epoch_that_a_callback_stopped_is_ended(tmp_path):
    def run(log_dir, number=None):
        keras.utils.set_random_seed(0)
        trainer = recipe((X, Y), log_dir=log_dir, optimizer="adam").trainer
        arguments = {"batch_size": 5, "epochs": 4, "validation_data": (X, Y), "callbacks": [StopInTheMidst(number)]}
        return trainer.fit(X, Y, **arguments, verbose=0, resume=True).history, trainer.steps, trainer.epochs

    whole = run(tmp_path / "whole")
    assert (len(whole[0]["val_loss"]), *whole[1:]) == (1, 3, 1)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", signal.SIGTERM)
    for _ in range(2):
        assert run(tmp_path / "parts") == whole
    assert points(tmp_path / "parts") == points(tmp_path / "whole")


def test_a_signal_while_a_later_epoch_is_traced_leaves_a_state_that_resumes(tmp_path):
    """What no attribute leads to, such as the seed of a bare `keras.random`, is found by tracing."""

    class Noisy(looplab.Trainer):
        def train_step(self, batch):
            x, y = batch
            if x.shape[0] == 5 and interrupts:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
            return super().train_step((x + keras.random.normal(tf.shape(x)), y))

    def of_epoch(epoch):
        return tf.data.Dataset.from_tensor_slices((X, Y)).batch(5 if epoch else 10, drop_remainder=True)

    def run(log_dir):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        trainer = recipe(of_epoch, log_dir=log_dir, optimizer="adam", trainer=Noisy).trainer
        return trainer.fit(of_epoch, epochs=2, verbose=0, resume=True).history

    interrupts = False
    whole = run(tmp_path / "whole")
    interrupts = True
    with pytest.raises(SystemExit):
        run(tmp_path / "parts")
    interrupts = False
    assert run(tmp_path / "parts") == whole


def test_random_numbers_of_a_validation_alone_resume(tmp_path):
    class Noisy(looplab.Trainer):
        def test_step(self, batch):
            x, y = batch
            return super().test_step((x + keras.random.normal(tf.shape(x)), y))

    def run(log_dir, epochs):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        trainer = recipe((X, Y), log_dir=log_dir, optimizer="adam", trainer=Noisy).trainer
        history = trainer.fit(X, Y, epochs=epochs, validation_data=(X, Y), verbose=0, resume=True).history
        assert trainer.evaluate(X, Y, verbose=0) == trainer.evaluate(X, Y, verbose=0)
        return history

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 2)
    assert run(tmp_path / "parts", 3) == whole


def test_counters_of_whole_numbers_resume(tmp_path):
    """TensorFlow makes them trainable by default."""

    class Counting(looplab.Trainer):
        def train_step(self, batch):
            self.count.assign_add(1)
            hidden.assign_add(2)
            x, y = batch
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            self.minimize(tape, loss)
            return {"loss": loss, "count": self.count, "hidden": counters[0]}

    counters = []
    hidden = type("Hidden", (), {"assign_add": lambda self, value: counters[0].assign_add(value)})()

    def run(epochs):
        keras.utils.set_random_seed(0)
        trainer = recipe((X, Y), log_dir=tmp_path, optimizer="adam", trainer=Counting).trainer
        trainer.count, counters[:] = tf.Variable(0), [tf.Variable(0)]
        return trainer.fit(X, Y, batch_size=25, epochs=epochs, verbose=0, resume=True).history

    run(2)
    history = run(4)
    assert (history["count"], history["hidden"]) == ([1, 2, 3, 4], [2, 4, 6, 8])


def test_event_files_of_others_stay(tmp_path):
    others = []
    for folder in ("", "extra"):
        with tf.summary.create_file_writer(str(tmp_path / folder)).as_default():
            tf.summary.scalar("other", 1.0, step=0)
        others += (tmp_path / folder).glob("events*")
    with tf.summary.create_file_writer(str(tmp_path), filename_suffix=".experiment").as_default():
        hparams_config(hparams=[HParam("width", IntInterval(1, 9))], metrics=[])
    others += tmp_path.glob("*.experiment")
    contents = {path: path.read_bytes() for path in others}
    trainer = recipe((X, Y), log_dir=tmp_path, optimizer="adam").trainer
    trainer.fit(X, Y, verbose=0, resume=True)
    trainer.log_hparams({"width": 8})
    trainer.log_hparams({"width": 9})
    assert {path: path.read_bytes() for path in others} == contents
    assert len(list(tmp_path.glob("events*"))) == 3


def test_hyperparameters_of_a_resumed_run_are_shown_together(tmp_path):
    def program(epochs):
        trainer = recipe((X, Y), log_dir=tmp_path, optimizer="adam").trainer
        trainer.log_hparams({"width": 8})
        trainer.fit(X, Y, epochs=epochs, verbose=0, resume=True)
        trainer.log_hparams({"epochs": epochs})

    for epochs in (1, 2):
        program(epochs)
        (file,) = tmp_path.glob("events*")
        (event,) = [event for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]
        content = event.summary.value[0].metadata.plugin_data.content
        info = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        assert {name: value.number_value for name, value in info.hparams.items()} == {"width": 8, "epochs": epochs}


def test_what_a_later_argument_makes_fail_removes_nothing(tmp_path):
    recipe((X, Y), log_dir=tmp_path, optimizer="adam", checkpoint=None).trainer.fit(X, Y, verbose=0)
    before = contents(tmp_path)
    trainer = recipe((X, Y), log_dir=tmp_path, checkpoint=looplab.Checkpoint(monitor="nothing")).trainer
    with pytest.raises(ValueError, match="`monitor` must be in the logs of an epoch"):
        trainer.fit(X, Y, initial_epoch=2, epochs=3, verbose=0, resume=True)
    assert contents(tmp_path) == before
    assert trainer.epochs == 0


@pytest.mark.parametrize(("exchanges", "ended_after"), [(True, 3), (False, 3), (False, 0)])
def test_a_program_of_two_fits_continues_the_interrupted_one(tmp_path, exchanges, ended_after):
    def program(log_dir, epochs_of_second):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        dataset = batches()  # the second `fit` continues its orders
        trainer = recipe(dataset, log_dir=log_dir, optimizer="adam").trainer
        stopping = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=9.0, restore_best_weights=True)
        first = trainer.fit(dataset, epochs=9, verbose=0, callbacks=[stopping], resume=True).history
        if epochs_of_second == 0:
            return None
        trainer.log("between", 1.0)
        trainer.model.layers[0].trainable = False
        if exchanges:
            trainer.optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        second = trainer.fit(dataset, epochs=epochs_of_second, verbose=0, resume=True).history
        trainer.log("after", 1.0)
        return first, second, trainer.steps, trainer.get_weights()

    whole = program(tmp_path / "whole", 4)
    program(tmp_path / "parts", ended_after)
    for _ in range(2):  # the second time all is done
        parts = program(tmp_path / "parts", 4)
        assert parts[:3] == whole[:3]
        assert [len(parts[0]["loss"]), len(parts[1]["loss"])] == [2, 4]
        for one, other in zip(parts[3], whole[3], strict=True):
            np.testing.assert_array_equal(one, other)
        assert points(tmp_path / "parts") == points(tmp_path / "whole")


class Slices(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return X[5 * index : 5 * index + 5], Y[5 * index : 5 * index + 5]


@pytest.mark.parametrize(
    "make_data",
    [
        lambda: {"x": X, "y": Y, "batch_size": 5},
        lambda: {"x": tf.data.Dataset.from_tensor_slices((X, Y)).batch(5)},
        lambda: {"x": Slices()},
    ],
    ids=["arrays", "dataset", "PyDataset"],
)
def test_a_later_fit_resumes_in_the_middle_of_an_epoch_that_is_no_pass(make_data, tmp_path):
    class Crash(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if (self.params["epochs"], self.model.epochs, batch) == crashes_at:
                raise KeyError

    def program(log_dir):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        trainer = recipe((X, Y), log_dir=log_dir, checkpoint=looplab.Checkpoint(every=1), optimizer="adam").trainer
        options = {"steps_per_epoch": 3, "callbacks": [Crash()], "verbose": 0, "resume": True}
        trainer.fit(**make_data(), epochs=1, **options)
        return trainer.fit(**make_data(), epochs=3, **options).history, trainer.get_weights()

    crashes_at = None
    history, weights = program(tmp_path / "whole")
    crashes_at = 3, 2, 1  # in the second epoch of the second call
    with pytest.raises(KeyError):
        program(tmp_path / "parts")
    crashes_at = None
    resumed, others = program(tmp_path / "parts")
    assert resumed == history
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_array_equal(one, other)
    assert points(tmp_path / "parts") == points(tmp_path / "whole")


class Phases(looplab.Trainer):
    """The first `fit` applies one optimizer, the second another one; both average weights."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.others = [keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5) for _ in range(2)]
        self.is_second = tf.Variable(False, trainable=False)

    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        if self.is_second:
            self.others[1].apply(gradients, variables)
        else:
            self.others[0].apply(gradients, variables)
        return {"loss": loss}


@pytest.mark.parametrize("where", ["on_train_batch_end", "on_epoch_end", "on_train_end"])
def test_only_optimizers_that_this_fit_has_used_average_its_weights(where, tmp_path):
    """Also if it resumes, in the middle or when all its steps are done."""

    class Crash(keras.callbacks.Callback):
        async_safe = False

    def crash(*_, **__):
        raise KeyError

    def program(log_dir, crashes=False):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        trainer = recipe((X, Y), trainer=Phases, log_dir=log_dir, checkpoint=looplab.Checkpoint(every=1)).trainer
        trainer.fit(X, Y, batch_size=13, verbose=0, resume=True)
        trainer.is_second.assign(True)
        callback = Crash()
        if crashes:
            setattr(callback, where, crash)
        trainer.fit(X, Y, batch_size=13, epochs=1, verbose=0, callbacks=[callback], resume=True)
        return trainer.get_weights(), next(one for one in trainer.others[1].variables if "average" in one.path)

    whole, average = program(tmp_path / "whole")
    np.testing.assert_array_equal(whole[0], average)
    with pytest.raises(KeyError):
        program(tmp_path / "parts", crashes=True)
    for one, other in zip(program(tmp_path / "parts")[0], whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_complete_calls_of_fit_are_skipped_and_the_state_is_the_newest(tmp_path, capsys):
    def program(calls):
        trainer = recipe((X, Y), log_dir=tmp_path, optimizer="adam").trainer
        histories = [trainer.fit(X, Y, epochs=epochs, verbose=0, resume=True).history for epochs in calls]
        return histories, trainer.steps, trainer.epochs, trainer.get_weights()

    whole = program([3, 5])
    assert capsys.readouterr().out.count("\n") == 1  # that there is no checkpoint
    for calls in ([3], [9], [3, 5]):
        histories, *counters, weights = program(calls)
        assert histories == whole[0][: len(calls)]
        assert counters == [*whole[1:3]]
        for one, other in zip(weights, whole[3], strict=True):
            np.testing.assert_array_equal(one, other)
        assert "call 1 of `fit`" in (out := capsys.readouterr().out)
        assert "is complete, with 3 epochs: skipped. The state is the newest, after 8 epochs in all." in out
    histories, _, epochs, _ = program([3, 7])  # the newest call may be extended
    assert (epochs, len(histories[1]["loss"]), histories[1]["loss"][:5]) == (10, 7, whole[0][1]["loss"])


def test_many_calls_of_fit_keep_two_checkpoints_of_one_size(tmp_path):
    trainer = recipe((X, Y), log_dir=tmp_path, optimizer="adam", checkpoint=looplab.Checkpoint(keep=2)).trainer
    sizes = []
    for _ in range(12):
        trainer.fit(X, Y, validation_data=(X, Y), verbose=0)
        newest = max((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
        sizes.append((newest / "state.json").stat().st_size)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert len(list(tmp_path.glob("*/events*"))) == 3
    assert max(sizes) - min(sizes) < 100
    assert len((tmp_path / "fits.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("epochs", "patience", "line", "done"),
    [
        (9, 0, "stopped after epoch 2 of 9 by EarlyStopping: nothing to train", 2),
        (12, 0, "stopped after epoch 2 of 9 by EarlyStopping: continuing to epoch 12", 4),
        (9, 2, "stopped after epoch 2 of 9 by EarlyStopping: continuing to epoch 9", 5),
        (9, None, "stopped after epoch 2 of 9 by EarlyStopping: continuing to epoch 9", 9),
        (2, None, "stopped after epoch 2 of 9 by EarlyStopping: nothing to train", 2),
    ],
)
def test_a_run_that_stopped_early_says_so_and_continues_where_more_is_asked(
    tmp_path, capsys, epochs, patience, line, done
):
    def run(epochs, patience):
        keras.utils.set_random_seed(0)
        trainer = recipe((X, Y), log_dir=tmp_path, optimizer="adam").trainer
        stops = [] if patience is None else [keras.callbacks.EarlyStopping("loss", patience=patience, min_delta=9.0)]
        return trainer, trainer.fit(X, Y, epochs=epochs, verbose=0, callbacks=stops, resume=True).history

    first, _ = run(9, 0)
    capsys.readouterr()
    trainer, history = run(epochs, patience)
    assert line in capsys.readouterr().out
    assert (trainer.epochs, len(history["loss"])) == (done, done)
    if done == 2:
        for one, other in zip(first.get_weights(), trainer.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


class StopAfter(keras.callbacks.Callback):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch + 1 >= self.count


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda n: [StopAfter(n)],
        lambda n: [keras.callbacks.EarlyStopping("loss", patience=p, min_delta=9.0) for p in (9, n - 1)],
    ],
    ids=["own", "the second of a class"],
)
def test_a_run_continues_where_the_callback_that_stopped_it_has_changed(tmp_path, capsys, callbacks):
    def run(callbacks):
        keras.utils.set_random_seed(0)
        trainer = recipe((X, Y), log_dir=tmp_path, optimizer="adam").trainer
        trainer.fit(X, Y, epochs=8, verbose=0, callbacks=callbacks, resume=True)
        return trainer.epochs

    assert run(callbacks(2)) == 2
    assert run(callbacks(2)) == 2
    assert "nothing to train" in capsys.readouterr().out
    assert run(callbacks(4)) > 2
    assert run([]) == 8


@pytest.mark.parametrize("eager", [False, True])
def test_a_validation_that_was_killed_runs_again_with_the_same_values(tmp_path, eager):
    class Fails(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            if self.model.steps == 6 and fails:
                raise EOFError

    def run(log_dir):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.Dense(1, kernel_regularizer="l2", name="line")])
        metrics = [keras.metrics.RootMeanSquaredError(name="rmse")]
        checkpoint = looplab.Checkpoint(every=3)
        options = {"log_dir": log_dir, "run_eagerly": eager, "checkpoint": checkpoint, "seed": 1}
        trainer = looplab.Trainer(model, optimizer="adam", loss="mse", metrics=metrics, **options)
        x = X.reshape(len(X), -1)
        fit = {"validation_data": (x, x[:, :1]), "batch_size": 12, "epochs": 3, "callbacks": [Fails()]}
        return trainer.fit(x, x[:, :1], **fit, verbose=0, resume=True).history

    fails = False
    whole = run(tmp_path / "whole")
    fails = True
    with pytest.raises(EOFError):
        run(tmp_path / "parts")
    fails = False
    assert run(tmp_path / "parts") == whole
    assert points(tmp_path / "parts") == points(tmp_path / "whole")


class Journal(keras.callbacks.Callback):
    """Appends a line for each epoch to a file of its own."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_train_begin(self, logs=None):
        self.file = open(self.path, "a")  # noqa: SIM115

    def on_epoch_end(self, epoch, logs=None):
        self.file.write(f"{epoch} {logs['loss']!r}\n")
        self.file.flush()

    def on_train_end(self, logs=None):
        self.file.close()


@pytest.mark.parametrize("append", [False, True])
def test_files_that_callbacks_append_to_have_each_epoch_once(tmp_path, append):
    def run(folder, fails_at=None):
        def fail(epoch, logs):
            if epoch == fails_at:
                raise EOFError

        keras.utils.set_random_seed(0)
        settings = looplab.Checkpoint(every="2 epochs")
        trainer = recipe((X, Y), log_dir=folder, optimizer="adam", checkpoint=settings).trainer
        logger = keras.callbacks.CSVLogger(str(folder) + ".csv", append=append)
        callbacks = [logger, Journal(f"{folder}.txt"), keras.callbacks.LambdaCallback(on_epoch_end=fail)]
        trainer.fit(X, Y, epochs=6, verbose=0, callbacks=callbacks, resume=True)

    run(tmp_path / "whole")
    for epoch in (2, 3, 4):
        with pytest.raises(EOFError):
            run(tmp_path / "parts", epoch)
    run(tmp_path / "parts")
    for suffix in (".csv", ".txt"):
        whole, parts = ((tmp_path / (name + suffix)).read_text() for name in ("whole", "parts"))
        assert parts == whole
        assert len(parts.splitlines()) == 6 + (suffix == ".csv")


def test_a_validation_order_that_cannot_be_restored_is_a_warning(tmp_path):
    def run(epochs):
        endless = batches().repeat()
        trainer = recipe((X, Y), log_dir=tmp_path, optimizer="adam").trainer
        trainer.fit(X, Y, epochs=epochs, validation_data=endless, validation_steps=1, verbose=0, resume=True)

    run(1)
    with pytest.warns(UserWarning, match="`validation_data` shuffles in each iteration and is not read to its end"):
        run(2)


@pytest.mark.parametrize("is_complete", [False, True])
def test_a_training_order_that_cannot_be_restored_is_a_warning(is_complete, tmp_path, recwarn):
    """A dataset that the first `fit` reads with `steps_per_epoch`, and the second as a whole."""

    def program(epochs):
        dataset = batches()
        trainer = recipe(dataset, log_dir=tmp_path, optimizer="adam").trainer
        trainer.fit(dataset, epochs=1, steps_per_epoch=15, verbose=0, resume=True)
        if epochs:
            trainer.fit(dataset, epochs=epochs, verbose=0, resume=True)

    program(0 if is_complete else 2)
    assert not [warning for warning in recwarn if "cannot restore its order" in str(warning.message)]
    with pytest.warns(UserWarning, match="`x` shuffles in each iteration .*so a resumed run cannot restore its order"):
        program(4)


def test_a_dataset_that_cannot_repeat_its_order_is_an_error(tmp_path):
    def fail(epoch):
        if epoch == 1:
            raise RuntimeError

    dataset = batches()
    trainer = recipe(dataset, log_dir=tmp_path, optimizer="adam", checkpoint=looplab.Checkpoint(every=3)).trainer
    failing = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: fail(epoch))
    with pytest.raises(RuntimeError):
        trainer.fit(dataset, epochs=3, verbose=0, callbacks=[failing])
    weights = trainer.get_weights()
    with pytest.raises(ValueError, match=r"`x` is a dataset that shuffles in each iteration.*Create the dataset again"):
        trainer.fit(dataset, epochs=3, verbose=0, resume=True)
    for one, other in zip(trainer.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(trainer.fit(batches(), epochs=3, verbose=0, resume=True).history["loss"]) == 3


def test_what_was_logged_before_fit_is_there_once(tmp_path):
    def program():
        trainer = recipe((X, Y), log_dir=tmp_path, optimizer="adam").trainer
        trainer.log_hparams({"width": 8})
        trainer.log("before", 1.0)
        trainer.fit(X, Y, epochs=1, verbose=0, resume=True)

    program()
    shutil.rmtree(tmp_path / "checkpoints")  # as if it had been killed before the first
    program()
    program()
    assert read_scalars(tmp_path / "train")["before"][0].tolist() == [0]
    assert read_scalars(tmp_path / "train")["epoch_loss"][0].tolist() == [1]
    assert len(list(tmp_path.glob("events*"))) == 1


def test_the_best_and_the_newest_stay_and_can_be_restored(tmp_path):
    values = [3.0, 1.0, 2.0, 2.5, 4.0]

    class Scripted(looplab.Trainer):
        def test_step(self, batch):
            return {"loss": super().test_step(batch)["loss"] * 0 + self.scripted}

    keras.utils.set_random_seed(0)
    settings = looplab.Checkpoint(keep=2, monitor="val_loss")
    trainer = recipe((X, Y), log_dir=tmp_path, optimizer="adam", trainer=Scripted, checkpoint=settings).trainer
    trainer.scripted = tf.Variable(0.0, trainable=False)
    weights = []

    def script(epoch, logs=None):
        trainer.scripted.assign(values[epoch])

    def keep(epoch, logs=None):
        weights.append(trainer.get_weights())

    follow = keras.callbacks.LambdaCallback(on_epoch_begin=script, on_epoch_end=keep)
    trainer.fit(X, Y, epochs=5, validation_data=(X, Y), verbose=0, callbacks=[follow])
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step-2-epoch-2", "step-4-epoch-4", "step-5-epoch-5"}
    flipped = tmp_path / "checkpoints" / "step-5-epoch-5" / "manifest.json"
    content = flipped.read_bytes()
    flipped.write_bytes(content[:-1])
    for which, epoch in {"best": 1, "newest": 3}.items():
        with pytest.warns(UserWarning, match="Skipped: checkpoint .*step-5-epoch-5 is damaged"):
            trainer.restore(which)
        for one, other in zip(trainer.get_weights(), weights[epoch], strict=True):
            np.testing.assert_array_equal(one, other)
    flipped.write_bytes(content)
    best = shutil.move(tmp_path / "checkpoints" / "step-2-epoch-2" / "arrays.safetensors", tmp_path)
    with pytest.warns(UserWarning, match="Skipped: checkpoint .*step-2-epoch-2 is damaged"):
        trainer.restore("best")
    for one, other in zip(trainer.get_weights(), weights[3], strict=True):
        np.testing.assert_array_equal(one, other)
    shutil.move(best, tmp_path / "checkpoints" / "step-2-epoch-2")
    for which, epoch in {"best": 1, "newest": 4, tmp_path / "checkpoints" / "step-4-epoch-4": 3}.items():
        trainer.restore(which)
        for one, other in zip(trainer.get_weights(), weights[epoch], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("every", [1, 2, 3, 1000, "3 epochs"])
def test_the_best_epoch_is_saved_whatever_the_interval_is(tmp_path, every):
    keras.utils.set_random_seed(0)
    settings = looplab.Checkpoint(every=every, keep=1, monitor="val_loss")
    trainer = recipe((X, Y), log_dir=tmp_path, optimizer=keras.optimizers.SGD(3.0), checkpoint=settings).trainer
    history = trainer.fit(X, Y, batch_size=13, epochs=6, validation_data=(X, Y), verbose=0).history
    assert history["val_loss"][-1] > min(history["val_loss"])
    trainer.restore("best")
    assert trainer.evaluate(X, Y, verbose=0)["loss"] == pytest.approx(min(history["val_loss"]), rel=1e-5)


def test_other_settings_of_the_optimizer_are_reported(tmp_path):
    def run(**options):
        return recipe((X, Y), log_dir=tmp_path, **options).trainer.fit(X, Y, epochs=2, verbose=0, resume=True)

    run(optimizer=keras.optimizers.Adam(0.01))
    with pytest.warns(UserWarning, match="of `optimizer` was") as caught:
        history = run(optimizer=keras.optimizers.Adam(0.02, clipnorm=1.0))
    assert [str(warning.message).partition(": ")[2].partition(". ")[0] for warning in caught] == [
        "learning_rate of `optimizer` was 0.01, and now it is 0.02",
        "clipnorm of `optimizer` was None, and now it is 1",
    ]
    assert float(history.model.optimizer.learning_rate) == pytest.approx(0.01)


def test_a_schedule_needs_no_config(tmp_path):
    class Falling(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1 / (1 + tf.cast(step, "float32"))

    trainer = recipe((X, Y), log_dir=tmp_path, optimizer=keras.optimizers.Adam(Falling())).trainer
    assert len(trainer.fit(X, Y, epochs=2, verbose=0).history["loss"]) == 2


@pytest.mark.parametrize(("every", "left"), [(3, 4), ("2 epochs", 3), ("1 second", 2)])
def test_checkpoints_come_as_often_as_asked_for(tmp_path, every, left):
    settings = looplab.Checkpoint(every=every, keep=100)
    trainer = recipe((X, Y), log_dir=tmp_path, optimizer="adam", checkpoint=settings).trainer
    pause = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: tf.py_function(lambda: None, [], []))
    trainer.fit(X, Y, batch_size=10, epochs=3 if every == 3 else 5, verbose=0, callbacks=[pause])
    found = len(list((tmp_path / "checkpoints").glob("step-*")))
    assert found == left if every != "1 second" else 1 <= found <= 20  # the last is always there


def test_checkpoints_can_be_turned_off(tmp_path):
    recipe((X, Y), log_dir=tmp_path, optimizer="adam", checkpoint=None).trainer.fit(X, Y, verbose=0)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_checkpoint_is_plain_files_that_others_can_read(tmp_path):
    trainer = recipe((X, Y), log_dir=tmp_path, optimizer="adam").trainer
    trainer.fit(X, Y, verbose=0)
    (path,) = (tmp_path / "checkpoints").iterdir()
    state = json.loads((path / "state.json").read_text())
    assert (state["state"]["steps"], state["state"]["epochs"]) == (1, 1)
    content = (path / "arrays.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entry = header["/variables/model/0/value"]
    begin, end = entry["data_offsets"]
    kernel = np.frombuffer(content[8 + length + begin : 8 + length + end], "<f4").reshape(entry["shape"])
    np.testing.assert_array_equal(kernel, trainer.get_weights()[0])
