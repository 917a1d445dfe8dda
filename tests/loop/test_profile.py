"""Profiles of training steps, written by TensorFlow's profiler."""

import time

import keras
import numpy as np
import pytest

import looplab
from looplab.loop.profile import Profile

X = np.ones((24, 2), "float32")


def files(log_dir):
    return [*(log_dir / "train" / "plugins" / "profile").glob("*/*.xplane.pb")]


def trainer(**options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    return looplab.Trainer(model, optimizer="sgd", loss="mse", seed=0, **options)


def test_starts_before_the_first_step_and_stops_after_the_last(tmp_path):
    with Profile((5, 9), tmp_path) as profile:
        assert [profile.left(done) for done in (0, 3)] == [4, 1]
        assert profile.left(4) == 5  # it runs
        assert [profile.left(done) for done in (9, 10)] == [None, None]
    assert len(files(tmp_path)) == 1
    with Profile(None, tmp_path) as profile:
        assert profile.left(0) is None


def test_a_training_is_profiled_and_computes_the_same(tmp_path):
    plain, profiled = trainer(), trainer(log_dir=tmp_path, profile_steps=(2, 5))
    histories = [one.fit(X, X[:, :1], batch_size=4, verbose=0).history for one in (plain, profiled)]
    assert histories[0] == histories[1]
    assert len(files(tmp_path)) == 1


def test_a_profile_ends_with_the_training_and_continues_with_it(tmp_path):
    profiled = trainer(log_dir=tmp_path, profile_steps=[4, 8])
    with pytest.warns(UserWarning, match="the training ended at step 6; the profile has steps 4 to 6."):
        profiled.fit(X, X[:, :1], batch_size=4, verbose=0)
    assert len(files(tmp_path)) == 1
    time.sleep(1)  # a profile is named by the second
    profiled.fit(X, X[:, :1], batch_size=4, verbose=0)  # has steps 7 and 8
    assert len(files(tmp_path)) == 2
    profiled.fit(X, X[:, :1], batch_size=4, verbose=0)
    assert len(files(tmp_path)) == 2


def test_a_profile_that_never_starts_is_a_warning(tmp_path):
    expected = "the training ended at step 6, before the first of these steps, 7: no profile was written."
    with pytest.warns(UserWarning, match=expected):
        trainer(log_dir=tmp_path, profile_steps=(7, 8)).fit(X, X[:, :1], batch_size=4, verbose=0)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [((3,), "got (3,)"), ((5, 3), "first at most last; got (5, 3)"), ((0, 3), "at least 1; got 0"), (7, "got 7")],
)
def test_other_values_are_errors(tmp_path, value, text):
    with pytest.raises(ValueError, match="`profile_steps`") as caught:
        trainer(log_dir=tmp_path, profile_steps=value)
    assert text in str(caught.value)
    with pytest.raises(ValueError, match="`log_dir`, which is None"):
        trainer(profile_steps=(1, 2))
