"""Turns one prediction step into one graph call for each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from looplab.loop.call_logs import CallLogs
from looplab.loop.context import drawing
from looplab.loop.graphs import Copies, trace
from looplab.loop.step import Meaning


class Predictor:
    """A prediction step as a graph call for one batch.

    Args:
        step: What one replica does with its part of a batch.
        element_spec: The signature of a batch.
        strategy: Where the step runs.
        jit_compile, run_eagerly: As for `Compiled`.
    """

    def __init__(
        self,
        step: Callable[[Any], Any],
        element_spec: Any,
        strategy: tf.distribute.Strategy,
        jit_compile: bool,
        run_eagerly: bool,
    ):
        self.element_spec = element_spec
        self.eager = run_eagerly
        self.pace = 1
        self.meaning = Meaning({}, frozenset(), frozenset())

        def whole_step(batch: Any) -> Any:
            return strategy.run(step, (batch,))

        with drawing:
            self._call = whole_step if run_eagerly else trace(whole_step, element_spec, jit_compile=jit_compile)
        self.copies = Copies(None if run_eagerly else self._call)

    def __call__(self, iterator: Any, *_: int) -> CallLogs:
        """Runs the step on the next batch."""
        batch = iterator.get_next_as_optional()
        if not batch.has_value():
            return CallLogs(0, np.zeros(0), {}, [], np.zeros(0, int), batch)
        with drawing:
            outputs = self._call(batch.get_value())
        return CallLogs(1, np.ones(1), {}, [], np.zeros(1, int), batch, outputs)
