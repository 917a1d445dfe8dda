"""Data of all kinds that Keras takes: the numbers are Keras's, and a resumed run continues exactly or says so."""

import collections
import contextlib
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import looplab

X, Y = (np.random.default_rng(0).normal(size=(40, size)).astype("float32") for size in (4, 1))
SPARSE = X * (X > 0)


class Slices(keras.utils.PyDataset):
    """Batches of 8 rows; `read` lists the numbers of those that were read."""

    def __init__(self, num_batches=5, **options):
        super().__init__(**options)
        self.size = num_batches
        self.read = []

    @property
    def num_batches(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(index)
        return batch(index)


class Recording(Slices):
    def on_epoch_begin(self):
        self.read.append("begin")

    def on_epoch_end(self):
        self.read.append("end")


def batch(index):
    first = 8 * (index % 5)
    return X[first : first + 8], Y[first : first + 8]


def batches(size=None):
    """A generator."""
    return (batch(index) for index in (range(size) if size else itertools.count()))


def model(sparse=False):
    keras.utils.set_random_seed(0)
    made = keras.Sequential([keras.Input((4,), sparse=sparse), layers.Dense(3, "tanh"), layers.Dense(1)])
    made.compile("adam", "mse", metrics=["mae"])
    return made


def assert_as_keras(make_data, make_model=model, ends=False, **options):
    """Compares fit, evaluate and predict of data, which is created anew for each of them."""
    options = {"shuffle": False, "epochs": 2, "verbose": 0, **options}
    ours, theirs = looplab.Trainer(make_model()), make_model()
    with pytest.warns(UserWarning, match="ran out of data") if ends else contextlib.nullcontext():
        expected = theirs.fit(**make_data(), **options).history
        expected_values = theirs.evaluate(**make_data(), verbose=0, return_dict=True)
        predicted = theirs.predict(make_data()["x"], verbose=0)
    history = ours.fit(**make_data(), **options).history
    assert history.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(history[name], expected[name], rtol=1e-6)
    values = ours.evaluate(**make_data(), verbose=0)
    assert values == pytest.approx({name: expected_values[name] for name in values}, rel=1e-6)
    np.testing.assert_allclose(ours.predict(make_data()["x"], verbose=0), predicted, rtol=1e-5)


@pytest.mark.parametrize("workers", [1, 2])
def test_py_dataset(workers):
    assert_as_keras(lambda: {"x": Slices(workers=workers)}, validation_data=Slices(3, workers=workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_endless_py_dataset_continues_in_the_next_epoch(workers):
    data = Slices(None, workers=workers)
    options = {"steps_per_epoch": 3, "epochs": 3, "shuffle": False, "verbose": 0}
    history = looplab.Trainer(model()).fit(data, **options).history
    expected = model().fit(Slices(None), **options).history
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-6)
    assert sorted(data.read[2:]) == list(range(9))  # the first two show the signature


@pytest.mark.parametrize(
    "make_data",
    [
        lambda: {"x": X, "y": Y, "batch_size": 8},
        lambda: {"x": tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)},
        lambda: {"x": Slices()},
        lambda: {"x": Slices(None)},
    ],
    ids=["arrays", "dataset", "PyDataset", "endless PyDataset"],
)
def test_each_fit_starts_at_the_first_batch_as_in_keras(make_data):
    ours, theirs = looplab.Trainer(model()), model()
    for _ in range(2):
        history, expected = (
            one.fit(**make_data(), steps_per_epoch=2, shuffle=False, verbose=0).history for one in (ours, theirs)
        )
        np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-6)


def test_hooks_of_a_py_dataset_are_called_as_by_keras():
    pairs = [(Recording(2), Recording(2)) for _ in range(2)]
    for trainer, (data, validation) in zip((looplab.Trainer(model()), model()), pairs, strict=True):
        trainer.fit(data, validation_data=validation, epochs=2, shuffle=False, verbose=0)
    assert [data.read for data in pairs[0]] == [data.read for data in pairs[1]]


def test_shuffled_py_dataset_reads_each_batch_once_in_an_order_of_its_own():
    one, same, other = Slices(), Slices(), Slices()
    for data, seed in ((one, 1), (same, 1), (other, 2)):
        looplab.Trainer(model(), seed=seed).fit(data, epochs=2, verbose=0)
    assert one.read == same.read != other.read
    assert sorted(one.read[2:7]) == sorted(one.read[7:]) == list(range(5))
    assert one.read[2:7] != one.read[7:]


def test_generator():
    assert_as_keras(lambda: {"x": batches(7)}, epochs=1, ends=True)


def test_generator_continues_through_epochs_and_validations():
    options = {"epochs": 3, "steps_per_epoch": 4, "verbose": 0}
    history = looplab.Trainer(model()).fit(batches(), **options, validation_data=batches(), validation_steps=2).history
    expected = model().fit(batches(), **options).history
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-6)
    assert len(set(history["val_loss"])) == 3


def test_generator_without_validation_steps_is_validated_as_a_whole_each_time():
    values = [
        looplab.Trainer(model()).fit(X, Y, epochs=2, shuffle=False, validation_data=data, verbose=0).history["val_loss"]
        for data in (batches(3), (X[:24], Y[:24]))
    ]
    np.testing.assert_allclose(*values, rtol=1e-6)


@pytest.mark.parametrize(("size", "steps", "epochs"), [(7, None, 1), (8, 4, 2), (6, 4, 2)])
@pytest.mark.filterwarnings("ignore:The data ended after")
def test_training_ends_with_its_generator(size, steps, epochs):
    trainer = looplab.Trainer(model())
    with pytest.warns(UserWarning, match=f"`x` has ended .* after epoch {epochs} of 5"):
        trainer.fit(batches(size), epochs=5, steps_per_epoch=steps, verbose=0)
    assert (trainer.steps, trainer.epochs) == (size, epochs)


@pytest.mark.parametrize("kind", ["scipy", "tensorflow"])
def test_sparse_arrays(kind):
    sparse = pytest.importorskip("scipy.sparse").coo_matrix if kind == "scipy" else tf.sparse.from_dense
    assert_as_keras(lambda: {"x": sparse(SPARSE), "y": Y}, lambda: model(sparse=True), batch_size=8)


def test_sparse_arrays_are_shuffled_and_split_as_dense_ones():
    arrays = (SPARSE, model()), (tf.sparse.from_dense(SPARSE), model(sparse=True))
    options = {"batch_size": 7, "epochs": 2, "validation_split": 0.25, "verbose": 0}
    dense, sparse = (looplab.Trainer(made, seed=0).fit(x, Y, **options).history for x, made in arrays)
    for name, values in dense.items():
        np.testing.assert_allclose(sparse[name], values, rtol=1e-5)


def test_sparse_batches_of_a_generator():
    make = lambda: {"x": ((tf.sparse.from_dense(x), y) for x, y in batches(4))}  # noqa: E731
    assert_as_keras(make, lambda: model(sparse=True), epochs=1, ends=True)


def test_sparse_array_of_rank_3_without_values_in_some_rows():
    dense = np.zeros((10, 2, 3), "float32")
    dense[[1, 1, 7], [0, 1, 1], [2, 0, 1]] = [1, 2, 3]
    trainer = looplab.Trainer(lambda x: tf.sparse.to_dense(x))
    np.testing.assert_array_equal(trainer.predict(tf.sparse.from_dense(dense), batch_size=4, verbose=0), dense)


def test_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X.astype("float64"), columns=list("abcd"))
    frame["b"] = (10 * frame["b"]).astype(int)
    targets, weights = pandas.Series(Y[:, 0]), pandas.Series(np.linspace(0.5, 1.5, len(X)))
    assert_as_keras(lambda: {"x": frame, "y": targets, "sample_weight": weights})
    assert_as_keras(lambda: {"x": frame, "y": targets}, validation_split=0.25)


def test_pandas_strings():
    frame = pytest.importorskip("pandas").DataFrame({"name": ["a", "bb", "c"], "size": [1.0, 2.0, 3.0]})
    trainer = looplab.Trainer(lambda x: tf.strings.length(x["name"]) + tf.cast(x["size"], tf.int32))
    np.testing.assert_array_equal(trainer.predict(dict(frame), verbose=0), [[2], [4], [4]])


def test_strings_of_numpy_from_a_generator():
    trainer = looplab.Trainer(lambda x: tf.strings.length(x))
    batches_of_words = (np.array(words) for words in (["a", "bb"], ["ccc", "d"], ["ee"]))
    np.testing.assert_array_equal(trainer.predict(batches_of_words, verbose=0), [1, 2, 3, 1, 2])


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize("wrap", [lambda x: {"x": x, "y": Y}, lambda x: {"x": iter([(x, Y)])}], ids=["x", "batch"])
def test_none_and_nested_structures_in_x(wrap):
    def call(x):
        assert x["none"] is None
        assert type(x["pair"]) is Pair
        return tf.reduce_sum(x["list"][0] + x["pair"].second["inner"], 1, keepdims=True)

    x = {"list": [X, [X]], "none": None, "pair": Pair(X, {"inner": X})}
    trainer = looplab.Trainer(call, loss="mse")
    assert trainer.evaluate(**wrap(x), verbose=0)["loss"] == pytest.approx(np.mean((2 * X.sum(1)[:, None] - Y) ** 2))


def test_torch_data_loader(tmp_path):
    data = pytest.importorskip("torch.utils.data")
    rows = [*zip(X, Y, strict=True)]
    assert_as_keras(lambda: {"x": data.DataLoader(rows, batch_size=8)})
    dicts = data.DataLoader([{"rows": row} for row in X], batch_size=8)
    np.testing.assert_array_equal(looplab.Trainer(lambda x: x["rows"]).predict(dicts, verbose=0), X)
    with pytest.warns(UserWarning, match=r"order that no checkpoint can hold \(RandomSampler\)"):
        looplab.Trainer(model(), log_dir=tmp_path).fit(data.DataLoader(rows, 8, shuffle=True), verbose=0)


def test_class_weight_with_a_generator():
    options = {"class_weight": {0: 1.0, 1: 3.0}, "shuffle": False, "verbose": 0}
    labels = (Y > 0).astype("float32")
    history = looplab.Trainer(model()).fit(X, labels, batch_size=8, **options).history
    data = ((x, (y > 0).astype("float32")) for x, y in batches(5))
    assert looplab.Trainer(model()).fit(data, **options).history == history


def test_distributed_dataset():
    trainer, data = looplab.Trainer(model()), tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    history = trainer.fit(trainer.strategy.experimental_distribute_dataset(data), epochs=2, verbose=0).history
    assert history == looplab.Trainer(model()).fit(data, epochs=2, verbose=0).history


# Resuming


@pytest.mark.parametrize("kind", ["py_dataset", "workers", "sparse"])
def test_data_in_an_order_of_the_seed_resumes_exactly(kind):
    def build(**options):
        data = (tf.sparse.from_dense(SPARSE), Y) if kind == "sparse" else Slices(workers=1 + (kind == "workers"))
        trainer = looplab.Trainer(model(kind == "sparse"), **options)
        return looplab.Recipe(trainer, data, epochs=2, batch_size=16 if kind == "sparse" else None)

    looplab.testing.assert_resume_exact(build, steps=5)


@pytest.mark.parametrize(
    ("make_data", "reason"),
    [
        (batches, r"`x` is an iterator \(generator\), whose position"),
        (lambda: Recording(), "`x` has its own `on_epoch_begin` and `on_epoch_end`"),
    ],
    ids=["generator", "hooks"],
)
def test_data_that_no_checkpoint_can_hold_is_reported_and_continues_where_it_stopped(make_data, reason, tmp_path):
    """The generator of the resumed run yields the same batches again, so that all numbers are the same."""
    options = {"steps_per_epoch": 5, "shuffle": False, "verbose": 0}
    whole = looplab.Trainer(model()).fit(make_data(), epochs=3, **options)
    for epochs in (2, 3):
        trainer = looplab.Trainer(model(), log_dir=tmp_path / "run")
        with pytest.warns(UserWarning, match=reason) as caught:
            history = trainer.fit(make_data(), epochs=epochs, **options, resume=epochs == 3)
        assert len([warning for warning in caught if "a resumed training skips" in str(warning.message)]) == 1
    assert history.history == whole.history


@pytest.mark.filterwarnings("ignore:`x` is an iterator")
def test_generator_of_a_second_fit_is_not_skipped(tmp_path):
    """Its position counts from the start of the call of `fit`, also if a resumed program skips the first one."""

    def program(epochs, **options):
        trainer = looplab.Trainer(model(), log_dir=tmp_path if options else None)
        trainer.fit(batches(), epochs=2, steps_per_epoch=2, **options, verbose=0)
        return trainer.fit(batches(), epochs=epochs, steps_per_epoch=2, **options, verbose=0).history["loss"]

    assert program(1, resume=True) + program(2, resume=True) == program(1) + program(2)


# Errors


def failing():
    yield from (batch(0), batch(1))
    raise KeyError("mine")


class Failing(Slices):
    def __getitem__(self, index):
        return {}["mine"] if index == 3 else batch(index)


class Varying(Slices):
    def __getitem__(self, index):
        x, y = batch(index)
        return (x[:, :3] if index == 3 else x), y


def labels_then_fractions():
    yield from ((X[:8], np.ones((8, 1), int)) for _ in range(3))
    yield batch(0)


ERRORS = {
    "y with a generator": ({"x": batches(3), "y": Y}, "`y` must not be given if `x` yields batches.*a generator"),
    "empty generator": ({"x": iter(())}, "`x` must yield at least one batch; this tuple_iterator yields none"),
    "a number as y": ({"x": iter([(X, 1)])}, r"`x: batch\[1\]` must be an array, .*; got int"),
    "generator function": ({"x": failing}, "`x` is a generator function: pass the generator that it returns"),
    "empty PyDataset": ({"x": Slices(0)}, "`x` must have at least one batch; this Slices has none"),
    "endless PyDataset": ({"x": Slices(None)}, "without end, Slices: pass as `steps_per_epoch`"),
    "generator fails": ({"x": failing()}, "mine"),
    "PyDataset fails": ({"x": Failing()}, "mine"),
    "workers fail": ({"x": Failing(workers=2)}, "mine"),
    "another structure": (
        {"x": iter([batch(0), batch(1), (*batch(2), Y[:8, 0])])},
        r"All batches of `x` must be like the first two, .*'\(None, 1\) float32'\); got .*'\(8,\) float32'\)",
    ),
    "another shape": (
        {"x": iter([batch(0), batch(1), (X[:8, :3], Y[:8])])},
        r"All batches of `x` must be like the first two, .*; got \('\(8, 3\) float32', '\(8, 1\) float32'\)",
    ),
    "fractions after integers": (
        {"x": labels_then_fractions()},
        r"All batches of `x` must be like the first two, .*'\(None, 1\) int64'\); got .*'\(8, 1\) float32'",
    ),
    "PyDataset varies": (
        {"x": Varying()},
        r"All batches of `x` must be like the first two, .*; got \('\(8, 3\) float32'",
    ),
    "dates": ({"x": X.astype("datetime64[s]"), "y": Y}, r"`x` must hold numbers or strings; got .* datetime64\[s\]"),
}


@pytest.mark.parametrize(("arguments", "text"), ERRORS.values(), ids=ERRORS)
def test_an_error_names_the_argument_or_is_that_of_the_data(arguments, text):
    with pytest.raises((TypeError, ValueError, KeyError), match=text):
        looplab.Trainer(model()).fit(**arguments, verbose=0)


def test_sparse_batches_that_may_leave_a_replica_without_rows_are_an_error(two_devices):
    """With one size, they train as on one device."""
    sparse = tf.sparse.from_dense(SPARSE)
    data = tf.data.Dataset.from_tensor_slices((sparse, Y))
    found = []
    for scope in (two_devices.scope(), contextlib.nullcontext()):
        with scope:
            trainer = looplab.Trainer(model(sparse=True), optimizer="sgd", loss="mse", seed=0)
        for arguments in ((sparse, Y), (data.batch(8),)) if not found else ():
            with pytest.raises(ValueError, match=r"`x` has sparse batches, .* fewer rows than the 2 replicas"):
                trainer.fit(*arguments, verbose=0)
        found.append(trainer.fit(data.batch(8, drop_remainder=True), verbose=0).history["loss"])
    np.testing.assert_allclose(*found, rtol=1e-5)
