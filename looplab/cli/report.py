"""Reports on classifiers: text, numbers and pictures. They need the extra `report`: scikit-learn and matplotlib.

Both are imported inside the functions, because they may be missing and take a second.
"""

from __future__ import annotations

import importlib.util
import io
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
    """The same as numbers; None is undefined."""
    confusion: np.ndarray
    """How many examples of each true class (row) were predicted as each class (column)."""


def missing() -> list[str]:
    """The packages of the extra that are not installed, as pip calls them."""
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    return [package for module, package in packages.items() if importlib.util.find_spec(module) is None]


def classification(labels: Any, probabilities: Any, classes: Sequence[str]) -> Report:
    """Compares predictions with the labels.

    A class without labels has support 0 and counts as 0 in the macro averages, as in scikit-learn. The macro ROC AUCs,
    of each class against the rest, leave it out.

    Args:
        labels: Whole numbers of shape (n,), each the index of a class.
        probabilities: Shape (n, classes). The highest is the prediction; they need not sum to 1.
        classes: The names.

    Raises:
        ValueError: The shapes do not fit each other or the classes, or a label is not the index of a class.
    """
    from sklearn import metrics

    labels, probabilities = np.asarray(labels), np.asarray(probabilities).astype(np.float64)
    if probabilities.shape != (len(labels), len(classes)):
        raise ValueError(
            f"`predict` must return an array of shape {(len(labels), len(classes))}: a row for each image, a column "
            f"for each class; got {probabilities.shape}."
        )
    if labels.max() >= len(classes):
        raise ValueError(f"`data.classes` must name each label, from 0 to {labels.max()}; got {len(classes)} names.")
    predicted = probabilities.argmax(axis=1)
    indices = np.arange(len(classes))
    options: dict[str, Any] = {"labels": indices, "target_names": list(classes), "zero_division": 0}
    rows = metrics.classification_report(labels, predicted, output_dict=True, **options)
    confusion = metrics.confusion_matrix(labels, predicted, labels=indices)
    soft, hard = _macro_auc(labels, probabilities), _macro_auc(labels, np.eye(len(classes))[predicted])
    present = len(np.unique(labels))
    over = f" (over {present} of {len(classes)} classes: others are absent)" if present < len(classes) else ""
    text = [metrics.classification_report(labels, predicted, **options)]
    for name, value in (("probabilities", soft), ("hard predictions", hard)):
        text.append(f"macro ROC AUC, from {name}: {'undefined' if value is None else f'{value:.4f}'}{over}")
    text.append(f"\nconfusion matrix (rows: true, columns: predicted)\n{_table(confusion, classes)}\n")
    figures = {
        "accuracy": rows["accuracy"],
        "per_class": {name: rows[name] for name in classes},
        "macro avg": rows["macro avg"],
        "weighted avg": rows["weighted avg"],
        "roc_auc_macro": {"probabilities": soft, "hard_predictions": hard},
        "classes": list(classes),
        "confusion_matrix": confusion.tolist(),
    }
    return Report("\n".join(text), figures, confusion)


def draw_confusion(confusion: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """A heat map of `Report.confusion`, as uint8 of shape (height, width, 3)."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    cell = max(0.45, _CHARACTER * (len(str(confusion.max())) + 1))
    figure = Figure(figsize=(max(2.0, len(classes) * cell),) * 2)
    fits = _CHARACTER * (max(map(len, classes)) + 1) <= figure.get_figwidth() / len(classes)
    ConfusionMatrixDisplay(confusion, display_labels=list(map(_plain, classes))).plot(
        ax=figure.add_axes((0, 0, 1, 1)),  # the cells alone: `_render` adds room for labels
        cmap="Blues",
        colorbar=False,
        im_kw={"vmin": 0, "vmax": max(1.4 * confusion.max(), 1)},  # so that black is readable on each cell
        text_kw={"color": "black", "fontsize": 9},
        xticks_rotation="horizontal" if fits else "vertical",
    )
    return _render(figure)


def draw_curves(history: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Curves over the epochs, one panel for each metric, the loss first; as uint8 of shape (height, width, 3).

    Args:
        history: That of `keras.callbacks.History`. If validation has fewer values than training, it ran every k-th
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
        axes.set(xlabel="epoch", ylabel=_plain(name), xlim=(0.5, last + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    return _render(figure)


def draw_samples(images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """The first 25 images in rows of five, with the names of their classes; as uint8 of shape (height, width, 3).

    Args:
        images: uint8 of shape (n, height, width), or with a last axis of 1 or 3 channels.
        labels: Whole numbers of shape (n,).
        classes: The names.
    """
    from matplotlib.figure import Figure

    names = [_plain(classes[label]) for label in labels[:25]]
    columns, rows = min(5, len(names)), math.ceil(len(names) / 5)
    width = max(1.1, _CHARACTER * max(map(len, names)))
    height = 1.1 * images.shape[1] / images.shape[2]
    figure = Figure(figsize=(columns * (width + 0.1), rows * (height + 0.3)))
    edges = {"left": 0, "right": 1, "bottom": 0, "top": 1, "wspace": 0.1 / width, "hspace": 0.3 / height}
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False, gridspec_kw=edges).flat):
        axes.set_axis_off()
        if index < len(names):
            axes.imshow(images[index], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(names[index], fontsize=9, pad=3)
    return _render(figure)


def _macro_auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """The mean over the classes among the labels; None if there is only one."""
    from sklearn import metrics

    present = np.unique(labels)
    if len(present) < 2:
        return None
    one_hot = np.eye(scores.shape[1])[labels]  # for labels alone, scikit-learn requires sums of exactly 1
    return float(metrics.roc_auc_score(one_hot[:, present], scores[:, present], average="macro"))


def _table(confusion: np.ndarray, classes: Sequence[str]) -> str:
    rows = [["", *classes], *([name, *map(str, counts)] for name, counts in zip(classes, confusion, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def _plain(name: str) -> str:
    """A name that matplotlib shows as it is: text between two dollars would be a formula."""
    return name.replace("$", r"\$")


def _render(figure: Figure) -> np.ndarray:
    """A figure and everything that reaches out of it, with a white margin."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # a dependency of matplotlib

    file = io.BytesIO()
    options = {"dpi": 100, "facecolor": "white", "bbox_inches": "tight", "pad_inches": 0.1}
    FigureCanvasAgg(figure).print_figure(file, format="png", **options)
    return np.asarray(Image.open(file).convert("RGB"))
