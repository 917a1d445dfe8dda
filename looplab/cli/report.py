"""What a classifier did, as text, figures and pictures; needs the extra `report`: scikit-learn and matplotlib.

Both are imported inside the functions, because they may be missing and take a second.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHARACTER = 0.085  # inches that one is wide in a font of 9 points


class Report(NamedTuple):
    """How good the predictions are."""

    text: str
    """scikit-learn's classification report, the macro ROC AUCs, and the confusion matrix."""
    figures: dict[str, Any]
    """The same as plain Python numbers for JSON; None is what is undefined."""
    confusion: np.ndarray
    """How many examples of each true class (row) were predicted as each class (column)."""


def missing() -> list[str]:
    """The packages of the extra that are not installed, as pip calls them."""
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    return [package for module, package in packages.items() if importlib.util.find_spec(module) is None]


def classification(labels: Any, probabilities: Any, classes: Sequence[str]) -> Report:
    """Compares predictions with the labels.

    A class that does not occur among the labels has support 0 and counts as 0 in the macro averages, as scikit-learn
    has it. The macro ROC AUCs, of each class against the rest, leave it out.

    Args:
        labels: Whole numbers of shape (n,), each the index of a class.
        probabilities: Of shape (n, classes). The highest is the prediction; they need not sum to 1.
        classes: The names.

    Raises:
        ValueError: The shapes do not fit each other or the classes, or a label is not the index of a class.
    """
    from sklearn import metrics

    labels, probabilities = np.asarray(labels), np.asarray(probabilities).astype(np.float64)  # of bfloat16 too
    _check(labels, probabilities, classes)
    predicted = probabilities.argmax(axis=1)
    indices = np.arange(len(classes))
    options: dict[str, Any] = {"labels": indices, "target_names": list(classes), "zero_division": 0}
    told = metrics.classification_report(labels, predicted, output_dict=True, **options)
    confusion = metrics.confusion_matrix(labels, predicted, labels=indices)
    soft, soft_text = _macro_auc(labels, probabilities, classes)
    hard, hard_text = _macro_auc(labels, np.eye(len(classes))[predicted], classes)
    text = (
        f"{metrics.classification_report(labels, predicted, **options)}\n"
        f"macro ROC AUC, from probabilities: {soft_text}\n"
        f"macro ROC AUC, from hard predictions: {hard_text}\n\n"
        f"confusion matrix (rows: true, columns: predicted)\n{_table(confusion, classes)}\n"
    )
    figures = {
        "accuracy": told["accuracy"],
        "per_class": {name: told[name] for name in classes},
        "macro avg": told["macro avg"],
        "weighted avg": told["weighted avg"],
        "roc_auc_macro": {"probabilities": soft, "hard_predictions": hard},
        "classes": list(classes),
        "confusion_matrix": confusion.tolist(),
    }
    plain = json.loads(json.dumps(figures, allow_nan=False))  # without NumPy's types
    return Report(text, plain, confusion)


def draw_confusion(confusion: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """A heat map of `Report.confusion`, as uint8 of shape (height, width, 3)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    highest = max(int(np.max(confusion)), 1)
    side = max(2.0, len(classes) * max(0.45, _CHARACTER * (len(str(highest)) + 1)))
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))  # the cells alone: `_render` makes room for what is around them
    shown = axes.imshow(confusion, cmap="Blues", vmin=0, vmax=highest)
    for (row, column), count in np.ndenumerate(confusion):
        colour = "white" if count > 0.7 * highest else "black"  # at 0.7 both stand out from the blue alike
        axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    fits = _CHARACTER * (max(map(len, classes)) + 1) <= side / len(classes)
    turned: dict[str, Any] = {} if fits else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(classes)), classes, fontsize=9, parse_math=False, **turned)
    axes.set_yticks(range(len(classes)), classes, fontsize=9, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    bar = axes.inset_axes((1 + 0.15 / side, 0, 0.15 / side, 1))
    figure.colorbar(shown, cax=bar, label="examples", ticks=MaxNLocator(integer=True))
    return _render(figure)


def draw_curves(history: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Each metric over the epochs, the loss first, in a panel of its own; as uint8 of shape (height, width, 3).

    Args:
        history: That of `keras.callbacks.History`. Where validation has fewer values than training, it ran every k-th
            epoch; k is the ratio of their numbers, rounded down.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found = dict.fromkeys(name.removeprefix("val_") for name in history)
    names = sorted(found, key=lambda name: name != "loss") or ["loss"]
    columns = len(names) if len(names) < 4 else math.ceil(math.sqrt(len(names)))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1)
        last = max(len(history.get(name, ())), len(history.get(f"val_{name}", ())), 1)
        for kind, key, colour in (("train", name, "C0"), ("validation", f"val_{name}", "C1")):
            values = np.asarray(history.get(key, ()), np.float64)
            if len(values):
                epochs = last // len(values) * np.arange(1, len(values) + 1)
                axes.plot(epochs, values, colour, marker="o", markersize=3, label=kind)
                axes.legend()
        axes.set(xlabel="epoch", xlim=(0.5, last + 0.5))
        axes.set_ylabel(name, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    return _render(figure)


def draw_samples(images: np.ndarray, labels: Any, classes: Sequence[str], columns: int = 5) -> np.ndarray:
    """A square grid of the first images with the names of their classes, as uint8 of shape (height, width, 3).

    Args:
        images: uint8 of shape (n, height, width), or with a last axis of 1 or 3 channels.
        labels: Whole numbers of shape (n,).
        classes: The names.
        columns: How many images a row has, and how many rows there are at most.

    Raises:
        ValueError: `images` are none, or not of uint8.
    """
    from matplotlib.figure import Figure

    if images.dtype != np.uint8 or not len(images):
        raise ValueError(f"`images` must be uint8, at least one; got {images.dtype} {images.shape}. Cast 0 to 255.")
    images = images[: columns**2]
    names = [classes[int(label)] for label in labels[: len(images)]]
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    width = max(1.1, _CHARACTER * max(map(len, names)))
    height = 1.1 * images.shape[1] / images.shape[2]
    figure = Figure(figsize=(columns * (width + 0.1), rows * (height + 0.3)))
    edges = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": 0.1 / width, "hspace": 0.3 / height}
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False, gridspec_kw=edges).flat):
        axes.set_axis_off()
        if index < len(images):
            axes.imshow(images[index], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(names[index], fontsize=9, pad=3, parse_math=False)
    return _render(figure)


def _check(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> None:
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"`labels` must be whole numbers of shape (n,), at least one; got {labels.dtype} {labels.shape}. "
            "Of one-hot labels, pass labels.argmax(axis=-1)."
        )
    if probabilities.shape != (len(labels), len(classes)):
        raise ValueError(
            f"`probabilities` must have shape {(len(labels), len(classes))}: a row for each label, a column for each "
            f"class; got {probabilities.shape}. Pass what the model predicts for these examples, and all class names."
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"`labels` must be from 0 to {len(classes) - 1}, the indices of the classes; got {labels.min()} to "
            f"{labels.max()}. Pass all class names, in the order of their labels."
        )


def _macro_auc(labels: np.ndarray, scores: np.ndarray, classes: Sequence[str]) -> tuple[float | None, str]:
    """The number, and how it is told."""
    from sklearn import metrics

    present = np.unique(labels)  # each is there and, as there are two or more, is not
    if len(present) < 2:
        return None, f"undefined: {classes[present[0]]} is the only class among the labels"
    if not np.isfinite(scores).all():
        return None, "undefined: not all of them are finite"
    one_hot = np.eye(len(classes))[labels]  # for labels themselves scikit-learn wants sums of exactly 1
    value = float(metrics.roc_auc_score(one_hot[:, present], scores[:, present], average="macro"))
    over = (
        "" if len(present) == len(classes) else f" (over {len(present)} of {len(classes)} classes: others are absent)"
    )
    return value, f"{value:.4f}{over}"


def _table(confusion: np.ndarray, classes: Sequence[str]) -> str:
    rows = [["", *classes], *([name, *map(str, counts)] for name, counts in zip(classes, confusion, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def _render(figure: Figure) -> np.ndarray:
    """The picture of a figure and of all that sticks out of it, with a white margin."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # matplotlib's own need

    file = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(
        file, format="png", dpi=100, facecolor="white", bbox_inches="tight", pad_inches=0.1
    )
    return np.asarray(Image.open(file).convert("RGB"))
