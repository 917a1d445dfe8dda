"""Additions to Keras's callbacks, each a plain `keras.callbacks.Callback`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from looplab.warn import say


class ProgressBar(keras.callbacks.Callback):
    """A line for each epoch: its loss and metrics, steps per second, time left.

    While the epoch goes on the line tells the mean of its steps so far, at its end the epoch's own values. A second
    line, for an evaluation, goes away when that is over. Where standard error is no terminal nothing is shown.
    """

    async_safe = True  # it only looks
    stateless = True

    def __init__(self) -> None:
        super().__init__()
        self._bars: list[tuple[tqdm, dict[str, float]]] = []

    def on_epoch_begin(self, epoch, logs=None):  # noqa: D102
        self._open(f"epoch {epoch + 1}/{self.params['epochs']}", self.params["steps"], leave=True)

    def on_train_batch_end(self, batch, logs=None):  # noqa: D102
        self._advance(logs)

    def on_epoch_end(self, epoch, logs=None):  # noqa: D102
        self._close(logs)

    def on_test_begin(self, logs=None):  # noqa: D102
        self._open("evaluation", None, leave=False)

    def on_test_batch_end(self, batch, logs=None):  # noqa: D102
        self._advance(logs)

    def on_test_end(self, logs=None):  # noqa: D102
        self._close(logs)

    def _open(self, text: str, steps: int | None, leave: bool) -> None:
        bar = tqdm(desc=text, total=steps, unit="step", disable=None, leave=leave, file=sys.stderr, dynamic_ncols=True)
        self._bars.append((bar, {}))

    def _advance(self, logs: dict[str, float]) -> None:
        bar, sums = self._bars[-1]
        if not bar.disable:
            for name in filter(_is_shown, logs):
                sums[name] = sums.get(name, 0.0) + logs[name]
            if bar.update():  # it was drawn
                bar.set_postfix(_shown({name: total / bar.n for name, total in sums.items()}), refresh=False)

    def _close(self, logs: dict[str, float] | None) -> None:
        bar, _ = self._bars.pop()
        bar.set_postfix(_shown(logs or {}), refresh=False)
        bar.close()


class EpochLine(keras.callbacks.Callback):
    """Prints a line for each epoch, for logs that are no terminal (`verbose=2`)."""

    stateless = True

    def on_epoch_end(self, epoch, logs=None):  # noqa: D102
        values = " - ".join(f"{name}: {value}" for name, value in _shown(logs or {}).items())
        say(f"epoch {epoch + 1}/{self.params['epochs']} - {values}")


class Pictures(keras.callbacks.Callback):
    """Draws pictures at the end of each epoch: into TensorBoard, and as `<log_dir>/pictures/<name>-<epoch>.png`.

    Args:
        draw: Returns uint8 images of shape (height, width, 1, 3 or 4), by name.
    """

    def __init__(self, draw: Callable[[], dict[str, np.ndarray]]):
        super().__init__()
        self._draw = draw

    def on_epoch_end(self, epoch, logs=None):  # noqa: D102
        log_dir = self.model.log_dir
        if log_dir is None:
            return
        for name, image in self._draw().items():
            self.model.log_image(name, image[None])
            write_png(Path(log_dir) / "pictures" / f"{name}-{epoch + 1:03d}.png", image)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Writes uint8 (height, width, channels), and makes the folders that lead there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tf.io.encode_png(picture).numpy())


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """One picture of many: (n, height, width, channels) in rows of `columns`; what is missing from the last is 0."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    padded = np.zeros((rows * columns, height, width, channels), images.dtype)
    padded[:n] = images
    grid = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)


def hooked_to_batches(callbacks: Iterable[keras.callbacks.Callback], kind: str) -> list[keras.callbacks.Callback]:
    """Those that do something at the begin or end of a batch; `kind` is "train", "test" or "predict"."""
    names = [f"on_{kind}_batch_begin", f"on_{kind}_batch_end", "on_batch_begin", "on_batch_end"]
    return [callback for callback in callbacks if any(_overrides(callback, name) for name in names)]


def _overrides(callback: keras.callbacks.Callback, name: str) -> bool:
    method: Any = getattr(callback, name)
    return getattr(method, "__func__", method) is not getattr(keras.callbacks.Callback, name)


def _is_shown(name: str) -> bool:
    return "/" not in name  # the parts of a loss are for TensorBoard


def _shown(logs: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in logs.items() if _is_shown(name)}
