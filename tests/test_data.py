import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import looplab
from looplab.data import arrays, sharing
from looplab.data import batches as data

N = 10  # examples; in batches of 4 a pass over them has the sizes 4, 4, 2
ROWS = np.arange(N, dtype="float32")


def batches_of(x, *parts, name="x", **options):
    options = {"training_from": 0, **options}
    return data.from_arguments(name, x, *parts, **options, strategy=tf.distribute.get_strategy())


def taken(batches, epoch=0, epochs=1):
    """The batches of some epochs, as NumPy arrays."""
    found = itertools.islice(iter(batches.start(epoch)), batches.steps * epochs)
    return [tf.nest.map_structure(np.array, batch) for batch in found]


def order(seed, epoch, n=1000, batch_size=300):
    return np.concatenate(taken(batches_of(np.arange(n), batch_size=batch_size, shuffle=True, seed=seed), epoch))


def same(one, other):
    return len(one) == len(other) and all(
        np.array_equal(a, b) for a, b in zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True)
    )


# The order of arrays.


def test_order_is_a_function_of_seed_and_epoch_alone():
    expected = order(seed=3, epoch=2)
    tf.random.set_seed(99)
    keras.utils.set_random_seed(99)
    assert np.array_equal(order(seed=3, epoch=2), expected)
    assert np.array_equal(order(seed=3, epoch=2, batch_size=7), expected)
    images, labels = np.zeros((1000, 2, 2), "uint8"), np.arange(1000)
    pairs = taken(batches_of(images, labels, batch_size=300, shuffle=True, seed=3), epoch=2)
    assert np.array_equal(np.concatenate([y for _, y in pairs]), expected)


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (10, 4), (12, 4), (10, 100), (100, 1)])
def test_each_epoch_is_a_permutation(n, batch_size):
    batches = batches_of(np.arange(n), batch_size=batch_size, shuffle=True, seed=1)
    assert batches.steps == -(-n // batch_size)
    epochs = np.concatenate(taken(batches, epochs=3)).reshape(3, n)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (3, 1)))


def test_orders_of_neighbouring_epochs_and_seeds_are_uncorrelated():
    n = 60_000  # some ways to shuffle show a pattern in many examples alone
    orders = [np.arange(n), *(order(seed, epoch, n, batch_size=n) for seed in (0, 1) for epoch in (0, 1, 2))]
    for one, other in itertools.combinations(orders, 2):
        place = np.empty(n, int)
        place[other] = np.arange(n)
        apart = np.diff(place[one])  # in `other`, of two that follow each other in `one`
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
        assert abs(np.corrcoef(place[one], np.arange(n))[0, 1]) < 0.03
        assert np.sum(one == other) < 12
        assert np.bincount(apart + n).max() < 20


def test_without_shuffle_the_order_is_that_of_the_arrays():
    assert np.array_equal(np.concatenate(taken(batches_of(ROWS, batch_size=4), epoch=5)), ROWS)


def test_last_batch_of_each_pass_is_ragged():
    batches = batches_of(ROWS, batch_size=4, shuffle=True)
    assert [len(batch) for batch in taken(batches, epochs=2)] == [4, 4, 2, 4, 4, 2]
    assert batches.element_spec.shape.as_list() == [None]


def test_batch_size_is_32_unless_given():
    assert [len(batch) for batch in taken(batches_of(np.arange(70)))] == [32, 32, 6]


@pytest.mark.parametrize("steps", [None, 2, 7], ids=lambda steps: f"steps-{steps}")
def test_starting_at_an_epoch_continues_the_earlier_ones(steps):
    batches = batches_of(ROWS, batch_size=4, shuffle=True, seed=5, steps=steps)
    length = steps or 3
    assert batches.steps == length
    through = taken(batches, epochs=4)
    passes = taken(batches_of(ROWS, batch_size=4, shuffle=True, seed=5), epochs=10)
    assert same(through, passes[: 4 * length])
    for epoch in range(4):
        assert same(taken(batches, epoch), through[epoch * length : (epoch + 1) * length])


# The parts of a batch.


@pytest.mark.parametrize("container", [dict, tuple, list])
def test_inputs_keep_their_structure(container):
    first, second = ROWS, np.stack([ROWS, -ROWS], 1)
    x = {"a": first, "b": second} if container is dict else container([first, second])
    alone = taken(batches_of(x, batch_size=4, shuffle=True))
    with_targets = taken(batches_of(x, {"t": ROWS, "u": (ROWS, ROWS)}, ROWS, batch_size=4, shuffle=True))
    for batch, (inputs, targets, sample_weight) in zip(alone, with_targets, strict=True):
        inner = batch if container is dict else batch[0]
        assert type(inputs) is type(inner) is (dict if container is dict else tuple)
        a, b = inner.values() if container is dict else inner
        assert np.array_equal(b, np.stack([a, -a], 1))
        assert same(inputs, inner)
        for value in (targets["t"], *targets["u"], sample_weight):
            assert np.array_equal(value, a)


def test_parts_are_packed_as_keras_packs_them():
    assert isinstance(taken(batches_of(ROWS))[0], np.ndarray)
    assert [len(parts) for parts in (taken(batches_of(ROWS, ROWS))[0], taken(batches_of(ROWS, ROWS, ROWS))[0])] == [
        2,
        3,
    ]


@pytest.mark.parametrize("convert", [np.array, tf.constant])
def test_floating_numbers_become_floatx_and_nothing_else_changes(convert):
    dtypes = ["float16", "float32", "float64", "uint8", "int32", "int64", "bool"]
    batch = taken(batches_of({dtype: convert(np.array([0, 1, 1]).astype(dtype)) for dtype in dtypes}))[0]
    for given, array in batch.items():
        assert array.dtype == ("float32" if given.startswith("float") else given)
        assert np.array_equal(array, [0, 1, 1])


def test_floatx_is_the_one_that_keras_is_set_to():
    keras.config.set_floatx("float64")
    try:
        assert taken(batches_of(ROWS))[0].dtype == "float64"
    finally:
        keras.config.set_floatx("float32")


def test_numbers_in_lists_are_arrays():
    x, y = taken(batches_of([[1.0, 2.0], [3.0, 4.0]], [0, 1]))[0]
    assert x.dtype == "float32"
    assert np.array_equal(x, [[1, 2], [3, 4]])
    assert np.array_equal(y, [0, 1])


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8"])
def test_same_array_as_x_and_y(dtype):
    array = np.arange(N, dtype=dtype)
    pairs = taken(batches_of(array, array, batch_size=4, shuffle=True))
    assert all(np.array_equal(x, y) for x, y in pairs)
    assert sorted(np.concatenate([x for x, _ in pairs])) == list(range(N))


def test_ragged_tensors_are_cut_into_batches():
    ragged = tf.ragged.constant([[1], [2, 3], [4, 5, 6], [], [7]])
    batches = batches_of(ragged, batch_size=2)
    found = itertools.islice(batches.start(0), 3)
    assert [batch.to_list() for batch in found] == [[[1], [2, 3]], [[4, 5, 6], []], [[7]]]


# The validation split.


@pytest.mark.parametrize(("fraction", "cut"), [(0.1, 9), (0.25, 7), (1 / 3, 6)])
def test_split_takes_the_last_part(fraction, cut):
    (x, y), (x_validation, y_validation) = arrays.split(({"a": ROWS}, ROWS), fraction)
    assert x["a"].tolist() == y.tolist() == ROWS[:cut].tolist()
    assert x_validation["a"].tolist() == y_validation.tolist() == ROWS[cut:].tolist()


@pytest.mark.parametrize("fraction", [0.99, 1.5, -0.5])
def test_split_must_leave_both_parts_an_example(fraction):
    with pytest.raises(ValueError, match=rf"`validation_split={fraction}` of 10 examples leaves"):
        arrays.split(ROWS, fraction)


def test_validation_split_measures_what_keras_measures(line):
    x, y = line

    def model():
        return keras.Sequential([keras.layers.Dense(1, kernel_initializer="ones")])

    theirs = model()
    theirs.compile("sgd", "mse")
    arguments = {"validation_split": 0.23, "batch_size": 16, "shuffle": False, "verbose": 0}
    expected = theirs.fit(x, y, **arguments).history
    history = looplab.Trainer(model(), optimizer="sgd", loss="mse").fit(x, y, **arguments).history
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert history["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


def test_validation_split_of_a_dataset_names_the_split():
    trainer = looplab.Trainer(keras.Sequential([keras.layers.Dense(1)]), optimizer="sgd", loss="mse")
    with pytest.raises((TypeError, ValueError), match="`validation_split"):
        trainer.fit(tf.data.Dataset.from_tensors((np.ones((4, 1)), np.ones((4, 1)))), validation_split=0.5)


# Datasets, and functions of the epoch.


def numbers(start=0):
    """Five batches of two."""
    return tf.data.Dataset.range(start, start + 10).batch(2)


def test_dataset_is_one_epoch():
    batches = batches_of(numbers())
    assert (batches.steps, batches.continues) == (5, False)
    assert np.array_equal(taken(batches, epoch=3), np.arange(10).reshape(5, 2))


def test_dataset_of_unknown_length_ends_by_itself():
    batches = batches_of(numbers().filter(lambda batch: batch[0] != 4))
    assert batches.steps is None
    assert [batch[0] for batch in batches.start(0).as_numpy_iterator()] == [0, 2, 6, 8]


@pytest.mark.parametrize(("steps", "endless"), [(2, False), (7, False), (3, True)])
def test_dataset_with_steps_continues_where_it_stopped(steps, endless):
    batches = batches_of(numbers().repeat() if endless else numbers(), steps=steps)
    assert (batches.steps, batches.continues) == (steps, True)
    assert [batch[0] for batch in taken(batches, epochs=3)] == [2 * (step % 5) for step in range(3 * steps)]


def test_dataset_with_steps_starts_at_any_epoch():
    batches = batches_of(numbers(), steps=3)
    assert same(taken(batches, epoch=1), taken(batches, epochs=2)[3:])


def test_function_is_called_with_the_epoch():
    batches = batches_of(lambda epoch: numbers(100 * epoch))
    assert batches.steps is None  # epochs may differ in length
    for epoch in (0, 1, 7):
        assert np.array_equal(np.ravel(list(batches.start(epoch).as_numpy_iterator())), 100 * epoch + np.arange(10))


@pytest.mark.parametrize("steps", [2, 7])
def test_function_with_steps_starts_each_epoch_again(steps):
    batches = batches_of(lambda epoch: numbers(100 * epoch), steps=steps)
    firsts = [batch[0] for batch in taken(batches, epoch=2)]
    assert firsts == [200 + 2 * (step % 5) for step in range(steps)]


@pytest.mark.parametrize("x", [np.arange(10), numbers(), lambda epoch: numbers()], ids=["arrays", "set", "function"])
def test_an_evaluation_ends_where_its_data_ends(x):
    batches = batches_of(x, batch_size=2 if isinstance(x, np.ndarray) else None, steps=7, training_from=None)
    assert np.concatenate(taken(batches)).tolist() == list(range(10))


def test_function_whose_epochs_differ_in_length_is_trained_on_whole(line):
    whole = tf.data.Dataset.from_tensor_slices(line).batch(10)
    trainer = looplab.Trainer(keras.Sequential([keras.layers.Dense(1)]), optimizer="sgd", loss="mse")
    trainer.fit(lambda epoch: whole.take(epoch + 1), epochs=3, verbose=0)
    assert trainer.steps == 1 + 2 + 3


@pytest.mark.parametrize("steps", [1, "auto"])
def test_a_dataset_without_injected_prefetch_is_not_read_ahead(steps):
    """So data may depend on the weights: each batch is made after the update before."""
    model = keras.Sequential([keras.layers.Dense(1)])
    trainer = looplab.Trainer(model, optimizer="sgd", loss="mse", steps_per_execution=steps)
    updates = []

    def make():
        while True:
            updates.append(int(trainer.optimizer.iterations))
            yield np.ones((4, 2), "float32"), np.ones((4, 1), "float32")

    options = tf.data.Options()
    options.experimental_optimization.inject_prefetch = False
    data = tf.data.Dataset.from_generator(make, output_signature=(tf.TensorSpec((None, 2)), tf.TensorSpec((None, 1))))
    trainer.fit(data.with_options(options), steps_per_epoch=50, epochs=2, verbose=0)
    assert updates == list(range(100))


# Errors: each names the argument, the value and the fix.

FOURS = tf.data.Dataset.from_tensors((1, 2, 3, 4))
ERRORS = {
    "set": (["`x`", "a dataset, a generator", "got set"], lambda: batches_of({1, 2})),
    "range": (["`validation_data`", "got range"], lambda: batches_of(range(3), name="validation_data")),
    "map as y": (["`y`", "dict or tuple of arrays; got map"], lambda: batches_of(ROWS, map(int, ROWS))),
    "generator in a dict": (["`x['b']`", "got generator"], lambda: batches_of({"a": ROWS, "b": (i for i in ROWS)})),
    "number": (["`x`", "got float"], lambda: batches_of(3.0)),
    "array of one number": (["`x`", "first dimension", "single number"], lambda: batches_of(np.float32(3))),
    "objects": (["`x`", "got an array of objects", "shape"], lambda: batches_of(np.array([1, None]))),
    "objects in a dict": (
        ["`y['t']`", "got an array of objects"],
        lambda: batches_of(ROWS, {"t": np.array([1, "a"], object)}),
    ),
    "ragged list": (["`x`", "shape"], lambda: batches_of([[1.0], [2.0, 3.0]])),
    "none": (["`x`", "None"], lambda: batches_of(None)),
    "none with y": (["`x`", "None"], lambda: batches_of(None, ROWS)),
    "y is shorter": (["`x` has 10", "`y` has 3"], lambda: batches_of(ROWS, ROWS[:3])),
    "sample_weight is shorter": (["`x` has 10", "`sample_weight` has 9"], lambda: batches_of(ROWS, ROWS, ROWS[:9])),
    "lengths in a dict": (["`x` has 3 and 10"], lambda: batches_of({"a": ROWS, "b": ROWS[:3]})),
    "validation is shorter": (
        ["`validation_data` has 2", "`y` has 1"],
        lambda: batches_of(ROWS[:2], ROWS[:1], name="validation_data"),
    ),
    "empty": (["`x` is empty", "0 examples"], lambda: batches_of(ROWS[:0])),
    "empty in a dict": (["`x` is empty", "0 examples"], lambda: batches_of({"a": ROWS[:0]}, ROWS[:0])),
    "empty list": (["`x`", "empty"], lambda: batches_of([])),
    "empty dict": (["`x`", "empty"], lambda: batches_of({})),
    "empty dataset": (["`x` is an empty dataset"], lambda: batches_of(numbers().take(0))),
    "empty dataset of a function": (["`x` is an empty dataset"], lambda: batches_of(lambda _: numbers().take(0))),
}


@pytest.mark.parametrize(("needles", "call"), ERRORS.values(), ids=ERRORS)
def test_invalid_data_is_an_error_that_says_what_to_do(needles, call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert [needle for needle in needles if needle not in str(caught.value)] == []


@pytest.mark.parametrize(("x", "kind"), [(numbers(), "_BatchDataset"), (lambda epoch: numbers(), "function")])
@pytest.mark.parametrize(
    "other", [{"y": ROWS}, {"sample_weight": ROWS}, {"batch_size": 2}], ids=lambda o: next(iter(o))
)
def test_nothing_else_is_passed_with_a_dataset(x, kind, other):
    with pytest.raises(ValueError, match=f"`{next(iter(other))}` must not be given if `x` yields.*{kind}.*be batches"):
        batches_of(x, **other)


@pytest.mark.parametrize(("name", "argument"), [("x", "steps_per_epoch"), ("validation_data", "validation_steps")])
@pytest.mark.parametrize(
    "wrap", [lambda dataset: dataset, lambda dataset: lambda epoch: dataset], ids=["set", "function"]
)
def test_endless_dataset_needs_steps(name, argument, wrap):
    with pytest.raises(ValueError, match=f"`{name}` is an endless dataset: pass as `{argument}`"):
        batches_of(wrap(numbers().repeat()), name=name)
    assert batches_of(wrap(numbers().repeat()), name=name, steps=4).steps == 4


@pytest.mark.parametrize("value", [None, [1, 2]], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("epoch", [0, 1])
def test_function_must_return_a_dataset_for_each_epoch(value, epoch):
    with pytest.raises(
        TypeError, match=rf"`x` is a function .*`tf.data.Dataset`; for epoch {epoch} .*{type(value).__name__}"
    ):
        batches_of(lambda number: value if number == epoch else numbers()).start(epoch)


def test_a_change_of_the_structure_alone_is_described():
    spec = tf.TensorSpec((None, 4))
    assert arrays.changes((spec,), spec) == f"a batch was {(spec,)}, and is {spec}"


def test_workers_divide_by_file_only_what_has_the_same_rows_then(tmp_path):
    for index in range(3):
        with tf.io.TFRecordWriter(str(tmp_path / str(index))) as writer:
            writer.write(b"1")
    listed = tf.data.Dataset.list_files(f"{tmp_path}/*", seed=1).interleave(tf.data.TFRecordDataset, cycle_length=2)
    rows = tf.data.TFRecordDataset([str(tmp_path / str(index)) for index in range(3)]).map(tf.strings.to_number)
    by_file = [rows.batch(2), listed.shuffle(5, seed=1).batch(2).prefetch(1), rows.cache().batch(2).map(lambda x: x)]
    by_row = [rows.take(2).batch(2), rows.skip(1).batch(2), rows.batch(2).repeat(), rows.batch(2, drop_remainder=True)]
    by_row += [rows.concatenate(rows).batch(2), tf.data.Dataset.range(9).batch(2)]
    assert [sharing.is_by_row(dataset, 3, ordered=False) for dataset in by_file] == [False] * 3
    assert [sharing.is_by_row(dataset, 3, ordered=False) for dataset in by_row] == [True] * 6
    assert all(sharing.is_by_row(dataset, 4, ordered=False) for dataset in by_file)  # too few files
    assert all(sharing.is_by_row(dataset, 3, ordered=True) for dataset in by_file)
