"""How many examples a batch has, and what each weighs."""

import numpy as np
import pytest
import tensorflow as tf

from looplab.loop.weights import ClassWeights, align, examples


def spec(*shape):
    return tf.TensorSpec(shape, tf.float32)


@pytest.mark.parametrize(
    ("batch", "signature", "expected"),
    [
        (tf.zeros((3, 2)), None, 3),
        ((tf.zeros((3, 2)), tf.zeros(4)), None, 4),  # that of y
        ({"table": tf.zeros((9, 9)), "x": tf.zeros((3, 2))}, {"table": spec(9, 9), "x": spec(None, 2)}, 3),
        ({"a": tf.zeros(3), "b": tf.zeros(3), "c": tf.zeros(9)}, None, 3),  # the most frequent
        ({"a": tf.zeros(3), "b": tf.zeros(9)}, None, None),
        (tf.constant(1.0), None, 1),
        (tf.RaggedTensor.from_row_lengths(tf.zeros(5), [2, 3]), tf.RaggedTensorSpec((None, None)), 2),
        (tf.sparse.from_dense(tf.ones((2, 3))), tf.SparseTensorSpec((None, 3)), 2),
    ],
)
def test_counts_examples(batch, signature, expected):
    found = examples(batch, signature=signature)
    assert (found if found is None else int(found)) == expected


def test_reports_parts_of_different_length():
    reports = []
    for lengths in (3, 3), (3, 4):
        batch = {str(i): tf.zeros(n) for i, n in enumerate(lengths)}
        signature = {str(i): spec(None) for i in range(2)}
        assert int(examples(batch, lambda *report: reports.append(report), signature)) == 3
    assert [wrong.numpy().tolist() for wrong, _ in reports] == [[False], [True]]
    assert "differ in their number of examples" in reports[0][1][0]


@pytest.mark.parametrize(
    ("given", "values", "expected"),
    [((4,), (4, 3), (4, 1)), ((4, 1), (4,), (4,)), ((4, 3), (4, 3), (4, 3)), ((4, 1), (4, 3), (4, 1)), ((), (4,), ())],
)
def test_aligns_weights_with_the_leading_dimensions(given, values, expected):
    assert align(tf.ones(given), tf.TensorShape(values), "y").shape == expected


@pytest.mark.parametrize(("given", "values"), [((3,), (4, 3)), ((4, 2), (4,)), ((4,), ())])
def test_weights_that_fit_nothing_are_an_error(given, values):
    with pytest.raises(ValueError, match=r"`sample_weight` of shape \(\d.* does not fit y, of shape"):
        align(tf.ones(given), tf.TensorShape(values), "y")


WEIGHTS = ClassWeights.of({7: 3.0, 1: 0.5})


@pytest.mark.parametrize(
    ("y", "kind", "expected"),
    [
        (np.array([1, 2, 7]), "labels", [0.5, 1, 3]),
        (np.array([[1], [7]], np.float32), "labels", [0.5, 3]),
        (np.array([[1, 7], [0, 2]]), "labels", [[0.5, 3], [1, 1]]),
        (np.eye(8, dtype=np.float32)[[7, 0, 1]], "one-hot", [3, 1, 0.5]),
        (np.array([0.0, 1.0], np.float32), "bits", [1, 0.5]),
    ],
)
def test_weighs_each_class(y, kind, expected):
    reports = []
    batch = tf.zeros(len(y)), tf.constant(y)
    _, _, weights = WEIGHTS.weigh(batch, kind, lambda wrong, _: reports.append(bool(wrong[0])))
    np.testing.assert_array_equal(weights, np.float32(expected))
    assert not any(reports)
    _, _, weights = WEIGHTS.weigh((*batch, 2 * tf.ones(len(y))), kind, lambda *_: None)
    np.testing.assert_array_equal(weights, 2 * np.float32(expected))


def test_several_classes_per_example_are_an_error():
    several = tf.zeros(2), tf.ones((2, 3))
    with pytest.raises(ValueError, match="`class_weight` needs one class for each example; y of shape"):
        WEIGHTS.weigh(several, "bits", lambda *_: None)
    reports = []
    WEIGHTS.weigh(several, "one-hot", lambda wrong, messages: reports.append((bool(wrong[0]), messages[0])))
    assert reports[0][0]
    assert "does not sum to 1" in reports[0][1]
    with pytest.raises(ValueError, match="needs y to be one tensor"):
        WEIGHTS.weigh((tf.zeros(2), {"a": tf.zeros(2)}), "", lambda *_: None)


def test_class_weights_are_a_dict_or_a_sequence():
    assert ClassWeights.of([2, 3]) == ClassWeights((0, 1), (2.0, 3.0))
    assert ClassWeights((1, 7), (0.5, 3.0)) == WEIGHTS
    assert ClassWeights.of(None) is ClassWeights.of({}) is None
    for wrong in {0.5: 1.0}, {True: 1.0}, {0: -1.0}, {0: np.nan}, {"a": 1.0}:
        with pytest.raises(ValueError, match="`class_weight` must"):
            ClassWeights.of(wrong)
