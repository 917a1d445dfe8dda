"""One pass over data."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from looplab.loop.engine import joined
from looplab.loop.guard import Fault
from looplab.state import Progress
from looplab.testing import read_scalars

X = np.arange(10, dtype=np.float32)  # three batches: means of 1.5, 5.5 and 8.5


def batches(engine, x=X, **options):
    return engine.batches("x", tf.data.Dataset.from_tensor_slices(x).batch(4), **options)


def callback_list(trainer, *callbacks):
    return keras.callbacks.CallbackList(list(callbacks), model=trainer)


def run(trainer, kind="train", x=X, callbacks=(), progress=None, **options):
    progress = progress or Progress()
    data = batches(trainer.engine, x)
    results, parts = trainer.engine.run(kind, data, progress, callback_list(trainer, *callbacks), **options)
    return results, parts, progress


class Recorder(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.calls = []

    def on_train_batch_begin(self, batch, logs=None):
        self.calls.append(("begin", batch))

    def on_train_batch_end(self, batch, logs=None):
        self.calls.append(("end", batch, dict(logs)))


@pytest.mark.parametrize("steps", [1, 2])
def test_every_step_is_counted_written_and_seen(bare, steps, tmp_path):
    trainer, recorder = bare(log_dir=tmp_path), Recorder()
    trainer.steps_per_execution = steps
    results, parts, progress = run(trainer, callbacks=[recorder], folder="train")
    assert results == {"loss": pytest.approx(X.mean()), "seen": 45}
    assert parts == {}
    assert (trainer.engine.state.steps, progress.batches) == (3, 3)
    assert float(trainer.weight) == 3
    means = [1.5, 5.5, 8.5]
    ends = [
        ("end", i, {"loss": mean, "seen": total})
        for i, (mean, total) in enumerate(zip(means, [6, 22, 17], strict=True))
    ]
    assert recorder.calls == [call for i in range(3) for call in (("begin", i), ends[i])]
    points = read_scalars(tmp_path / "train")
    np.testing.assert_array_equal(points["batch_loss"], ([1, 2, 3], means))
    assert {*points} == {"batch_loss", "batch_seen", "batch_learning_rate"}


def test_a_pass_continues_where_it_is_and_may_be_cut_into_calls(bare):
    trainer, asked = bare(), []

    def between(done):
        asked.append(done)
        return 1

    trainer.steps_per_execution = 9
    rest = batches(trainer.engine).iterate(0, 1)
    results, _, progress = run(trainer, progress=Progress(batches=1), iterate=lambda: rest, between=between)
    assert asked == [1, 2, 3]
    assert (progress.batches, trainer.engine.state.steps) == (3, 2)
    assert results["loss"] == pytest.approx(X[4:].mean())


def test_a_callback_stops_a_training_after_a_call(bare):
    class Stopping(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = True

    trainer = bare()
    assert run(trainer, callbacks=[Stopping()])[2].batches == 1


def test_an_evaluation_changes_nothing_and_counts_for_tensorboard_alone(bare, tmp_path):
    trainer = bare(log_dir=tmp_path)
    trainer.weight.assign(2.0)
    trainer.seen.update_state(100.0)
    engine = trainer.engine
    results, _ = engine.evaluate(batches(engine), callback_list(trainer), "validation")
    assert results == {"loss": pytest.approx(X.mean() - 2), "seen": 45}
    assert float(trainer.seen.result()) == 100
    assert (engine.state.steps, engine.state.test_steps) == (0, 3)
    engine.evaluate(batches(engine), callback_list(trainer))
    assert engine.state.test_steps == 3
    np.testing.assert_array_equal(read_scalars(tmp_path / "validation")["batch_seen"], ([1, 2, 3], [6, 22, 17]))


def test_a_prediction_returns_the_outputs_of_each_batch(bare):
    trainer = bare()
    outputs = trainer.engine.predict(batches(trainer.engine), callback_list(trainer))
    assert [len(part) for part in outputs] == [4, 4, 2]
    np.testing.assert_array_equal(joined(*outputs), 2 * X)


def test_a_fault_ends_the_pass_and_does_not_count(bare):
    trainer, recorder = bare(), Recorder()
    x = np.where(np.arange(10) == 6, np.nan, X)
    progress = Progress()
    with pytest.raises(Fault) as caught:
        run(trainer, x=x, callbacks=[recorder], progress=progress)
    assert (caught.value.batch_number, caught.value.kind) == (2, "train")
    np.testing.assert_array_equal(caught.value.batch["x"], x[4:8])
    assert (trainer.engine.state.steps, progress.batches, float(trainer.weight)) == (1, 1, 1)
    assert progress.faults == 0  # it was not skipped
    assert [call[1] for call in recorder.calls if call[0] == "end"] == [0]


def test_faults_may_be_skipped(bare):
    trainer = bare()
    trainer.skip_nonfinite = 1
    x = np.where(np.arange(10) == 6, np.nan, X)
    with pytest.warns(UserWarning, match="1 of 3 steps were skipped"):
        results, _, progress = run(trainer, x=x)
    assert results["loss"] == pytest.approx((X[:4].sum() + X[8:].sum()) / 6)
    assert (trainer.engine.state.steps, trainer.engine.state.skipped_steps, progress.faults) == (3, 1, 0)
    x = np.where(np.arange(10) == 0, np.nan, X)
    with pytest.raises(Fault):  # the second in a row
        run(trainer, x=x, progress=Progress(faults=1))


def test_data_that_ends_early_or_at_once(bare):
    trainer = bare()
    engine, empty = trainer.engine, tf.data.Dataset.from_tensor_slices(X[:0]).batch(4)
    unknown = engine.batches("x", empty.filter(lambda _: True))
    with pytest.raises(ValueError, match="`test_step` has no batch"):
        engine.run("test", unknown, Progress(), callback_list(trainer))
    with pytest.warns(UserWarning, match="The data ended after 3 of 5 batches"):
        engine.run("test", batches(engine, steps=5), Progress(), callback_list(trainer))


def test_joins_rows_of_several_lengths():
    np.testing.assert_array_equal(joined(np.ones((1, 2)), np.zeros((2, 2))), [[1, 1], [0, 0], [0, 0]])
    sparse = tf.sparse.from_dense([[1.0, 0.0]])
    np.testing.assert_array_equal(joined(sparse, sparse), [[1, 0], [1, 0]])
    ragged = joined(np.ones((1, 2)), np.zeros((1, 3)))
    assert ragged.to_list() == [[1, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match="outputs of one rank"):
        joined(np.ones((1, 2)), np.ones((1, 2, 2)))
