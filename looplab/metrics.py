"""Keras metrics in a training loop: the value of one batch alone beside the running value."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf


class BatchMetrics:
    """Lets metrics tell the value of the current batch alone while a step runs.

    Each `update_state` counts twice: in the metric's variables, which are the running state, and in copies of them
    that are reset when a step begins. `result` tells the latter. So a step written as in Keras, which returns
    `metric.result()`, returns this batch's value, and the running value is there once the step is over.
    """

    def __init__(self) -> None:
        self.updated: dict[str, dict[str, keras.Metric]] = {
            "train": {},
            "test": {},
        }  # by kind of step
        self._copies: dict[keras.Metric, list[tuple[tf.Variable, np.ndarray]]] = {}  # and the value of each when fresh
        self._step = threading.local()  # each thread, which is each replica, has its own step

    @property
    def variables(self) -> list[tf.Variable]:
        """The copies."""
        return [copy for copies in self._copies.values() for copy, _ in copies]

    @contextlib.contextmanager
    def watching(self, metrics: Iterable[keras.Metric]) -> Iterator[None]:
        """Within it, `metrics` tell the values of batches in a thread where a step is open.

        Raises:
            ValueError: A metric keeps its state in a `tf.Variable`, of which Keras can make no second state.
        """
        methods = []
        for metric in metrics:
            if any(isinstance(value, tf.Variable) for value in vars(metric).values()):
                raise ValueError(
                    f"Metric '{metric.name}' holds a `tf.Variable`. Make its state by `self.add_variable`."
                )
            methods.append((metric, metric.update_state, metric.result))
        for metric, update_state, result in methods:
            metric.update_state = functools.partial(self._update, metric, update_state)
            metric.result = functools.partial(self._result, metric, result)
        try:
            yield
        finally:
            for metric, update_state, result in methods:
                for name, method in (("update_state", update_state), ("result", result)):
                    delattr(metric, name)
                    if getattr(metric, name) != method:  # it was an attribute of the instance before
                        setattr(metric, name, method)

    @contextlib.contextmanager
    def open(self, kind: str) -> Iterator[None]:
        """Within it runs a step of this kind, "train" or "test"."""
        updated = self.updated[kind]
        self._step.updated, self._step.asked, self._step.copying = updated, set(), False
        for copies in self._copies.values():  # also where this trace does not know yet that it will update them
            for copy, fresh in copies:
                copy.assign(fresh)
        try:
            yield
        finally:
            del self._step.updated

    def unasked(self) -> dict[str, Any]:
        """The batch's values of the metrics whose result the step did not ask for: layers own such ones."""
        values: dict[str, Any] = {}
        for metric in self._step.updated.values():
            if metric not in self._step.asked:
                for name, value in named_result(metric).items():
                    if name in values:
                        raise ValueError(f"Two metrics are named '{name}'. Give one of them another `name`.")
                    values[name] = value
        return values

    def _update(self, metric: keras.Metric, update_state: Callable, *args: Any, **kwargs: Any) -> Any:
        outcome = update_state(*args, **kwargs)  # first, because it may make the metric's variables
        if hasattr(self._step, "updated") and not self._step.copying:
            if metric not in self._copies:
                self._copies[metric] = _fresh_copies(metric)
            self._step.updated.setdefault(str(id(metric)), metric)
            with self._on_copies(metric) as scope:
                update_state(*args, **kwargs)
            for variable, (copy, _) in zip(metric.variables, self._copies[metric], strict=True):
                copy.assign(scope.get_current_value(variable))
        return outcome

    def _result(self, metric: keras.Metric, result: Callable) -> Any:
        if not hasattr(self._step, "updated") or self._step.copying or metric not in self._step.updated.values():
            return result()
        self._step.asked.add(metric)
        with self._on_copies(metric):
            return result()

    @contextlib.contextmanager
    def _on_copies(self, metric: keras.Metric) -> Iterator[keras.StatelessScope]:
        """Within it, the metric's variables stand for their copies; a metric inside of it is a part of it."""
        copies = [tf.convert_to_tensor(copy) for copy, _ in self._copies[metric]]
        self._step.copying = True
        try:
            with keras.StatelessScope(list(zip(metric.variables, copies, strict=True))) as scope:
                yield scope
        finally:
            self._step.copying = False


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
        """The means so far; NaN where no step counted."""
        return {name: total / self._weight if self._weight else math.nan for name, total in self._sums.items()}

    def state(self) -> dict[str, Any]:
        """What has been added up."""
        return {"sums": dict(self._sums), "weight": self._weight}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` told."""
        self._sums, self._weight = dict(state["sums"]), state["weight"]


def named_result(metric: keras.Metric) -> dict[str, Any]:
    """A metric's result as scalars by name: most give one, some a dict."""
    result = metric.result()
    return dict(result) if isinstance(result, dict) else {metric.name: result}


def _fresh_copies(metric: keras.Metric) -> list[tuple[tf.Variable, np.ndarray]]:
    """A variable for each of the metric's, of its value after a reset, and that value."""
    with tf.init_scope():
        with keras.StatelessScope() as scope:
            metric.reset_state()
        values = [scope.get_current_value(variable) for variable in metric.variables]
        values = [v.value if value is None else value for v, value in zip(metric.variables, values, strict=True)]
        fresh = [np.array(tf.convert_to_tensor(value)) for value in values]
        on_read = {"synchronization": tf.VariableSynchronization.ON_READ, "aggregation": tf.VariableAggregation.SUM}
        return [(tf.Variable(value, trainable=False, **on_read), value) for value in fresh]


def lower_is_better(monitor: str, mode: str, metrics: Iterable[keras.Metric]) -> bool:
    """Whether less of a logged value is better: as `mode` says, or with "auto", as the metric of its name does.

    Raises:
        ValueError: `mode` is "auto", and no loss or metric of that name tells.
    """
    name = monitor.removeprefix("val_")
    if mode != "auto":
        return mode == "min"
    if "loss" in name:
        return True
    for metric in metrics:
        if metric.name == name and getattr(metric, "_direction", None) in ("up", "down"):
            return metric._direction == "down"
    raise ValueError(f'Whether less of `monitor` {monitor!r} is better is not known: pass `mode="min"` or "max".')
