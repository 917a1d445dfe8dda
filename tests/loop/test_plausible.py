"""Whether data, outputs and loss go together."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from looplab.loop.guard import Guard
from looplab.loop.plausible import Comparison, check_finite, expects_probabilities, raw_images, targets_of

SPARSE = keras.losses.SparseCategoricalCrossentropy(ignore_class=9)
CATEGORICAL = keras.losses.CategoricalCrossentropy()
SQUARES = keras.losses.MeanSquaredError()
LABELS, ONE_HOT, OUTPUTS = tf.zeros(4), tf.zeros((4, 3)), tf.zeros((4, 3))


@pytest.mark.parametrize(
    ("loss", "target", "match"),
    [
        (SPARSE, ONE_HOT, r"`y\['a'\]\[0\]` of shape \(4, 3\).* they look one-hot"),
        (CATEGORICAL, LABELS, "they look like labels"),
        (SQUARES, tf.zeros((4, 3, 2, 2)), "Give both one shape"),
    ],
)
def test_targets_of_another_kind_are_an_error(loss, target, match):
    with pytest.raises(ValueError, match=match):
        Comparison(loss, target, OUTPUTS, ("a", 0)).check()


def test_targets_of_the_right_kind_pass():
    for loss, target in (SPARSE, LABELS), (CATEGORICAL, ONE_HOT), (SQUARES, ONE_HOT), (SQUARES, tf.zeros((4, 3, 1))):
        Comparison(loss, target, OUTPUTS, ()).check()


def test_what_a_loss_takes_as_targets():
    losses = (SPARSE, CATEGORICAL, "binary_crossentropy", "kl_divergence", "mse", "crossentropy", None)
    assert [targets_of(loss) for loss in losses] == ["labels", "one-hot", "bits", "fractions", "errors", "", ""]


def test_targets_out_of_range_are_zero_and_reported():
    guard = Guard()
    labels = Comparison(SPARSE, LABELS, OUTPUTS, ())
    np.testing.assert_array_equal(labels.checked(guard, tf.constant([0.0, 2, 9])), [0, 2, 9])
    assert int(guard.fault()) == 0
    np.testing.assert_array_equal(labels.checked(guard, tf.constant([1, 3, 0.5, -1, np.nan])), [1, 0, 0, 0, 0])
    assert guard.message(int(guard.fault())) == "`y` must be whole numbers from 0 to 2, the classes of the outputs"
    soft = Comparison(CATEGORICAL, ONE_HOT, OUTPUTS, ())
    np.testing.assert_array_equal(
        soft.checked(guard, tf.constant([0.5, 1.000001, 1.1])), [0.5, np.float32(1.000001), 0]
    )
    any_numbers = tf.constant([-5.0, 7.0])
    assert Comparison(SQUARES, ONE_HOT, OUTPUTS, ()).checked(guard, any_numbers) is any_numbers


def test_arrays_are_searched_for_what_is_out_of_range():
    one = Comparison(keras.losses.SparseCategoricalCrossentropy(), LABELS, OUTPUTS, ("a",))
    one.check_array({"a": np.array([0, 2])}, "x")
    with pytest.raises(ValueError, match=r"`y\['a'\]` must be .*; got 3, at index 1 of `validation_data`; 2 in all"):
        one.check_array({"a": np.array([0, 3, 4])}, "validation_data")
    check_finite("x", {"a": np.array([1, 2]), "b": np.ones((9, 2))})
    with pytest.raises(ValueError, match="`x` must be finite numbers; got NaN or infinity, first at index 4100"):
        check_finite("x", np.where(np.arange(5000) == 4100, np.inf, 0.0))


def compared(loss, make, target=None):
    """What a loss compares, with outputs that are made in a graph."""
    found = []

    @tf.function
    def graph(x):
        output = make(x)
        found.append(Comparison(loss, tf.zeros(output.shape) if target is None else target, output, ("a",)))

    graph(tf.zeros((4, 3)))
    return found[0]


def test_doubts_about_outputs():
    def doubts(*args):
        return " ".join(compared(*args).check())

    dense = keras.layers.Dense(3)
    dense.build((None, 3))
    logits, probabilities = (keras.losses.BinaryCrossentropy(from_logits=is_logits) for is_logits in (True, False))
    assert "from_logits=True, but the model outputs probabilities (its last operation is Sigmoid)" in (
        doubts(logits, tf.sigmoid)
    )
    assert "the model outputs logits (its last operation is BiasAdd)" in doubts(probabilities, dense)
    bias = tf.Variable(tf.ones(3))
    assert "the model outputs logits (its last operation is AddV2)" in doubts(probabilities, lambda x: x + bias)
    assert doubts(logits, dense) == doubts(probabilities, tf.sigmoid) == ""
    assert doubts(probabilities, lambda x: tf.sigmoid(x) / 2 + tf.sigmoid(x) / 2) == ""
    assert doubts(SQUARES, lambda x: x) == ""
    assert "number by number; got `y['a']` of shape (4, 1), with outputs of shape (4, 3)" in (
        doubts(SQUARES, lambda x: x, tf.zeros((4, 1)))
    )
    cases = (logits, dense), (probabilities, dense), (logits, tf.sigmoid)
    assert [compared(*case).has_logits for case in cases] == [True, False, False]


def test_the_mean_error_of_probabilities_is_bounded():
    sums = keras.losses.MeanSquaredError(reduction="sum")
    cases = [(SQUARES, tf.sigmoid), (SQUARES, lambda x: x), (keras.losses.Poisson(), tf.sigmoid), (sums, tf.sigmoid)]
    assert [compared(loss, make).is_bounded for loss, make in cases] == [True, False, False, False]


def test_metrics_that_expect_probabilities():
    metrics = [
        (keras.metrics.BinaryAccuracy(), True),
        (keras.metrics.BinaryAccuracy(threshold=0.0), False),
        (keras.metrics.AUC(), True),
        (keras.metrics.AUC(from_logits=True), False),
        (keras.metrics.BinaryCrossentropy(from_logits=True), False),
        (keras.metrics.CategoricalCrossentropy(), True),
        (keras.metrics.CategoricalAccuracy(), False),
    ]
    assert [expects_probabilities(metric) for metric, _ in metrics] == [expected for _, expected in metrics]


def test_images_that_nothing_scales():
    images = np.full((2, 4, 4, 1), 200, np.uint8)
    flat = [keras.layers.Input((4, 4, 1)), keras.layers.Flatten()]
    plain, scaled = keras.Sequential(flat), keras.Sequential([*flat, keras.layers.Rescaling(1 / 255)])
    inputs = keras.Input((4, 4, 1))
    divided = keras.Model(inputs, keras.layers.Flatten()(inputs / 255))
    assert raw_images(images, plain)
    assert raw_images(images.astype("float32"), plain)
    assert not raw_images(images / 255, plain)
    assert not raw_images(images, scaled)
    assert not raw_images(images, divided)
    assert not raw_images(images, None)
