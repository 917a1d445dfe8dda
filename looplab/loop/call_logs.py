"""What one graph call returns about the steps that it ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf


class CallLogs(NamedTuple):
    """What one graph call returns about the steps that it ran."""

    done: int
    """How many steps it ran: fewer than asked for at the end of the data, after a fault, or once `stop` is set."""
    weights: np.ndarray
    """float64, shape (done,): how many examples the batch of each step had."""
    scalars: dict[str, np.ndarray]
    """float64, shape (done,), by name: wide enough to hold each float32 and int32 exactly."""
    images: list[tuple[int, str, list[bytes]]]
    """(index of the step in this call, name, its images as `image_content` returns them)."""
    faults: np.ndarray
    """int, shape (done,): 0, or the code of each step's fault."""
    batch: Any
    """An optional of the last step's batch, or of nothing at the end of the data."""
    outputs: Any = None
    """Of a prediction: what the step returned."""
    waited: float = 0.0
    """How many seconds the steps have waited for their batches, unless these are gathered in the graph."""

    @classmethod
    def of_tables(
        cls, tables: Sequence[tf.Tensor], batch: Any, waited: Any, names: Sequence[str], image_names: Sequence[str]
    ) -> CallLogs:
        """The logs of a call that returned these tables.

        Args:
            tables: float64, shape (done, 2 + names): the number of examples of each step, its fault, and its scalars;
                and if there are images, strings, shape (done, image_names): the images of each step, or "".
            batch, waited: Those of the logs.
            names, image_names: Those of the columns.
        """
        rows, *pictures = tables
        table = rows.numpy().reshape(-1, 2 + len(names))  # without a step there are no columns
        images = [
            (index, name, tf.io.parse_tensor(cell, tf.string).numpy().tolist())
            for cells in pictures
            for index, row in enumerate(cells.numpy())
            for name, cell in zip(image_names, row, strict=True)
            if cell
        ]
        weights, faults, *columns = table.T
        scalars = dict(zip(names, columns, strict=True))
        return cls(len(table), weights, scalars, images, faults.astype(int), batch, waited=float(waited))

    def first(self, steps: int) -> CallLogs:
        """The logs of the first steps alone."""
        scalars = {name: values[:steps] for name, values in self.scalars.items()}
        images = [image for image in self.images if image[0] < steps]
        return self._replace(
            done=steps, weights=self.weights[:steps], scalars=scalars, images=images, faults=self.faults[:steps]
        )

    def faults_in_a_row(self, before: int, most: int) -> tuple[int, bool]:
        """How many of the last steps in a row were skipped, and whether the last step ends the pass.

        Args:
            before: How many steps in a row were skipped before this call.
            most: How many may be.
        """
        sound = self.faults == 0
        in_a_row = int(sound[::-1].argmax()) if sound.any() else before + self.done
        stops = self.done > 0 and bool(self.faults[-1] < 0 or in_a_row > most)
        return in_a_row - stops, stops  # the one that ends the pass is not skipped
