"""What a trainer tells TensorBoard beside the values that its steps return."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from looplab import checks, projector
from looplab.lock import can_resume, no_other_run
from looplab.paths import local_path
from looplab.steps import Steps
from looplab.summaries import RunWriter


class Logs(Steps):
    """Steps that can log scalars and images, and a run that can log what belongs to the whole of it."""

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        loss: Any,
        loss_weights: Any,
        metrics: Any,
        seed: int | None,
        log_dir: str | Path | None,
    ):
        super().__init__(model, optimizer, loss, loss_weights, metrics, seed)
        # Absolute: the program may change its working directory.
        self.log_dir = None if log_dir is None else local_path("log_dir", log_dir).absolute()
        self.epochs = 0
        self._events = RunWriter(self.log_dir)
        self._is_ours = False  # whether `fit` has said that the run in the folder is that of this trainer
        # What is logged before it is known whether a run goes on; and whether it replaces what the run has of it.
        self._early: list[tuple[Callable[[], None], bool]] = []

    def log(self, name: str, value: Any) -> None:
        """Adds a scalar to those of the running step, or, outside of a step, to TensorBoard at the current epoch."""
        if self._now.running:
            checks.outside_of_branches("log", name, self._now.graph)
            self._now.scalars[name] = checks.scalar("`log` got", name, value)
        else:
            number = float(value)
            self._write(lambda: self._events.scalars("train", self.epochs, {name: number}))

    def log_image(self, name: str, images: Any, every: int = 1000, max_outputs: int = 3) -> None:
        """Shows images in TensorBoard: of the running step, or, outside of a step, of the current epoch.

        Args:
            name: The tag.
            images: Shape (n, height, width, channels), 1, 3 or 4 channels; uint8, or floating from 0 to 1.
            every: In a step: it is written at the steps 1, 1 + every, 1 + 2·every, …
            max_outputs: How many of the n are written at most.
        """
        checks.positive(every=every, max_outputs=max_outputs)
        images = checks.images(name, images)[:max_outputs]
        if self._now.running:
            checks.outside_of_branches("log_image", name, self._now.graph)
            self._now.images[name] = images
            self._now.image_every[name] = every
        else:
            files = [tf.io.encode_png(image).numpy() for image in images]
            self._write(lambda: self._events.images("train", self.epochs, {name: files}))

    def log_hparams(self, hparams: dict[str, Any]) -> None:
        """Shows hyperparameters in TensorBoard's HPARAMS tab, beside the last value of each scalar of the run.

        Those of several calls are shown together, and of one name the last; a TensorBoard that has already read the
        run shows it once it is started anew. It must look at a folder above `log_dir` to find the scalars.

        Args:
            hparams: By name: bool, int, float or str. A scalar array or variable becomes its value, anything else
                its `str`.

        Raises:
            ValueError: `log_dir` holds another run.
        """
        checks.hparams(hparams)
        self._write(lambda: self._events.hparams(hparams), replaces=True)

    def log_embeddings(self, name: str, vectors: Any, labels: Any = None, images: Any = None) -> None:
        """Shows vectors in TensorBoard's PROJECTOR tab, in place of earlier ones of that name.

        A TensorBoard that has already read the run shows them once it is started anew.

        Args:
            name: What the tab calls them; `&`, `#`, `+` and `%` become `_`.
            vectors: Numbers, shape (n, d).
            labels: n strings or numbers, to be shown at the points.
            images: uint8, shape (n, height, width) or (n, height, width, channels), 1 or 3 channels, to be drawn at the
                points. Together, in ceil(sqrt(n)) rows and columns, they may have 8192x8192 pixels.

        Raises:
            ValueError: An argument of another shape or dtype, too many pixels, or `log_dir` holds another run.
        """
        embeddings = projector.checked(name, vectors, labels, images)
        self._write(lambda: self._events.embeddings("train", embeddings))

    def _write(self, write: Callable[[], None], replaces: bool = False) -> None:
        """Writes to `log_dir`; where that holds a run, `fit` must say first whether it goes on: then all this is there.

        Raises:
            ValueError: It holds the run of another trainer, which cannot go on.
        """
        undecided = not (self._events.begun or self._is_ours)
        if self.log_dir is not None and undecided and can_resume(self.log_dir):
            if not self._early:  # at the end of the program, if `fit` never says
                weakref.finalize(self, _warn_of_unwritten, self._early, self.log_dir)
            self._early.append((write, replaces))
            return
        with self._owning():
            write()

    def _settle(self, goes_on: bool) -> None:
        """From now on the run in `log_dir` is this trainer's.

        Args:
            goes_on: Whether it has saved something before: then what was logged early is there. Else that is written
                now, and what a run has left that saved nothing is removed.
        """
        if self.log_dir is not None and not (goes_on or self._events.begun or self._is_ours):
            self._events.remove()
        for write, replaces in self._early:
            if replaces or not goes_on:
                write()
        self._early.clear()
        self._is_ours = True

    @contextlib.contextmanager
    def _owning(self, resume: bool = False) -> Iterator[None]:
        """Within it, `log_dir` is this trainer's, and no other process can write to it.

        Args:
            resume: Whether it may hold a run.

        Raises:
            ValueError: Another process holds it, or it holds the run of another trainer.
        """
        if self.log_dir is None or self._events.owned:
            yield
            return
        if not (self._events.begun or self._is_ours):
            no_other_run(self.log_dir, resume)
        with self._events.owning():
            yield


def _warn_of_unwritten(early: list[Any], log_dir: Path) -> None:
    if early:
        warnings.warn(
            f"What was logged was not written: {log_dir} holds a run, and `fit` did not go on with it.", stacklevel=2
        )
