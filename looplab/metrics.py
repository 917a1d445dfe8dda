"""Keras metrics in a training loop: the value of one batch alone beside the running value."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from looplab.hooks import Hooks
from looplab.tracking import is_users

_thread = threading.local()  # .step: the step that runs in this thread, which is one replica


class Source(NamedTuple):
    """The metric that a value is the result of, and the keys to the value where the result is a dict."""

    metric: keras.Metric
    keys: tuple[Any, ...] = ()

    def __str__(self) -> str:
        if self.keys and self.metric.name == "compile_metrics":  # Keras's own, which holds those of `metrics`
            return f"{'/'.join(map(str, self.keys))!r} of `metrics`"
        entry = f"entry {'/'.join(map(str, self.keys))!r} of " if self.keys else ""
        return f"{entry}the result of metric '{self.metric.name}'"

    def of(self, result: Any) -> Any:
        """The value within the metric's result."""
        return functools.reduce(lambda inner, key: inner[key], self.keys, result)


class Named(NamedTuple):
    """A value of a step under its name."""

    name: Any
    value: Any
    origin: str
    """Where it comes from, in words."""
    source: Source | None = None
    """The metric that it comes from."""


class BatchMetrics:
    """Lets metrics give the value of the current batch alone while a step runs.

    Each `update_state` runs twice: on the metric's variables, which hold the running state, and on copies of them that
    are reset when a step ends. `result` reads the copies. So a step written as in Keras, which returns
    `metric.result()`, returns this batch's value, and the metric itself has the value of the epoch so far.
    """

    def __init__(self) -> None:
        # By kind of step; what an earlier trace has seen stays, because an inner `tf.function` is traced once.
        self.updated: dict[str, list[keras.Metric]] = {"train": [], "test": []}
        self.copies: dict[int, _Copy] = {}  # by the variable's identity
        self.meanings: dict[str, Any] = {}
        """What the scalars of each kind of step are, as it last ran or was traced."""

    @property
    def variables(self) -> list[tf.Variable]:
        """The copies."""
        return [copy.variable for copy in self.copies.values()]

    @contextlib.contextmanager
    def open(self, kind: str, held: Iterable[keras.Metric]) -> Iterator[None]:
        """Within it runs a step of this kind, "train" or "test", of a trainer that holds these metrics."""
        kept = {id(metric) for metric in held}
        self.updated[kind] = [metric for metric in self.updated[kind] if id(metric) in kept]
        _thread.step = _Step(self, self.updated[kind])
        try:
            yield
            self.reset()
        finally:
            _thread.step = None

    def reset(self) -> None:
        """Brings the copies to what they are before a step; a step that ends does so by itself."""
        for copy in self.copies.values():
            copy.reset()

    def source(self, value: Any) -> Source | None:
        """The metric whose result a value is, if a metric of the running step returned this very object."""
        step: _Step | None = getattr(_thread, "step", None)
        return None if step is None else step.results.get(id(value), (None, None))[1]

    def is_updated(self, value: Any) -> bool:
        """Whether a value is no metric's result, or that of a metric which the running step updated."""
        source = self.source(value)
        return source is None or any(source.metric is metric for metric in _thread.step.updated)

    def not_returned(self) -> list[Named]:
        """The results of the metrics that the step updated and did not ask for, as those of layers, where scalar."""
        step = _thread.step
        missing = [metric for metric in step.updated if not any(metric is asked for asked in step.asked)]
        found = [one for metric in missing for one in self.named(metric.name, metric.result())]
        return [one for one in found if _is_scalar(one.value)]

    def named(self, name: Any, value: Any, origin: str = "") -> list[Named]:
        """A value under its name, or the values of a dict under their keys, as Keras flattens logs.

        Args:
            origin: Where it comes from, if no metric does.
        """
        if isinstance(value, dict):
            return [one for key, inner in value.items() for one in self.named(key, inner, f"{origin} under {name!r}")]
        source = self.source(value)
        return [Named(name, value, str(source or origin), source)]

    def running(self, metric: keras.Metric) -> Any:
        """The metric's result over the epoch so far."""
        step: _Step | None = getattr(_thread, "step", None)
        if step is None:
            return metric.result()
        with step.alone():
            return step.recorded(metric, metric.result())


class _Copy:
    """A second state of a metric's variable."""

    def __init__(self, original: Any, fresh: np.ndarray):
        self.original = original  # held, so that its identity is not that of another
        self._fresh = fresh
        on_read = {"synchronization": tf.VariableSynchronization.ON_READ, "aggregation": tf.VariableAggregation.SUM}
        self.variable = tf.Variable(fresh, trainable=False, **on_read)

    def reset(self) -> None:
        self.variable.assign(self._fresh)


class _Step:
    """A step that runs in this thread."""

    def __init__(self, owner: BatchMetrics, updated: list[keras.Metric]):
        self._owner = owner
        self.updated = updated
        self.asked: list[keras.Metric] = []
        self.results: dict[int, tuple[Any, Source]] = {}  # by identity, with the value, so that it stays one
        self._touched: set[int] = set()  # the variables whose copies this step changed, by identity
        self._is_within = False
        self._graph = tf.compat.v1.get_default_graph()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within it, metrics do as Keras has them: a metric's own methods may call those of others."""
        self._is_within, before = True, self._is_within
        try:
            yield
        finally:
            self._is_within = before

    def update(self, metric: keras.Metric, update_state: Callable[[], Any]) -> Any:
        if self._is_within:
            return update_state()
        with self.alone():
            outcome = update_state()  # first, because it may make the metric's variables
            self._make_copies(metric)
            before = _python_state(metric)
            with self._on_copies(metric) as scope:
                update_state()
            _check_python_state(before, _python_state(metric))
            for variable in metric.variables:
                self._owner.copies[id(variable)].variable.assign(scope.get_current_value(variable))
        self._touched.update(map(id, metric.variables))
        if not any(metric is known for known in self.updated):
            self.updated.append(metric)
        return outcome

    def result(self, metric: keras.Metric, result: Callable[[], Any]) -> Any:
        if self._is_within:
            return result()
        graph = tf.compat.v1.get_default_graph()
        if graph is not self._graph and type(graph).__name__ == "FuncGraph":  # those of branches are of other classes
            raise ValueError(
                f"`result` of metric '{metric.name}' is called in an inner `tf.function`, whose outputs looplab cannot "
                f"tell apart. Call it in the step itself, or remove the decorator: looplab traces the step."
            )
        self.asked.append(metric)
        of_batch = any(metric is known for known in self.updated) or self._touched & {*map(id, metric.variables)}
        with self.alone():
            if not of_batch:
                return self.recorded(metric, result())
            self._make_copies(metric)
            with self._on_copies(metric):
                return self.recorded(metric, result())

    def reset(self, metric: keras.Metric, reset_state: Callable[[], Any]) -> Any:
        if self._is_within:
            return reset_state()
        with self.alone():
            outcome = reset_state()
            for variable in metric.variables:
                if copy := self._owner.copies.get(id(variable)):
                    copy.reset()
        # What was returned before is no longer a result over the epoch.
        fresh = {*map(id, metric.variables)}
        kept = [known for known in self.results.values() if not fresh & {*map(id, known[1].metric.variables)}]
        self.results = {id(value): (value, source) for value, source in kept}
        return outcome

    def recorded(self, metric: keras.Metric, result: Any, keys: tuple[Any, ...] = ()) -> Any:
        """The result as tensors, each known from now on as this metric's."""
        if isinstance(result, dict):
            return {key: self.recorded(metric, inner, (*keys, key)) for key, inner in result.items()}
        value = tf.convert_to_tensor(result)
        if id(value) in self.results:  # a metric may return the same tensor twice
            value = tf.identity(value)
        self.results[id(value)] = value, Source(metric, keys)
        return value

    def _make_copies(self, metric: keras.Metric) -> None:
        missing = [variable for variable in metric.variables if id(variable) not in self._owner.copies]
        if missing:
            with tf.init_scope():
                with keras.StatelessScope() as scope:
                    metric.reset_state()
                for variable in missing:
                    fresh = scope.get_current_value(variable)
                    fresh = variable.value if fresh is None else fresh  # `reset_state` leaves it alone
                    self._owner.copies[id(variable)] = _Copy(variable, np.array(tf.convert_to_tensor(fresh)))

    @contextlib.contextmanager
    def _on_copies(self, metric: keras.Metric) -> Iterator[keras.StatelessScope]:
        """Within it, the metric's variables stand for their copies."""
        pairs = [(v, tf.convert_to_tensor(self._owner.copies[id(v)].variable)) for v in metric.variables]
        with keras.StatelessScope(pairs) as scope:
            yield scope


def _updating(update_state: Callable[..., Any], metric: keras.Metric, *args: Any, **kwargs: Any) -> Any:
    step: _Step | None = getattr(_thread, "step", None)
    if step is None:
        return update_state(metric, *args, **kwargs)
    return step.update(metric, functools.partial(update_state, metric, *args, **kwargs))


def _resulting(result: Callable[..., Any], metric: keras.Metric) -> Any:
    step: _Step | None = getattr(_thread, "step", None)
    return result(metric) if step is None else step.result(metric, functools.partial(result, metric))


def _resetting(reset_state: Callable[..., Any], metric: keras.Metric) -> Any:
    step: _Step | None = getattr(_thread, "step", None)
    return reset_state(metric) if step is None else step.reset(metric, functools.partial(reset_state, metric))


watching = Hooks(
    keras.Metric,
    {"update_state": _updating, "result": _resulting, "reset_state": _resetting},
    subclasses=True,
)
"""Within it, all metrics give the values of batches in a thread where a step is open."""


def _python_state(metric: keras.Metric) -> dict[tuple[str, str], Any]:
    """What metrics hold beside Keras variables, by metric and attribute, in a form that can be compared."""
    found: dict[tuple[str, str], Any] = {}
    pending, seen = [metric], set()
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        pending += [inner for inner in keras.tree.flatten(list(vars(one).values())) if isinstance(inner, keras.Metric)]
        found |= {(one.name, name): _snapshot(one.name, value) for name, value in vars(one).items()}
    return found


def _check_python_state(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> None:
    for (metric, name), value in after.items():
        if value != before.get((metric, name)):
            raise ValueError(
                f"Metric '{metric}' keeps state in the Python attribute `{name}`, which a graph does not update and a "
                f"checkpoint does not save. Make its state with `self.add_variable` in `__init__`."
            )


def _snapshot(metric: str, value: Any, depth: int = 0) -> Any:
    """A value in a form that can be compared; None of what holds no state of the metric's."""
    if isinstance(value, tf.Variable):
        raise ValueError(f"Metric '{metric}' holds a `tf.Variable`. Make its state with `self.add_variable`.")
    if isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)  # NaN is itself
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    if isinstance(value, (keras.Variable, keras.Metric, keras.Layer)) or depth > 5:
        return None
    if tf.is_tensor(value):
        return id(value)
    if isinstance(value, dict):
        return [(key, _snapshot(metric, inner, depth + 1)) for key, inner in value.items()]
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return [_snapshot(metric, inner, depth + 1) for inner in value]
    if is_users(type(value)) and hasattr(value, "__dict__"):
        return _snapshot(metric, vars(value), depth + 1)
    return None


def _is_scalar(value: Any) -> bool:
    return getattr(value, "shape", None) == () and value.dtype != tf.string


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
