"""Keras metrics in a training loop: the value of one batch alone beside the running value."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf


class BatchMetrics:
    """Lets metrics tell the value of the current batch alone while a step runs.

    Each `update_state` counts twice: in the metric's variables, which are the running state, and in tensors that
    begin with each step. `result` tells the latter. So a step written as in Keras, which returns `metric.result()`,
    returns this batch's value, and the running value is there once the step is over.
    """

    def __init__(self) -> None:
        self.counted: set[int] = set()
        """The ids of the metrics that steps update."""
        self._step = threading.local()  # each thread, which is each replica, has its own step

    @contextlib.contextmanager
    def watching(self, metrics: Iterable[keras.Metric]) -> Iterator[None]:
        """Within it, `metrics` tell the values of batches in a thread where a step was begun."""
        metrics = list(metrics)
        for metric in metrics:
            metric.update_state = functools.partial(self._update, metric, metric.update_state)
            metric.result = functools.partial(self._result, metric, metric.result)
        try:
            yield
        finally:
            for metric in metrics:
                del metric.update_state, metric.result

    def begin(self) -> None:
        """A step begins in this thread."""
        self._step.states, self._step.results, self._step.asked = {}, {}, set()

    def end(self) -> None:
        """It is over."""
        del self._step.states

    def unasked(self) -> dict[str, tf.Tensor]:
        """The batch's values of the metrics whose result the step did not ask for: layers own such ones."""
        values: dict[str, tf.Tensor] = {}
        for metric, result in self._step.results.items():
            if metric not in self._step.asked:
                for name, value in named_result(metric, self._result(metric, result)).items():
                    if name in values:
                        raise ValueError(f"Two metrics are named '{name}'. Give one of them another `name`.")
                    values[name] = value
        return values

    def _update(self, metric: keras.Metric, update_state: Callable, *args: Any, **kwargs: Any) -> Any:
        outcome = update_state(*args, **kwargs)  # first, because it may make the metric's variables
        if hasattr(self._step, "states"):
            if metric not in self._step.states:
                with keras.StatelessScope() as scope:
                    metric.reset_state()
                self._step.states[metric] = _values(metric, scope)
                self._step.results[metric] = metric.result.args[-1]
                self.counted.add(id(metric))
            with self._batch_state(metric) as scope:
                update_state(*args, **kwargs)
            self._step.states[metric] = _values(metric, scope)
        return outcome

    def _result(self, metric: keras.Metric, result: Callable) -> Any:
        if metric not in getattr(self._step, "states", {}):
            return result()
        self._step.asked.add(metric)
        with self._batch_state(metric):
            return result()

    def _batch_state(self, metric: keras.Metric) -> keras.StatelessScope:
        return keras.StatelessScope(list(zip(metric.variables, self._step.states[metric], strict=True)))


class Means:
    """Means of scalars over steps, each weighed by the examples of its batch.

    They are added up one by one, so that they do not depend on how many steps come at a time.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weight = 0.0

    def add(self, weights: np.ndarray, scalars: dict[str, np.ndarray]) -> None:
        """Counts steps: both shapes are (steps,). A batch without examples has no values, and does not count."""
        for weight in weights.tolist():
            self._weight += weight
        for name, values in scalars.items():
            total = self._sums.get(name, 0.0)
            for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
                if weight:
                    total += value * weight
            self._sums[name] = total

    def result(self) -> dict[str, float]:
        """The means so far."""
        return {name: total / self._weight for name, total in self._sums.items()}


def named_result(metric: keras.Metric, result: Any) -> dict[str, Any]:
    """A metric's result as scalars by name: most give one, some a dict."""
    return dict(result) if isinstance(result, dict) else {metric.name: result}


def _values(metric: keras.Metric, scope: keras.StatelessScope) -> list[tf.Tensor]:
    values = [scope.get_current_value(variable) for variable in metric.variables]
    return [v.value if value is None else value for v, value in zip(metric.variables, values, strict=True)]
