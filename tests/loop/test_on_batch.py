"""Single steps belong to a run: they are counted, guarded, logged and saved, and see what changes between them."""

import gc
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import looplab

L = keras.layers
x = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
y = x.sum(1, keepdims=True)


def one():
    """A compiled model."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, "tanh"), L.Dropout(0.2), L.Dense(1)])
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse", metrics=["mae"])
    return model


def values_of(trainer):
    """All its variables, by path."""
    variables = trainer._looplab.runner.variables.by_path()
    return {path: tf.convert_to_tensor(variable).numpy() for path, variable in variables.items()}


def learn(trainer, steps):
    """The first `steps` steps of a loop, each with a batch of its own; a trainer continues where it is."""
    for step in range(trainer.steps, steps):
        trainer.train_on_batch(x[step : step + 8], y[step : step + 8])
    return trainer


def test_each_step_is_counted_and_logged(tmp_path):
    trainer = looplab.Trainer(one(), log_dir=tmp_path)
    logs = [trainer.train_on_batch(x[:8], y[:8], return_dict=True) for _ in range(3)]
    trainer.test_on_batch(x, y)
    trainer.fit(x, y, batch_size=20, verbose=0)
    trainer.train_on_batch(x, y)
    assert (trainer.steps, trainer.epochs, int(trainer.optimizer.iterations)) == (6, 1, 6)
    curves = looplab.read_scalars(tmp_path / "train")
    assert set(curves) == {
        *("batch_loss", "batch_mae", "batch_loss/mse", "batch_learning_rate"),
        *("epoch_loss", "epoch_mae", "epoch_loss/mse"),
    }
    steps, losses = curves["batch_loss"]
    assert steps.tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(losses[:3], np.float32([log["loss"] for log in logs]))
    assert not (tmp_path / "validation").exists()


PROGRAM = """
import sys, numpy as np
sys.path.insert(0, {tests!r})
from loop.test_on_batch import learn, looping, values_of, x, y
trainer = looping({folder!r})
trainer.build(x, y)
trainer.restore()
assert trainer.steps == 8
learn(trainer, 14)
np.savez({folder!r} + ".npz", **{{path.replace("/", "|"): value for path, value in values_of(trainer).items()}})
"""


def looping(folder):
    return looplab.Trainer(one(), log_dir=folder, seed=1, checkpoint=looplab.Checkpoint(every=4))


def test_a_loop_continues_in_another_process_to_the_same_bits(tmp_path):
    expected = values_of(learn(looping(tmp_path / "whole"), 14))
    learn(looping(tmp_path / "parts"), 10)
    gc.collect()  # a trainer that nothing holds any more gives its folder back
    program = PROGRAM.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path / "parts"))
    subprocess.run([sys.executable, "-c", program], check=True)
    found = np.load(tmp_path / "parts.npz")
    assert {path.replace("/", "|") for path in expected} == set(found)
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path.replace("/", "|")], value, err_msg=path)
    whole, parts = (looplab.read_scalars(tmp_path / name / "train") for name in ("whole", "parts"))
    for tag, (steps, values) in whole.items():
        assert steps.tolist() == [*range(1, 15)]
        np.testing.assert_array_equal(parts[tag], (steps, values), err_msg=tag)
    saved = {path.name for path in (tmp_path / "parts" / "checkpoints").glob("step-*")}
    assert saved == {"step-8-epoch-0", "step-12-epoch-0"}


def test_a_folder_with_a_run_is_rejected_unless_the_run_is_restored(tmp_path):
    learn(looplab.Trainer(one(), log_dir=tmp_path, checkpoint=looplab.Checkpoint(every=2)), 4)
    gc.collect()
    trainer = looplab.Trainer(one(), log_dir=tmp_path)
    with pytest.raises(ValueError, match="holds the run of another trainer"):
        trainer.train_on_batch(x, y)


# What is not finite.


def test_a_batch_that_is_not_finite_is_an_error_and_changes_nothing():
    trainer, bad = looplab.Trainer(one()), np.where(np.arange(len(x))[:, None] == 2, np.nan, x)
    trainer.train_on_batch(x, y)
    weights = trainer.get_weights()
    with pytest.raises(FloatingPointError, match=r"at step 2.*`x` itself is not finite, first in row 2"):
        trainer.train_on_batch(bad, y)
    assert all(map(np.array_equal, trainer.get_weights(), weights))
    assert trainer.steps == 1
    trainer.skip_nonfinite = 2
    for _ in range(2):  # the count starts again after a sound step
        assert np.isnan(trainer.train_on_batch(bad, y, return_dict=True)["loss"])
        assert np.isnan(trainer.train_on_batch(bad, y, return_dict=True)["loss"])
        with pytest.raises(FloatingPointError):
            trainer.train_on_batch(bad, y)
        assert np.isfinite(trainer.train_on_batch(x, y, return_dict=True)["loss"])
    assert (trainer.steps, trainer.skipped_steps) == (7, 4)


# What changes between two steps.


def frozen(trainer):
    trainer.model.layers[0].trainable = False
    return [trainer.model.layers[0].kernel]


def scheduled(trainer):
    trainer.optimizer.learning_rate = keras.optimizers.schedules.ExponentialDecay(0.0, 1, 1.0)
    return trainer.weights


def with_rate(trainer):
    trainer.optimizer.learning_rate = 0.0
    return trainer.weights


def with_optimizer(trainer):
    trainer.optimizer = keras.optimizers.SGD(0.0)
    return trainer.weights


def compiled_again(trainer):
    trainer.model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mae")
    return trainer.weights


@pytest.mark.parametrize("change", [frozen, scheduled, with_rate, with_optimizer, compiled_again])
def test_a_change_acts_from_the_next_step(change):
    trainer = looplab.Trainer(one())
    kernel = trainer.model.layers[0].kernel
    for _ in range(2):
        before = kernel.numpy()
        trainer.train_on_batch(x, y)
        assert not np.array_equal(kernel, before)
    unchanged = change(trainer)
    before = [variable.numpy() for variable in unchanged]
    trainer.train_on_batch(x, y)
    assert all(map(np.array_equal, unchanged, before))
    trainer.model.layers[0].trainable = True
    if change is frozen:
        trainer.train_on_batch(x, y)
        assert not np.array_equal(kernel, before[0])


class KilledError(Exception):
    """Ends a program as a kill would."""


def mixed(folder, stop_at=None):
    """A program with single steps between two calls of `fit`, which may be started again at any time."""
    trainer = looping(folder)
    trainer.fit(x, y, batch_size=8, verbose=0, resume=True)
    while trainer.steps < 11:
        learn(trainer, trainer.steps + 1)
        if trainer.steps == stop_at:
            raise KilledError
    trainer.fit(x, y, batch_size=8, verbose=0, resume=True)
    return trainer


@pytest.mark.parametrize("stop_at", [7, 8, 10])
def test_single_steps_between_two_fits_continue_to_the_same_bits(tmp_path, stop_at):
    expected = values_of(mixed(tmp_path / "whole"))
    with pytest.raises(KilledError):
        mixed(tmp_path / "parts", stop_at)
    gc.collect()
    found = values_of(mixed(tmp_path / "parts"))
    assert expected.keys() == found.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    whole, parts = (looplab.read_scalars(tmp_path / name / "train") for name in ("whole", "parts"))
    assert whole["batch_loss"][0].tolist() == [*range(1, 17)]
    for tag, points in whole.items():
        np.testing.assert_array_equal(parts[tag], points, err_msg=tag)


def test_fit_continues_after_restored_single_steps_alone(tmp_path):
    expected = learn(looping(tmp_path), 4).get_weights()
    gc.collect()
    trainer = looping(tmp_path)
    with pytest.raises(ValueError, match=r"is of `train_on_batch`, after step 4. Call `build` with the data"):
        trainer.fit(x, y, verbose=0, resume=True)
    trainer.build(x, y)
    trainer.restore()
    assert all(map(np.array_equal, trainer.get_weights(), expected))
    trainer.fit(x, y, batch_size=8, verbose=0, resume=True)
    assert looplab.read_scalars(tmp_path / "train")["batch_loss"][0].tolist() == [*range(1, 10)]
