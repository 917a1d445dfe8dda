"""What checkpoints save of callbacks, and what they refuse to save."""

import collections
import functools

import keras
import numpy as np
import pytest
from keras import layers

import looplab
from looplab.testing import assert_resume_exact

X = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
Y = X[:, :1]


def recipe(make_callbacks, epochs=2, **options):
    """Two steps each epoch, with callbacks made anew."""
    net = keras.Sequential([layers.Input((3,)), layers.Dense(1)], name="net")
    trainer = looplab.Trainer(net, optimizer=keras.optimizers.SGD(0.1), loss=keras.losses.MeanSquaredError(), **options)
    return looplab.Recipe(trainer, (X, Y), None, epochs, 4, make_callbacks())


def trained(folder, *callbacks, epochs=2):
    """`fit` of a new trainer, with these callbacks, which it returns."""
    recipe(lambda: callbacks, epochs, log_dir=folder).fit(verbose=0, resume=True)
    return callbacks


class Counter(keras.callbacks.Callback):
    """Counts by a number of its own, so that the states of two are not the same."""

    def __init__(self, by):
        super().__init__()
        self.by, self.count = by, 0

    def on_train_batch_end(self, batch, logs=None):
        self.count += self.by


class My_Counter(Counter):  # noqa: N801
    pass


class _Private(Counter):
    pass


class Counter_2(Counter):  # noqa: N801
    pass


@pytest.mark.parametrize(
    "kinds",
    [
        (My_Counter, My_Counter),
        (_Private, _Private, _Private),
        (Counter_2, Counter, Counter),
        (Counter, Counter, Counter_2),
    ],
    ids=lambda kinds: " ".join(kind.__name__ for kind in kinds),
)
def test_each_callback_has_a_state_of_its_own(kinds, tmp_path):
    def callbacks():
        return [kind(by=10**index) for index, kind in enumerate(kinds)]

    trained(tmp_path, *callbacks(), epochs=1)
    again = trained(tmp_path, *callbacks(), epochs=2)
    assert [callback.count for callback in again] == [4 * 10**index for index in range(len(kinds))]


class Phased(keras.callbacks.Callback):
    """Has text that is an argument, and text that is none."""

    def __init__(self, phase="warmup"):
        super().__init__()
        self.phase = self.now = phase

    def on_epoch_end(self, epoch, logs=None):
        self.phase = self.now = "main"


def test_text_that_is_an_argument_stays_and_is_reported(tmp_path, recwarn):
    trained(tmp_path, Phased(), epochs=1)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"has 'main' as `phase` of Phased, which stays 'warmup'.*another name"):
        [phased] = trained(tmp_path, Phased(), epochs=1)
    assert (phased.phase, phased.now) == ("warmup", "main")
    trained(tmp_path, Phased("main"), epochs=1)  # as it was saved
    assert not recwarn


class Tallying(keras.callbacks.Callback):
    """Remembers in dicts of subclasses."""

    def __init__(self):
        super().__init__()
        self.counts = self.shared = collections.Counter()
        self.losses = collections.defaultdict(list)
        self.order = collections.OrderedDict()

    def on_train_batch_end(self, batch, logs=None):
        self.counts[batch] += 1
        self.losses[f"batch {batch}"].append(np.float32(logs["loss"]))
        self.order[batch] = logs["loss"]
        self.order.move_to_end(batch, last=False)


def test_dicts_of_subclasses_stay_what_they_are(tmp_path):
    trained(tmp_path, Tallying(), epochs=1)
    [again] = trained(tmp_path, Tallying(), epochs=2)
    kinds = [type(value) for value in (again.counts, again.losses, again.order)]
    assert kinds == [collections.Counter, collections.defaultdict, collections.OrderedDict]
    assert again.counts == {0: 2, 1: 2}
    assert again.shared is again.counts
    assert_resume_exact(functools.partial(recipe, lambda: [Tallying()]), 2)


class Nested(keras.callbacks.Callback):
    """Has a dict of a subclass where it cannot be filled again, and a number."""

    def __init__(self):
        super().__init__()
        self.counts = {"train": collections.Counter()}
        self.total = 0

    def on_train_batch_end(self, batch, logs=None):
        self.counts["train"][batch] += 1
        self.total += 1


def test_dicts_of_subclasses_within_others_are_not_saved(tmp_path):
    trained(tmp_path, Nested(), epochs=1)
    [again] = trained(tmp_path, Nested(), epochs=2)
    assert type(again.counts["train"]) is collections.Counter
    assert again.counts == {"train": {0: 1, 1: 1}}
    assert again.total == 4


class Arrays(keras.callbacks.Callback):
    """Has arrays to which one path leads."""

    def __init__(self):
        super().__init__()
        self.by_key = {1: np.zeros(2), "1": np.zeros(2), "2": np.float32(0)}
        self.by_path = {"a": {"b": np.zeros(2)}, "a/b": np.zeros(2)}

    def on_train_batch_end(self, batch, logs=None):
        self.by_key[1] = self.by_key[1] + 1
        self.by_key["1"] = self.by_key["1"] + 2
        self.by_path["a"]["b"] += 3
        self.by_path["a/b"] += logs["loss"]


def test_arrays_to_which_one_path_leads_are_all_saved(tmp_path):
    [first] = trained(tmp_path, Arrays(), epochs=1)
    [again] = trained(tmp_path, Arrays(), epochs=1)
    np.testing.assert_array_equal(again.by_key[1], [2, 2])
    np.testing.assert_array_equal(again.by_key["1"], [4, 4])
    np.testing.assert_array_equal(again.by_path["a"]["b"], [6, 6])
    np.testing.assert_array_equal(again.by_path["a/b"], first.by_path["a/b"])


class BigEndian(keras.callbacks.Callback):
    """Has arrays whose bytes are the other way round."""

    def __init__(self):
        super().__init__()
        self.small, self.whole = np.zeros(2, ">f4"), {"numbers": np.zeros((2, 2), ">i8")}

    def on_train_batch_end(self, batch, logs=None):
        self.small += 1
        self.whole["numbers"] += 10


def test_big_endian_arrays_keep_their_numbers(tmp_path):
    trained(tmp_path, BigEndian(), epochs=1)
    [again] = trained(tmp_path, BigEndian(), epochs=2)
    np.testing.assert_array_equal(again.small, [4, 4])
    np.testing.assert_array_equal(again.whole["numbers"], np.full((2, 2), 40))


class Growing(keras.callbacks.Callback):
    """Remembers more than can be read again, from the second step on."""

    def __init__(self, make):
        super().__init__()
        self.make, self.losses, self.texts = make, [], {"few": "x" * 1000}

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            self.losses = self.make()


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    callbacks = [Counter(1), Growing(lambda: ["\0" * 2**20] * 6)]
    built = recipe(lambda: callbacks, 1, log_dir=tmp_path, checkpoint=looplab.Checkpoint(every=1))
    with pytest.raises(ValueError, match=r"state\.json would have 37\d+ bytes, and at most 33554432 .* Keep fewer"):
        built.fit(verbose=0)
    whole = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith("step-")]
    assert whole == ["step-1-epoch-0"]
    small = recipe(lambda: [Counter(1), Growing(lambda: [1])], 1, log_dir=tmp_path)
    small.fit(verbose=0, resume=True)
    assert small.trainer.steps == 2
