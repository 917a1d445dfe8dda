"""The reports of classifiers, against numbers computed by hand, and their pictures."""

import importlib.util
import json
import warnings

import numpy as np
import pytest
import tensorflow as tf

from looplab.cli import report
from looplab.cli.files import write_json

REASON = "needs the extra `report`: pip install 'looplab[report]'"
matplotlib = pytest.importorskip("matplotlib", reason=REASON)
pytest.importorskip("sklearn", reason=REASON)

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
LABELS = [0, 0, 1, 1, 2, 2]
PROBABILITIES = [[0.8, 0.1, 0.1], [0.4, 0.5, 0.1], [0.2, 0.7, 0.1], [0.3, 0.6, 0.1], [0.1, 0.2, 0.7], [0.5, 0.2, 0.3]]
MARKUP = r"$\cat$"  # matplotlib would read it as a formula, and fail
CURVES = {"loss": [3.0, 2.0, 1.0], "val_loss": [3.5, 2.5, 2.0], "accuracy": [0.1, 0.5, 0.6]}


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def guesses(n, classes=10):
    """Labels, and probabilities that are mostly right."""
    random = np.random.default_rng(1)
    labels = random.integers(0, classes, n)
    scores = random.random((n, classes)) + 0.4 * np.eye(classes)[labels]
    return labels, scores / scores.sum(axis=1, keepdims=True)


def auc(positives, negatives):
    """How often a positive scores above a negative: what the area under the ROC curve is."""
    difference = np.subtract.outer(positives, negatives)
    return np.mean((difference > 0) + 0.5 * (difference == 0))


def macro_auc(labels, scores):
    """Its mean over the classes that occur."""
    return np.mean([auc(scores[labels == c, c], scores[labels != c, c]) for c in np.unique(labels)])


def test_figures_computed_by_hand():
    result = report.classification(LABELS, PROBABILITIES, ["ant", "bee", "cat"])
    assert result.confusion.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 1]]
    assert np.issubdtype(result.confusion.dtype, np.integer)
    figures = result.figures
    assert figures["accuracy"] == pytest.approx(4 / 6)
    assert figures["per_class"]["bee"] == pytest.approx(
        {"precision": 2 / 3, "recall": 1, "f1-score": 0.8, "support": 2}
    )
    assert figures["macro avg"]["precision"] == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    assert figures["weighted avg"]["recall"] == pytest.approx(4 / 6)
    assert figures["roc_auc_macro"] == pytest.approx(
        {"probabilities": (7 / 8 + 1 + 1) / 3, "hard_predictions": (5 / 8 + 7 / 8 + 6 / 8) / 3}
    )
    assert figures["classes"] == ["ant", "bee", "cat"]
    assert figures["confusion_matrix"] == result.confusion.tolist()


def test_text():
    text = report.classification(LABELS, PROBABILITIES, ["ant", "bumblebee", "cat"]).text
    _, lines = text.split("\n\nmacro ROC AUC", 1)
    assert "weighted avg       0.72      0.67      0.66         6" in text
    assert lines.splitlines() == [
        ", from probabilities: 0.9583",
        "macro ROC AUC, from hard predictions: 0.7500",
        "",
        "confusion matrix (rows: true, columns: predicted)",
        "           ant  bumblebee  cat",
        "      ant    1          1    0",
        "bumblebee    0          2    0",
        "      cat    1          0    1",
    ]


def test_auc_of_hard_predictions_is_the_mean_of_recall_and_specificity():
    result = report.classification(*guesses(500), NAMES)
    hits, true, predicted = np.diag(result.confusion), result.confusion.sum(axis=1), result.confusion.sum(axis=0)
    specificity = 1 - (predicted - hits) / (500 - true)
    auc_macro = result.figures["roc_auc_macro"]
    assert auc_macro["hard_predictions"] == pytest.approx(np.mean(hits / true + specificity) / 2)
    assert auc_macro["probabilities"] == pytest.approx(macro_auc(*guesses(500)))


@pytest.mark.parametrize("dtype", [tf.bfloat16.as_numpy_dtype, np.float16, np.float32])
def test_probabilities_that_are_rounded(dtype):
    labels, probabilities = guesses(200)
    rounded = probabilities.astype(dtype)
    exact = rounded.astype(np.float64)
    assert (exact.sum(axis=1) != 1).any()
    result = report.classification(labels.astype(np.uint8), tf.constant(rounded), NAMES)
    assert result.figures["roc_auc_macro"]["probabilities"] == pytest.approx(macro_auc(labels, exact))
    assert result.figures["accuracy"] == np.mean(exact.argmax(axis=1) == labels)


def test_classes_that_do_not_occur():
    labels, probabilities = guesses(300)
    kept = np.isin(labels, [2, 5, 6])
    labels, probabilities = labels[kept], probabilities[kept]
    result = report.classification(labels, probabilities, NAMES)
    assert result.confusion.shape == (10, 10)
    assert result.figures["per_class"]["ship"] == {"precision": 0, "recall": 0, "f1-score": 0, "support": 0}
    assert result.figures["per_class"]["dog"]["support"] == sum(labels == 5)
    assert result.figures["roc_auc_macro"]["probabilities"] == pytest.approx(macro_auc(labels, probabilities))
    assert "(over 3 of 10 classes: others are absent)" in result.text


@pytest.mark.parametrize("predicted", [3, 4])
def test_one_single_class(predicted):
    result = report.classification([3, 3], np.eye(10)[[predicted, predicted]], NAMES)
    assert result.figures["roc_auc_macro"] == {"probabilities": None, "hard_predictions": None}
    assert result.text.count("undefined (over 1 of 10 classes: others are absent)") == 2
    assert result.figures["accuracy"] == (predicted == 3)
    assert result.confusion.sum() == result.confusion[3, predicted] == 2


def test_figures_are_plain_json(tmp_path):
    for labels, probabilities in (guesses(50), ([1, 1], np.eye(10)[:2])):
        figures = report.classification(labels, probabilities, NAMES).figures
        write_json(tmp_path / "report.json", figures)
        read = json.loads((tmp_path / "report.json").read_text())
        assert read == figures
        assert {type(value) for value in leaves(read)} <= {str, int, float, type(None)}


def leaves(value):
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


@pytest.mark.parametrize(
    ("labels", "probabilities", "text"),
    [
        ([0, 1], np.eye(3), r"`predict` must return an array of shape \(2, 2\).*; got \(3, 3\)"),
        ([0, 1], np.eye(3)[:2], r"`predict` must return an array of shape \(2, 2\).*; got \(2, 3\)"),
        ([0, 1], [0.2, 0.7], r"`predict` must return an array of shape \(2, 2\).*; got \(2,\)"),
        ([0, 2], np.eye(2), "`data.classes` must name each label, from 0 to 2; got 2 names"),
    ],
)
def test_predictions_or_labels_that_do_not_fit_are_errors(labels, probabilities, text):
    with pytest.raises(ValueError, match=text):
        report.classification(labels, probabilities, ["cat", "dog"])


def test_missing_packages(monkeypatch):
    assert report.missing() == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else "found")
    assert report.missing() == ["scikit-learn"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert report.missing() == ["scikit-learn", "matplotlib"]


def is_picture(picture):
    """Not blank, and nothing reaches into the white margin."""
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    inner = np.zeros(picture.shape[:2], bool)
    inner[2:-2, 2:-2] = True
    assert (picture[~inner] == 255).all()
    assert (picture[inner] != 255).any()
    return True


@pytest.mark.parametrize(
    ("n", "name"), [(1, "cat"), (2, "automobile"), (3, "an automobile that is parked"), (10, MARKUP), (20, "truck")]
)
@pytest.mark.parametrize("count", [0, 10000])
def test_confusion_of_any_size(n, name, count):
    assert is_picture(report.draw_confusion(np.full((n, n), count), [name] * n))


def test_confusion_shows_its_counts_readably(monkeypatch):
    drawn = []
    render = report._render
    monkeypatch.setattr(report, "_render", lambda figure: drawn.append(figure) or render(figure))
    counts = np.arange(100).reshape(10, 10)
    picture = report.draw_confusion(counts, NAMES)
    assert is_picture(picture)
    (axes,) = drawn[0].axes
    texts = {(round(text.get_position()[1]), round(text.get_position()[0])): text for text in axes.texts}
    assert {place: int(text.get_text()) for place, text in texts.items()} == dict(np.ndenumerate(counts))
    cells = axes.images[0].to_rgba(counts)
    for place, text in texts.items():
        colours = luminance(cells[place]), luminance(matplotlib.colors.to_rgba(text.get_color()))
        assert (max(colours) + 0.05) / (min(colours) + 0.05) > 4  # the contrast ratio of WCAG 2
    assert not same(picture, report.draw_confusion(counts.T, NAMES))


def luminance(rgba):
    rgb = np.array(rgba[:3])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


def same(one, other):
    return one.shape == other.shape and (one == other).all()


def test_curves_have_a_panel_for_each_metric():
    one, two, four, seven = (
        report.draw_curves(dict.fromkeys(names, (2.0, 1.0))) for names in (["loss"], "ab", "abcd", "abcdefg")
    )
    assert all(map(is_picture, (one, two, four, seven)))
    assert two.shape[1] > 1.9 * one.shape[1]
    assert four.shape[0] > 1.9 * two.shape[0]
    assert seven.shape[0] > 2.9 * one.shape[0]
    lines = [pixels(picture, TRAIN).sum() / pixels(one, TRAIN).sum() for picture in (two, four, seven)]
    assert lines == pytest.approx([2, 4, 7], rel=0.15)
    assert is_picture(report.draw_curves({MARKUP: [1.0]}))
    assert same(
        report.draw_curves({"accuracy": CURVES["accuracy"], "loss": CURVES["loss"], "val_loss": CURVES["val_loss"]}),
        report.draw_curves(CURVES),
    )


def test_curves_show_the_parts_of_a_loss():
    history = {"loss": [2.0, 1.0], "loss/mse": [1.5, 1.0], "val_loss/mse": [1.0, 1.0]}
    for name in ("loss/mse", "val_loss/mse"):
        assert not same(report.draw_curves(history | {name: [3.0, 1.0]}), report.draw_curves(history))


def test_curves_show_training_and_validation():
    picture = report.draw_curves(CURVES)
    assert is_picture(picture)
    for name in CURVES:
        changed = CURVES | {name: [*CURVES[name][:1], 0.4, *CURVES[name][2:]]}
        assert not same(report.draw_curves(changed), picture)
    without = {name: values for name, values in CURVES.items() if name != "val_loss"}
    assert pixels(picture, VALIDATION).any()
    assert not pixels(report.draw_curves(without), VALIDATION).any()


def pixels(picture, colour):
    return (picture == np.array(colour)).all(axis=2)


TRAIN, VALIDATION = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)


def test_curves_show_one_single_epoch():
    shown, empty = (pixels(report.draw_curves({"loss": [value]}), TRAIN).sum() for value in (1.0, np.nan))
    assert shown > empty  # `empty` has the legend's


def test_curves_place_validation_at_every_kth_epoch():
    def spread(validation):
        orange = pixels(report.draw_curves({"loss": [1.0] * 5, "val_loss": validation}), VALIDATION)
        lowest = np.flatnonzero(orange[np.flatnonzero(orange.any(axis=1))[-1]])  # below the legend
        return lowest[0], lowest[-1]

    assert spread([0.0, 0.0]) == spread([np.nan, 0.0, np.nan, 0.0, np.nan])
    assert spread([0.0] * 5) != spread([0.0, 0.0])


@pytest.mark.parametrize("odd", [[np.nan], [np.inf, 1.0], [1.0, -np.inf, np.nan, 2.0], [None, 1.0], [1e300, 0.0], []])
def test_curves_of_odd_values(odd):
    assert is_picture(report.draw_curves({"loss": odd, "val_loss": odd, "accuracy": [0.5] * len(odd)}))


def test_curves_have_gaps_where_values_are_infinite():
    infinite, undefined = (report.draw_curves({"loss": [1.0, odd, 3.0, 2.0]}) for odd in (np.inf, np.nan))
    assert same(infinite, undefined)


def test_curves_of_nothing():
    assert is_picture(report.draw_curves({}))


def test_curves_mark_whole_epochs(monkeypatch):
    figures = []
    render = report._render
    monkeypatch.setattr(report, "_render", lambda figure: figures.append(figure) or render(figure))
    for epochs in (1, 2, 3, 7, 100):
        report.draw_curves({"loss": [1.0] * epochs})
        (axes,) = figures.pop().axes
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) and 1 <= tick <= epochs for tick in ticks)


def test_samples_keep_their_pixels_and_colours():
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
    picture = report.draw_samples(colours[None], [1], NAMES)
    assert is_picture(picture)
    areas = [pixels(picture, colour).sum() for colour in colours.reshape(4, 3)]
    assert sum(areas) > 100**2
    assert min(areas) > 0.9 * max(areas)
    grey = report.draw_samples(colours[None, ..., 0] // 2, [1], NAMES)
    assert (grey == grey[..., :1]).all()
    assert same(grey, report.draw_samples(colours[None, ..., :1] // 2, [1], NAMES))
    assert pixels(grey, [127] * 3).sum() > 5000
    assert not same(grey, report.draw_samples(colours[None, ..., 0] // 2, [2], NAMES))


def test_samples_are_the_first_25_in_rows_of_five():
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8)).astype(np.uint8)
    labels = np.arange(30) % 10
    picture = report.draw_samples(images, labels, NAMES)
    assert is_picture(picture)
    assert same(picture, report.draw_samples(images[:25], labels[:25], NAMES))
    fewer = report.draw_samples(images[:12], labels[:12], NAMES)
    assert is_picture(fewer)
    assert fewer.shape[1] == pytest.approx(picture.shape[1], abs=2)
    assert fewer.shape[0] == pytest.approx(3 / 5 * picture.shape[0], abs=20)
    one = report.draw_samples(images[:1], labels[:1], NAMES)
    assert one.shape[1] < 0.25 * picture.shape[1]


def test_samples_make_room_for_long_names():
    images = np.zeros((4, 8, 8), np.uint8)
    short, long = (report.draw_samples(images, [0] * 4, [name]) for name in ("cat", "a cat that is sleeping"))
    assert is_picture(long)
    assert long.shape[1] > short.shape[1] + 50
    assert is_picture(report.draw_samples(images, [0] * 4, [MARKUP]))


def test_drawing_leaves_matplotlib_as_it_was():
    from matplotlib import pyplot

    def state():
        return dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False), pyplot.get_fignums()

    before = state()
    report.draw_confusion(np.eye(2, dtype=int), ["cat", "dog"])
    report.draw_curves(CURVES)
    report.draw_samples(np.zeros((1, 8, 8), np.uint8), [0], NAMES)
    assert state() == before
