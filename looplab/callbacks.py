"""Additions to Keras's callbacks, each a plain `keras.callbacks.Callback`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from looplab import checks
from looplab.warn import say

__all__ = ["EpochLine", "Pictures", "ProgressBar", "tile", "write_png"]


class _Shown(keras.callbacks.Callback):
    """Shows a line for each epoch, and below it what took time that it should not.

    Args:
        costs: The `Costs` of the training.
    """

    stateless = True

    def __init__(self, costs: Any = None):
        super().__init__()
        self._costs = costs

    def on_epoch_begin(self, epoch, logs=None):
        self._show_costs()  # of the last epoch

    def on_train_end(self, logs=None):
        self._show_costs()

    def _show_costs(self) -> None:
        for line in self._costs.warnings if self._costs else ():
            self.say(line)

    def say(self, line: str) -> None:
        """Prints a line."""
        say(line)


class ProgressBar(_Shown):
    """A line for each epoch: its loss and metrics, steps per second, and the time left.

    During the epoch, the line shows the means over its steps so far. When the epoch has ended, its own values replace
    the bar: `loss` and `val_loss`, then as many others as fit. A second line shows the progress of an evaluation, and
    disappears with it. Without a terminal at standard error, nothing is shown.
    """

    async_safe = True

    def __init__(self, costs: Any = None):
        super().__init__(costs)
        self._bars: list[tuple[tqdm, dict[str, float]]] = []
        self._is_shown = False

    def say(self, line: str) -> None:
        """Prints a line where the bar was, if there was one."""
        if self._is_shown:
            tqdm.write(line, sys.stderr)

    def on_epoch_begin(self, epoch, logs=None):  # noqa: D102
        super().on_epoch_begin(epoch, logs)
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
        self._is_shown = not bar.disable

    def _advance(self, logs: dict[str, float]) -> None:
        bar, sums = self._bars[-1]
        if not bar.disable:
            for name, value in logs.items():
                sums[name] = sums.get(name, 0.0) + value
            if bar.update():  # tqdm redraws at most ten times a second
                bar.set_postfix(shown({name: total / bar.n for name, total in sums.items()}), refresh=False)

    def _close(self, logs: dict[str, float] | None) -> None:
        bar, _ = self._bars.pop()
        if not bar.disable and bar.leave:
            values, columns = shown(logs or {}), bar.format_dict["ncols"] or math.inf
            bar.bar_format = "{desc}{postfix} [{n_fmt} in {elapsed}, {rate_fmt}]"
            bar.set_postfix(values, refresh=False)
            while len(str(bar)) >= columns and len(values) > 2:  # a number that is cut off looks like another one
                values.popitem()
                bar.set_postfix(values, refresh=False)
            if len(str(bar)) >= columns:
                bar.bar_format = "{desc}{postfix}"
        bar.close()


class EpochLine(_Shown):
    """Prints a line for each epoch (`verbose=2`)."""

    def on_epoch_end(self, epoch, logs=None):  # noqa: D102
        values = " - ".join(f"{name}: {value}" for name, value in shown(logs or {}).items())
        say(f"epoch {epoch + 1}/{self.params['epochs']} - {values}")


class Pictures(keras.callbacks.Callback):
    """Draws pictures after each epoch, for TensorBoard and as `<log_dir>/pictures/<name>-<epoch>.png`.

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
        for name, image in self._draw().items():  # on all workers, because it may predict
            self.model.log_image(name, image[None])
            if self.model.strategy.extended.should_save_summary:
                write_png(Path(log_dir) / "pictures" / f"{name}-{epoch + 1:03d}.png", image)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Writes a uint8 picture of shape (height, width, channels), and creates missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tf.io.encode_png(picture).numpy())


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """One picture of images (n, height, width, channels), in rows of `columns`; empty places are 0."""
    padded = np.pad(images, [(0, -len(images) % columns), (0, 0), (0, 0), (0, 0)])
    _, height, width, channels = images.shape
    rows = padded.reshape(-1, columns, height, width, channels).swapaxes(1, 2)
    return rows.reshape(-1, columns * width, channels)


def hooked_to_batches(callbacks: Iterable[keras.callbacks.Callback], kind: str) -> list[keras.callbacks.Callback]:
    """The callbacks that act on each batch; `kind` is "train", "test" or "predict"."""
    names = [f"on_{kind}_batch_begin", f"on_{kind}_batch_end", "on_batch_begin", "on_batch_end"]
    return [callback for callback in callbacks if any(_overrides(callback, name) for name in names)]


def _overrides(callback: keras.callbacks.Callback, name: str) -> bool:
    method: Any = getattr(callback, name)
    return getattr(method, "__func__", method) is not getattr(keras.callbacks.Callback, name)


def shown(logs: Mapping[str, float]) -> dict[str, str]:
    """The values of an epoch as a line of text shows them, `loss` and `val_loss` first."""
    names = sorted(logs, key=lambda name: ["loss", "val_loss", name].index(name))
    return {name: f"{logs[name]:.4g}" for name in names if not np.ndim(logs[name])}


def with_bar(trainer: Any, callbacks: Any, steps: int | None, verbose: int | str) -> keras.callbacks.CallbackList:
    """The callbacks of an evaluation or a prediction, with a progress bar unless `verbose` is 0."""
    bar = [ProgressBar()] if verbose else []
    return keras.callbacks.CallbackList([*checks.callbacks(callbacks), *bar], model=trainer, steps=steps)


def begin_batch(kind: str, hooks: Sequence[Any], number: int) -> None:
    """Calls the hooks for the start of a step."""
    for hook in hooks:
        getattr(hook, f"on_{kind}_batch_begin")(number, logs={})


def end_batches(kind: str, hooks: Sequence[Any], shown: list[dict[str, Any]], first: int, starts: bool) -> None:
    """Calls the hooks for each step that a graph call ran, with the values of that step."""
    for index, values in enumerate(shown):
        for hook in hooks:
            if starts:
                getattr(hook, f"on_{kind}_batch_begin")(first + index, logs={})
            getattr(hook, f"on_{kind}_batch_end")(first + index, logs=values)
