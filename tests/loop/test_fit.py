"""The order of operations in one call of `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from looplab.checkpoint.policy import Checkpoint
from looplab.checkpoint.store import Store
from looplab.loop.fit import Fit
from looplab.loop.resume import Resume
from looplab.testing import read_scalars

X = np.arange(8, dtype=np.float32)


class Recorder(keras.callbacks.Callback):
    """Records the calls of hooks, with the steps done."""

    async_safe = True

    def __init__(self, stop_at=None):
        super().__init__()
        self.calls, self.logs, self._stop_at = [], [], stop_at

    def _record(self, name):
        self.calls.append((name, self.model.engine.state.steps))

    def on_train_begin(self, logs=None):
        self._record("train begin")

    def on_epoch_begin(self, epoch, logs=None):
        self._record(f"epoch {epoch} begin")

    def on_test_begin(self, logs=None):
        self._record("test begin")

    def on_test_end(self, logs=None):
        self._record("test end")

    def on_epoch_end(self, epoch, logs=None):
        self._record(f"epoch {epoch} end")
        self.logs.append(dict(logs))
        if epoch == self._stop_at:
            self.model.stop_training = True

    def on_train_end(self, logs=None):
        self._record("train end")


def fit(trainer, *callbacks, epochs=2, validation_freq=1, first_epoch=0, checkpoint=None, resume=False):
    engine = trainer.engine
    data = tf.data.Dataset.from_tensor_slices(X).batch(4)
    train = engine.batches("x", data, training_from=0)
    validation = engine.batches("validation_data", data)
    found = Resume(engine, checkpoint, resume)
    Fit(engine, train, validation, validation_freq, [*callbacks], first_epoch, epochs, 0, found).run()
    return engine.state


def test_the_order_of_hooks(bare, tmp_path):
    recorder = Recorder()
    state = fit(bare(log_dir=tmp_path), recorder)
    assert recorder.calls == [
        ("train begin", 0),
        ("epoch 0 begin", 0),
        ("test begin", 2),
        ("test end", 2),
        ("epoch 0 end", 2),
        ("epoch 1 begin", 2),
        ("test begin", 4),
        ("test end", 4),
        ("epoch 1 end", 4),
        ("train end", 4),
    ]
    assert recorder.logs == [{"loss": 3.5, "seen": 28, "val_loss": 3.5 - weight, "val_seen": 28} for weight in (2, 4)]
    assert (state.steps, state.epochs, state.epoch, state.in_epoch) == (4, 2, 2, False)
    for folder, name in ("train", "loss"), ("validation", "val_loss"):
        steps, values = read_scalars(tmp_path / folder)["epoch_loss"]
        np.testing.assert_array_equal(steps, [1, 2])
        np.testing.assert_array_equal(values, [logs[name] for logs in recorder.logs])


@pytest.mark.parametrize(("freq", "validated"), [(2, [False, True, False]), ([1, 3], [True, False, True])])
def test_validation_runs_when_it_is_due(bare, freq, validated):
    recorder = Recorder()
    fit(bare(), recorder, epochs=3, validation_freq=freq)
    assert ["val_loss" in logs for logs in recorder.logs] == validated


def test_a_callback_stops_after_an_epoch(bare):
    trainer = bare()
    assert fit(trainer, Recorder(stop_at=1), epochs=5).epochs == 2
    assert trainer.stop_training


def test_epochs_may_start_later(bare):
    recorder = Recorder()
    state = fit(bare(), recorder, first_epoch=3, epochs=4)
    assert [name for name, _ in recorder.calls if "epoch" in name] == ["epoch 3 begin", "epoch 3 end"]
    assert state.epochs == 4


def test_saves_when_it_is_due_and_resumes_there(bare, tmp_path, capfd):
    checkpoint = Checkpoint(every=3, keep=9)
    fit(bare(log_dir=tmp_path), checkpoint=checkpoint)
    paths = Store(tmp_path / "checkpoints", checkpoint).paths()
    assert [path.name for path in paths] == ["step-4-epoch-2", "step-3-epoch-1"]
    with pytest.raises(
        ValueError, match="`monitor` must be in the logs of an epoch, such as 'val_loss'; got 'val_los'"
    ):
        fit(bare(log_dir=tmp_path / "others"), checkpoint=Checkpoint(monitor="val_los"))
    again = bare(log_dir=tmp_path)
    recorder = Recorder()
    with pytest.warns(UserWarning, match="no state of Recorder"):
        state = fit(again, recorder, epochs=3, checkpoint=checkpoint, resume=True)
    assert recorder.calls[:2] == [("train begin", 0), ("epoch 2 begin", 4)]
    assert (state.steps, state.epochs, float(again.weight)) == (6, 3, 6)


def test_averages_become_weights_at_the_end(bare):
    trainer = bare(optimizer=keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5))
    trainer.runner.prepare(trainer.optimizer, [trainer.weight])
    fit(trainer, epochs=1)
    assert float(trainer.weight) == 1.5  # the average of 1 and 2


def test_an_eager_step_that_cannot_be_traced_cannot_resume(bare, tmp_path):
    class Looking(bare.kind):
        def train_step(self, x):
            x.numpy()
            return super().train_step(x)

    trainer = bare(Looking, log_dir=tmp_path)
    trainer.run_eagerly = True
    fit(trainer, epochs=1, checkpoint=Checkpoint())
    again = bare(Looking, log_dir=tmp_path)
    again.run_eagerly = True
    with pytest.raises(ValueError, match=r"`run_eagerly` with `resume`.*under `if self.run_eagerly:`"):
        fit(again, epochs=2, checkpoint=Checkpoint(), resume=True)
    assert again.run_eagerly
