"""What the time of a training is spent on, with a clock that only the test moves, and in a real training."""

import json
import threading
import time

import keras
import numpy as np
import pytest

import looplab
from looplab.loop.costs import REMEDIES, Costs
from looplab.testing import read_scalars

ACTIVITIES = ["steps", *REMEDIES, "tracing", "other"]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def spend(clock, costs, activity, seconds):
    with costs.of(activity):
        clock.now += seconds


def test_time_belongs_to_the_outermost_activity_of_the_thread(clock):
    costs = Costs(clock)
    with costs.of("validation"):
        spend(clock, costs, "steps", 3)
        costs.waited(2)
    thread = threading.Thread(target=spend, args=(clock, costs, "callbacks", 5))
    thread.start()
    thread.join()
    spend(clock, costs, "steps", 4)
    costs.waited(1)
    spend(clock, costs, "logging", 6)
    assert costs.seconds == dict.fromkeys(ACTIVITIES, 0) | {"steps": 3, "data": 1, "validation": 3, "logging": 6}


def test_a_lap_has_shares_and_warns_of_what_takes_a_second_and_a_tenth_of_it(clock):
    costs = Costs(clock)
    for activity, seconds in (("steps", 6), ("logging", 0.5), ("data", 2), ("checkpoints", 0.9)):
        spend(clock, costs, activity, seconds)
    clock.now = 10
    assert costs.warnings == []
    shares = costs.lap()
    expected = {"steps": 0.6, "logging": 0.05, "data": 0.2, "checkpoints": 0.09, "other": 0.06}
    assert shares == pytest.approx(dict.fromkeys(ACTIVITIES, 0) | expected)
    assert costs.warnings == [f"looplab: 20% of the epoch went to {REMEDIES['data']}."]
    spend(clock, costs, "data", 0.9)
    assert costs.lap() == pytest.approx(dict.fromkeys(ACTIVITIES, 0) | {"data": 1})
    assert costs.warnings == []  # of less than a second


def test_what_is_left_counts_as_other_and_nothing_counts_after_the_end(clock):
    with Costs(clock) as costs:
        spend(clock, costs, "tracing", 2)
        clock.now += 1
    spend(clock, costs, "steps", 5)
    costs.waited(1)
    assert costs.seconds == dict.fromkeys(ACTIVITIES, 0) | {"tracing": 2, "other": 1}


def test_a_training_measures_its_activities(tmp_path):
    x = np.ones((8, 2), "float32")

    class Slow(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            time.sleep(0.02)

    def batches():
        for _ in range(6):
            time.sleep(0.02)
            yield x, x[:, :1]

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    trainer = looplab.Trainer(model, optimizer="sgd", loss="mse", seed=0, log_dir=tmp_path)
    with pytest.warns(UserWarning, match="is an iterator"):
        history = trainer.fit(batches(), validation_data=(x, x[:, :1]), callbacks=[Slow()], verbose=0)
    seconds = json.loads(json.dumps(history.params["costs"]))
    assert [*seconds] == ACTIVITIES
    assert all(seconds.values())
    trainer.evaluate(x, x[:, :1], verbose=0)
    assert history.params["costs"] == seconds  # those of this call of `fit`
    assert seconds["data"] >= 4 * 0.02  # two batches show the signature
    assert seconds["callbacks"] >= 0.02
    points = read_scalars(tmp_path / "time")
    assert {*points} == {f"time/{activity}" for activity in seconds}
    shares = {activity: points[f"time/{activity}"][1].item() for activity in seconds}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["callbacks"] > 0  # `on_epoch_end` belongs to the epoch that it ends
    assert shares["checkpoints"] == 0  # and the checkpoint after it to the next one
