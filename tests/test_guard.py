"""Losses and gradients that are not finite: no update, and a word on which."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import looplab
from looplab.testing import read_scalars


def net():
    hidden = layers.Dense(4, "tanh", name="hidden")  # ReLU makes 0 of NaN
    return keras.Sequential(
        [layers.Input((4,)), hidden, layers.BatchNormalization(name="bn"), layers.Dense(1)], name="net"
    )


def poisoned(line, *rows):
    """A data set of batches of ten, in which these rows of x are NaN."""
    x, y = line
    x = x.copy()
    x[list(rows)] = np.nan
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(10)


def state(trainer):
    """All variables, but for Keras's own mean of the loss over whole epochs."""
    groups = {"weight": trainer.weights, "seed": [trainer.seed_generator.state]}
    groups |= {path: optimizer.variables for path, optimizer in trainer.optimizers.items()}
    groups |= {metric.name: metric.variables for metric in trainer.metrics if metric.name != "loss"}
    named = ((f"{name} {i}", variable) for name, group in groups.items() for i, variable in enumerate(group))
    return {name: np.array(tf.convert_to_tensor(variable)) for name, variable in named}


def assert_same(one, other):
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], err_msg=path)


@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 7}, {"jit_compile": True}, {"run_eagerly": True}])
def test_all_is_as_it_was_before_a_batch_of_nan(line, options, tmp_path):
    def trainer(**more):
        keras.utils.set_random_seed(0)
        return looplab.Trainer(net(), optimizer="adam", loss="mse", metrics=["mae"], seed=0, **options, **more)

    clean, stopped = trainer(), trainer(log_dir=tmp_path)
    clean.fit(poisoned(line).take(3), verbose=0)
    with pytest.raises(FloatingPointError) as caught:
        stopped.fit(poisoned(line, 34, 57), epochs=2, verbose=0)
    text = str(caught.value)
    assert text.startswith(
        "The loss is not finite, at step 4 (batch 4 of epoch 1). loss = nan; loss/mse = nan; `x` itself"
    )
    assert "first in row 4 of the batch" in text
    assert "skip_nonfinite" in text
    assert stopped.steps == 3
    assert_same(state(clean), state(stopped))
    with np.load(tmp_path / "nonfinite" / "step-4.npz", allow_pickle=False) as batch:
        np.testing.assert_array_equal(batch["y"], line[1][30:40])
    assert list(read_scalars(tmp_path / "train")["batch_loss"][0]) == [1, 2, 3]


def test_the_step_can_be_gone_through_again_line_by_line(line, tmp_path):
    seen = []

    class Looking(looplab.Trainer):
        def train_step(self, batch):
            if self.run_eagerly:  # which it is not told to be while it is traced
                seen.append(np.isnan(batch[0].numpy()).sum())
            return super().train_step(batch)

    for options in ({}, {"run_eagerly": True}):
        keras.utils.set_random_seed(0)
        trainer = Looking(net(), optimizer="adam", loss="mse", seed=0, log_dir=tmp_path, **options)
        with pytest.raises(FloatingPointError, match="at step 4"):
            trainer.fit(poisoned(line, 34), verbose=0, resume=bool(options))
    assert seen == [4]


def test_what_cannot_be_traced_is_told_where_it_is_to_be_gone_through_again(line, tmp_path):
    class Looking(looplab.Trainer):
        def train_step(self, batch):
            logs = super().train_step(batch)
            return {**logs, "seen": tf.constant(logs["loss"].numpy() if looks else 0.0)}

    for looks in (False, True):
        trainer = Looking(net(), optimizer="adam", loss="mse", seed=0, log_dir=tmp_path, run_eagerly=looks)
        with pytest.raises((FloatingPointError, ValueError)) as caught:
            trainer.fit(poisoned(line, 34), verbose=0, resume=looks)
    assert "numpy" in str(caught.value)
    assert "under `if self.run_eagerly:`" in str(caught.value)


def test_steps_can_be_passed_over_and_count_nowhere(line, tmp_path):
    class Counting(looplab.Trainer):
        def train_step(self, batch):
            return {**super().train_step(batch), "twice": tf.constant(2.0)}

    trainer = Counting(net(), optimizer="adam", loss="mse", metrics=["mae"], log_dir=tmp_path)
    trainer.skip_nonfinite = 2
    with pytest.warns(UserWarning, match="4 of 10 steps were skipped"):
        history = trainer.fit(poisoned(line, 0, 12, 45, 89), epochs=2, verbose=0).history
    assert trainer.skipped_steps == 8
    assert trainer.steps == 20
    assert int(tf.convert_to_tensor(trainer.optimizer.iterations)) == 12
    assert np.isfinite([*history["loss"], *history["mae"]]).all()
    assert all(np.isfinite(value).all() for value in state(trainer).values())
    points = read_scalars(tmp_path / "train")["batch_loss"]
    assert [int(step) for step, value in zip(*points, strict=True) if np.isnan(value)] == [1, 2, 5, 9, 11, 12, 15, 19]
    with pytest.raises(FloatingPointError, match="step 23"):
        trainer.fit(poisoned(line, 0, 12, 25), verbose=0)


@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_bad_steps_in_a_row_are_counted_over_graph_calls(line, steps_per_execution):
    trainer = looplab.Trainer(net(), optimizer="sgd", loss="mse", steps_per_execution=steps_per_execution)
    trainer.skip_nonfinite = 3
    with pytest.warns(UserWarning, match="3 of 10 steps were skipped"):
        trainer.fit(poisoned(line, 25, 35, 45), verbose=0)
    with pytest.raises(FloatingPointError):
        trainer.fit(poisoned(line, 25, 35, 45, 55), verbose=0)


def test_bad_steps_in_a_row_are_counted_over_epochs_and_where_it_goes_on(line, tmp_path):
    def run(log_dir, fails_at=None):
        def fail(epoch):
            if epoch == fails_at:
                raise InterruptedError

        keras.utils.set_random_seed(0)
        trainer = looplab.Trainer(net(), optimizer="sgd", loss="mse", log_dir=log_dir)
        trainer.skip_nonfinite = 2
        failing = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: fail(epoch))
        trainer.fit(poisoned(line, 5, 95, 85), epochs=2, verbose=0, callbacks=[failing], resume=True)

    with pytest.raises(FloatingPointError, match="at step 11 "), pytest.warns(UserWarning, match="3 of 10 steps"):
        run(tmp_path / "whole")  # 9, 10 and the next epoch's first are passed over
    with pytest.raises(InterruptedError), pytest.warns(UserWarning, match="3 of 10 steps"):
        run(tmp_path / "parts", fails_at=1)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="at step 11 "):
            run(tmp_path / "parts")


def test_what_ends_a_training_whatever_may_be_skipped_can_be_mended_and_gone_on_from(line, tmp_path):
    def run(log_dir, label):
        keras.utils.set_random_seed(0)
        labels = np.zeros(100, "int64")
        labels[55] = label
        data = tf.data.Dataset.from_tensor_slices((line[0], labels)).batch(10)
        model = keras.Sequential([layers.Input((4,)), layers.Dense(2)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        trainer = looplab.Trainer(model, optimizer="adam", loss=loss, log_dir=log_dir, seed=0)
        return trainer.fit(data, verbose=0, resume=True).history

    whole = run(tmp_path / "whole", 1)
    with pytest.raises(ValueError, match="at step 6 "):
        run(tmp_path / "parts", 7)
    assert run(tmp_path / "parts", 1) == whole


def test_where_the_batch_cannot_be_written_the_fault_is_told(line, tmp_path):
    (tmp_path / "nonfinite").write_text("a file")
    trainer = looplab.Trainer(net(), optimizer="sgd", loss="mse", log_dir=tmp_path)
    with pytest.raises(FloatingPointError, match=r"at step 4 .*could not be written to .*step-4\.npz: File exists"):
        trainer.fit(poisoned(line, 34), verbose=0)


@tf.custom_gradient
def broken(x):
    return tf.identity(x), lambda upstream: upstream * np.inf


def test_a_gradient_that_is_not_finite_is_named_though_the_loss_is(line):
    class Broken(layers.Layer):
        def call(self, x):
            return broken(x)

    inner = [layers.Dense(3, name="below"), Broken(), layers.Dense(1, name="above")]
    model = keras.Sequential([layers.Input((4,)), *inner], name="net")
    before = model.get_weights()
    with pytest.raises(FloatingPointError, match=r"gradient of net/below/(kernel|bias) is not finite.*at step 1"):
        looplab.Trainer(model, optimizer="sgd", loss="mse").fit(*line, verbose=0)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


COUNT = tf.Variable(0.0, trainable=False)  # no attribute leads to it


class OwnOptimizer(looplab.Trainer):
    def train_step(self, batch):
        x, y = batch
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"my_loss": loss}


class BrokenGradients(OwnOptimizer):
    """Of a finite loss."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        finite = tf.where(tf.math.is_nan(y_pred), 1.0, y_pred)
        return tf.reduce_mean(tf.where(tf.reduce_any(tf.math.is_nan(x)), tf.sqrt(0.0 * finite), finite))


class Parts(looplab.Trainer):
    """Two nets with an optimizer each."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.other = keras.models.clone_model(model)
        self.second = keras.optimizers.Adam(0.01)

    def losses_of(self, batch):
        with tf.GradientTape(persistent=True) as tape:
            x = tf.where(tf.math.is_nan(batch[0]), 0.0, batch[0])
            first = tf.reduce_mean(tf.square(self.model(x, training=True) - batch[1]))
            second = tf.reduce_mean(tf.square(self.other(batch[0]) - batch[1]))
        return tape, first, second


class TwoMinimized(Parts):
    """Of which the second is wrong."""

    def train_step(self, batch):
        tape, first, second = self.losses_of(batch)
        if not self.run_eagerly:  # where only the graph tells of it
            COUNT.assign_add(1.0)
        self.minimize(tape, first, self.model.trainable_variables)
        self.minimize(tape, second, self.other.trainable_variables, self.second)
        return {"first": first, "second": second}


class OneByItself(Parts):
    """One by `minimize`, and one not."""

    def train_step(self, batch):
        tape, first, second = self.losses_of(batch)
        self.minimize(tape, first, self.model.trainable_variables)
        self.second.apply(tape.gradient(second, self.other.trainable_variables), self.other.trainable_variables)
        return {"loss": first, "other_loss": second}


class Following(Parts):
    """Whose other net follows the first."""

    def train_step(self, batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.model(batch[0], training=True) - batch[1]))
        self.minimize(tape, loss, self.model.trainable_variables)
        for slow, fast in zip(self.other.variables, self.model.variables, strict=True):
            slow.assign(0.9 * slow + 0.1 * fast)
        return {"loss": loss}


WHOLE = {
    "own optimizer": (OwnOptimizer, "`my_loss` is not finite"),
    "own optimizer, finite loss": (BrokenGradients, "The gradient of net/hidden/kernel is not finite"),
    "two minimized": (TwoMinimized, "The loss is not finite"),
    "one by itself": (OneByItself, "`other_loss` is not finite"),
    "one that follows": (Following, "The loss is not finite"),
}


@pytest.mark.parametrize(
    ("kind", "text", "eager"),
    # An eager step keeps all variables, whatever it does.
    [*((*values, False) for values in WHOLE.values()), (*WHOLE["one by itself"], True)],
)
def test_of_a_step_with_a_fault_nothing_stays(kind, text, eager, line):
    trainer = kind(net(), optimizer=keras.optimizers.Adam(0.01), loss="mse", run_eagerly=eager)
    trainer.fit(poisoned(line), verbose=0)
    before = {path: value for path, value in state(trainer).items() if "metric" not in path}
    with pytest.raises(FloatingPointError, match=rf"{text}.*, at step 11 .*The update was not made"):
        trainer.fit(poisoned(line, 4), verbose=0)
    after = state(trainer)
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)
    trainer.skip_nonfinite = 1
    with pytest.warns(UserWarning, match="1 of 10 steps were skipped"):
        trainer.fit(poisoned(line, 4), verbose=0)
    assert all(np.isfinite(value).all() for value in state(trainer).values())


class InfiniteGradients(looplab.Trainer):
    """Applies gradients that are infinite for batches with NaN, possibly in a branch."""

    in_branch = False

    def train_step(self, batch):
        x, y = batch
        is_bad = tf.reduce_any(tf.math.is_nan(x))
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(tf.where(tf.math.is_nan(x), 0.0, x)))
        variables = self.trainable_variables
        gradients = [one + tf.where(is_bad, np.inf, 0.0) for one in tape.gradient(loss, variables)]
        if self.in_branch:
            if tf.reduce_all(y < 1e9):
                self.optimizer.apply(gradients, variables)
        else:
            self.optimizer.apply(gradients, variables)
        return {"loss": loss}


@pytest.mark.parametrize("how", [{}, {"in_branch": True}, {"run_eagerly": True}])
@pytest.mark.parametrize(
    "optimizer",
    [lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=4), lambda: keras.optimizers.Lion(0.001)],
)
def test_a_gradient_that_only_the_state_of_an_optimizer_would_keep_is_named(optimizer, how, line):
    trainer = InfiniteGradients(net(), optimizer=optimizer(), loss="mse")
    for name, value in how.items():
        setattr(trainer, name, value)
    with pytest.raises(FloatingPointError, match=r"The gradient of net/hidden/kernel is not finite.*, at step 2 "):
        trainer.fit(poisoned(line, 12), verbose=0)
    assert all(np.isfinite(value).all() for value in state(trainer).values())


def test_a_loss_scale_deals_with_infinite_gradients_that_a_step_applies(line):
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=4.0)
    trainer = InfiniteGradients(net(), optimizer=optimizer, loss="mse")
    trainer.fit(poisoned(line, 12), verbose=0)
    assert trainer.skipped_steps == 0
    assert float(tf.convert_to_tensor(optimizer.dynamic_scale)) == 2.0
    assert int(tf.convert_to_tensor(optimizer.iterations)) == 9


def test_minimize_in_a_branch_is_guarded(line):
    class Sometimes(looplab.Trainer):
        def train_step(self, batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            if tf.reduce_any(tf.math.is_nan(x)):
                self.minimize(tape, loss)
            return {"loss": loss}

    trainer = Sometimes(net(), optimizer="sgd", loss="mse")
    with pytest.raises(FloatingPointError, match="The loss is not finite, at step 4"):
        trainer.fit(poisoned(line, 34), verbose=0)


def test_loss_scaling_goes_its_own_way_and_a_loss_of_nan_is_told(line):
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=2.0**126)
    trainer = looplab.Trainer(net(), optimizer=optimizer, loss="mse")
    trainer.fit(*line, batch_size=10, epochs=2, verbose=0)  # infinite gradients at first, and nobody minds
    assert float(tf.convert_to_tensor(optimizer.dynamic_scale)) < 2.0**126
    assert trainer.skipped_steps == 0
    with pytest.raises(FloatingPointError, match="The loss is not finite"):
        trainer.fit(poisoned(line, 34), verbose=0)


def test_one_replica_of_two_stops_both(line, two_devices):
    with two_devices.scope():
        trainer = looplab.Trainer(net(), optimizer=keras.optimizers.Adam(), loss="mse")
    trainer.fit(poisoned(line), verbose=0)
    before = trainer.get_weights()
    with pytest.raises(FloatingPointError, match="The loss is not finite, at step 11"):
        trainer.fit(poisoned(line, 7), verbose=0)
    for one, other in zip(before, trainer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_xla_runs_the_loop_over_arrays_as_tensorflow_does(line, tmp_path):
    def fitted(rate=0.1, epochs=2, **options):
        keras.utils.set_random_seed(0)
        trainer = looplab.Trainer(net(), optimizer=keras.optimizers.SGD(rate), loss="mse", seed=0, **options)
        with contextlib.suppress(FloatingPointError):
            trainer.fit(*line, batch_size=32, epochs=epochs, verbose=0)
        return trainer

    plain, *compiled = (
        fitted(jit_compile=jit, steps_per_execution=k) for jit, k in ((False, 3), (True, 3), (True, 100))
    )
    assert_same(state(compiled[0]), state(compiled[1]))
    for path, value in state(plain).items():
        np.testing.assert_allclose(state(compiled[0])[path], value, 1e-5, 1e-6, err_msg=path)
    plain, compiled = (fitted(1e20, 1, jit_compile=jit, log_dir=tmp_path / str(jit)) for jit in (False, True))
    assert plain.steps == compiled.steps > 0
