"""What a call of `fit` saves and restores, without training."""

import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

from looplab.checkpoint import histories
from looplab.checkpoint.policy import Checkpoint
from looplab.checkpoint.snapshot import Asked
from looplab.loop.guard import Fault
from looplab.loop.interrupts import Interrupted, Interrupts
from looplab.loop.resume import Resume
from looplab.loop.saving import Saving
from looplab.state import Progress

X = np.arange(8, dtype=np.float32)


class Counting(keras.callbacks.Callback):
    async_safe = True

    def __init__(self):
        super().__init__()
        self.count = 0

    def on_train_begin(self, logs=None):
        self.count = 10


class Call:
    """The parts of a call of `fit` that save."""

    def __init__(self, trainer, resume=False, epochs=5):
        self.trainer, self.engine, self.state = trainer, trainer.engine, trainer.engine.state
        found = Resume(self.engine, Checkpoint(monitor="val_loss", keep=9), resume)
        self.store = found.store
        data = tf.data.Dataset.from_tensor_slices(X).batch(4)
        self.train = self.engine.batches("x", data, training_from=0)
        self.callback = Counting()
        callbacks = keras.callbacks.CallbackList([self.callback], model=trainer)
        asked = Asked(epochs, self.train.described, {}, {})
        self.saving = Saving(self.engine, self.train, None, callbacks, asked, found)
        self.engine.tracer.compiled("train", self.train.element_spec)
        found.check(asked)
        found.load(self.train, None)
        self.saving.start()

    def snapshot(self):
        self.store.wait()
        return self.store.newest().snapshot

    def interrupts(self):
        return Interrupts(self.engine.tracer.stop, True, self.engine.workers)


@pytest.fixture
def call(bare, tmp_path):
    return Call(bare(log_dir=tmp_path))


def test_restores_variables_counters_and_callbacks(call, bare, tmp_path):
    call.trainer.weight.assign(7.0)
    call.trainer.seen.update_state(5.0)
    call.callback.count = 12
    call.state.steps, call.state.epochs, call.state.progress = 3, 1, Progress(batches=1)
    call.state.logs = {"loss": 0.5, "note": "not a number"}
    call.saving.save()
    call.snapshot()

    resumed = Call(bare(log_dir=tmp_path), resume=True)
    assert float(resumed.trainer.weight) == 7
    assert float(resumed.trainer.seen.result()) == 5
    assert resumed.callback.count == 12  # not the 10 of `on_train_begin`
    assert (resumed.state.steps, resumed.state.epochs, resumed.state.progress.batches) == (3, 1, 1)
    assert resumed.state.logs == {"loss": 0.5}


def test_monitors_the_epoch_that_has_just_ended(call):
    call.state.logs = {"val_loss": np.float32(0.5)}
    assert call.saving.monitored() == 0.5
    call.state.in_epoch = True
    assert call.saving.monitored() is None
    for logs in {}, {"val_loss": float("nan")}:
        call.state.in_epoch, call.state.logs = False, logs
        assert call.saving.monitored() is None


def test_a_checkpoint_in_a_validation_is_one_of_before_it(call):
    with call.saving.validating():
        call.state.steps, call.state.test_steps = 1, 9
        call.saving.save()
    assert call.snapshot().state.test_steps == 0
    call.state.steps = 2
    call.saving.save()
    assert call.snapshot().state.test_steps == 9


def test_remembers_which_callback_stopped_the_training(call):
    call.trainer.stop_training = True
    call.saving.save()
    assert call.snapshot().stopped_by == "a callback"
    call.callback.stopped_epoch = 1
    call.state.steps = 1
    call.saving.save()
    assert call.snapshot().stopped_by.startswith("Counting")


def test_a_signal_saves_what_is_new(call, capfd):
    call.state.steps = 3
    with pytest.raises(SystemExit), call.saving.on_exit(call.interrupts()):
        raise Interrupted(signal.SIGTERM)
    assert call.snapshot().state.steps == 3
    assert "SIGTERM: 3 steps are saved in" in capfd.readouterr().err


def test_a_fault_saves_and_becomes_an_error(call):
    call.state.steps = 3
    fault = Fault(1, "the loss is not finite", "train", 4, {"x": X}, {})
    with pytest.raises(FloatingPointError, match=r"at step 4 \(batch 4 of epoch 1\)"):
        with call.saving.on_exit(call.interrupts()):
            raise fault
    assert call.snapshot().state.steps == 3


def test_any_other_error_saves_nothing(call):
    with pytest.raises(ZeroDivisionError), call.saving.on_exit(call.interrupts()):
        raise ZeroDivisionError
    assert call.store.newest() is None


def test_a_complete_call_is_skipped(call, bare, tmp_path, capfd):
    call.trainer.weight.assign(7.0)
    call.state.steps, call.state.epochs, call.state.fits = 4, 2, 1
    histories.write(tmp_path, 0, {"loss": [0.5, 0.25]})
    call.saving.save()
    call.store.wait()
    trainer = bare(log_dir=tmp_path)
    found = Resume(trainer.engine, Checkpoint(), True)
    assert (found.is_skipped, found.saved) == (True, None)
    history = found.skip(call.train)
    assert (history.history, history.epoch) == ({"loss": [0.5, 0.25]}, [0, 1])
    assert (float(trainer.weight), trainer.engine.state.steps, trainer.engine.state.fits) == (7, 4, 1)
    assert "call 1 of `fit`" in capfd.readouterr().out
