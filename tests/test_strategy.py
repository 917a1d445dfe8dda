"""Training on two devices."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers

import looplab
from looplab.testing import assert_resume_exact, read_scalars


def trained(scope, x, y, log_dir, **options):
    keras.utils.set_random_seed(0)
    with scope:
        hidden = layers.Dense(8, "relu", kernel_regularizer="l2", activity_regularizer="l2", name="hidden")
        model = keras.Sequential([hidden, layers.Dense(1)], name="net")  # built by its first step
        trainer = looplab.Trainer(
            model,
            optimizer=keras.optimizers.Adam(0.01),
            loss="mse",
            metrics=["mae"],
            seed=0,
            log_dir=log_dir,
            **options,
        )
    history = trainer.fit(x, y, batch_size=20, epochs=3, verbose=0, validation_data=(x, y)).history
    return trainer, history


def test_two_replicas_compute_what_one_computes(line, tmp_path, two_devices):
    one, expected = trained(contextlib.nullcontext(), *line, tmp_path / "one")
    two, history = trained(two_devices.scope(), *line, tmp_path / "two")
    assert two.strategy.num_replicas_in_sync == 2
    assert set(history) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-3, err_msg=name)
    np.testing.assert_allclose(two.predict(line[0]), one.predict(line[0]), atol=1e-4)
    points = [read_scalars(tmp_path / name / "train") for name in ("one", "two")]
    assert set(points[0]) == set(points[1])
    np.testing.assert_allclose(points[1]["batch_loss"][1], points[0]["batch_loss"][1], rtol=1e-3)


def test_a_last_batch_may_leave_a_replica_without_rows(line, two_devices):
    x, y = (np.concatenate([part, part[:1]]) for part in line)
    trainer, history = trained(two_devices.scope(), x, y, None)
    assert all(np.isfinite(values).all() for values in history.values())
    assert trainer.predict(x).shape == (101, 1)
    assert trainer.evaluate(x, y)["mae"] == pytest.approx(float(np.mean(np.abs(trainer.predict(x) - y))), rel=1e-4)


def test_two_replicas_resume_to_the_same_bits(line, two_devices):
    x, y = (part[:40] for part in line)  # no replica without rows, of which batch normalisation makes NaN

    def build(**options):
        with two_devices.scope():
            inner = [layers.Dense(8, "relu"), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(1)]
            trainer = looplab.Trainer(
                keras.Sequential(inner), optimizer=keras.optimizers.Adam(), loss="mse", metrics=["mae"], **options
            )
        return looplab.Recipe(trainer, (x, y), validation=(x, y), epochs=2, batch_size=24)

    assert_resume_exact(build, 2)  # in mid-epoch, and after an epoch
