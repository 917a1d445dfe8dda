"""Keras metrics in a step: the value of one batch alone, next to the running value."""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from looplab.compat import is_function_graph
from looplab.loop.graphs import creating_ahead
from looplab.walk import is_users

_MANY = 1000  # entries of a result that are no longer shown one by one


class Source(NamedTuple):
    """Where a scalar comes from: a metric, and the keys or the place in its result that lead to the scalar."""

    metric: keras.Metric
    keys: tuple[Any, ...] = ()
    entry: tuple[int, ...] = ()
    """Of a result that is not a scalar, the place of the value in it."""

    def __str__(self) -> str:
        if self.keys and self.metric.name == "compile_metrics":  # Keras's own, which holds those of `metrics`
            return f"{'/'.join(map(str, self.keys))!r} of `metrics`"
        entry = f"entry {'/'.join(map(str, self.keys))!r} of " if self.keys else ""
        return f"{entry}the result of metric '{self.metric.name}'"

    def of(self, result: Any) -> Any:
        """The value inside the metric's result."""
        return functools.reduce(lambda inner, key: inner[key], (*self.keys, *self.entry), result)


class Named(NamedTuple):
    """A value of a step."""

    name: Any
    value: Any
    origin: str
    """Where it comes from, for errors."""
    source: Source | None = None
    """The metric that it is the result of."""


class BatchMetrics:
    """Lets metrics return the value of the current batch alone while a step runs.

    Each `update_state` runs twice: on the metric's variables, which hold the running state, and on copies of them,
    which are reset when the step ends. `result` reads the copies. So a step written as in Keras, which returns
    `metric.result()`, returns this batch's value, while the metric itself has the value of the epoch so far.
    """

    def __init__(self) -> None:
        self.updated: dict[str, list[keras.Metric]] = {"train": [], "test": []}
        """By kind of step, the metrics that it updates, in all traces: an inner `tf.function` is traced only once."""
        self._copies: dict[int, _Copy] = {}  # by the variable's identity

    @property
    def variables(self) -> list[tf.Variable]:
        """The copies."""
        return [copy.variable for copy in self._copies.values()]

    def reset(self, variables: Iterable[Any] | None = None) -> None:
        """Resets the copies of these variables, or all copies when a step ends or fails."""
        wanted = self._copies if variables is None else {id(variable) for variable in variables}
        for key, copy in self._copies.items():
            if key in wanted:
                copy.variable.assign(copy.initial)

    def step(self, kind: str, held: Iterable[keras.Metric]) -> StepMetrics:
        """The metrics of a new step of this kind, "train" or "test", of a trainer that holds these metrics."""
        kept = {id(metric) for metric in held}
        self.updated[kind] = [metric for metric in self.updated[kind] if id(metric) in kept]
        return StepMetrics(self, self.updated[kind])

    def copies_of(self, metric: keras.Metric) -> list[tuple[Any, tf.Variable]]:
        """Each variable of a metric with its copy, which is created if needed."""
        missing = [variable for variable in metric.variables if id(variable) not in self._copies]
        if missing:
            with tf.init_scope(), creating_ahead():
                with keras.StatelessScope() as scope:
                    metric.reset_state()
                for variable in missing:
                    initial = scope.get_current_value(variable)
                    initial = variable.value if initial is None else initial  # `reset_state` does not assign it
                    self._copies[id(variable)] = _Copy(variable, np.array(tf.convert_to_tensor(initial)))
        return [(variable, self._copies[id(variable)].variable) for variable in metric.variables]


class _Copy:
    """A second state of a metric's variable."""

    def __init__(self, original: Any, initial: np.ndarray):
        self.original = original  # keeps it alive, so that no other variable gets its identity
        self.initial = initial
        on_read = {"synchronization": tf.VariableSynchronization.ON_READ, "aggregation": tf.VariableAggregation.SUM}
        self.variable = tf.Variable(initial, trainable=False, **on_read)


class StepMetrics:
    """What one step does with metrics."""

    def __init__(self, batch_metrics: BatchMetrics, updated: list[keras.Metric]):
        self._batch_metrics = batch_metrics
        self._updated = updated
        self._asked: list[keras.Metric] = []  # whose result the step asked for
        self._results: dict[int, tuple[Any, Source]] = {}  # by the value's identity; the value is kept alive
        self._touched: set[int] = set()  # the identities of the variables whose copies this step changes
        self._is_inside = False  # whether a metric's own method runs
        self._graph = tf.compat.v1.get_default_graph()

    @contextlib.contextmanager
    def passive(self) -> Iterator[None]:
        """Inside it, metrics behave as in Keras, because a metric's own methods may call those of others."""
        self._is_inside, before = True, self._is_inside
        try:
            yield
        finally:
            self._is_inside = before

    def update(self, metric: keras.Metric, update_state: Callable[[], Any]) -> Any:
        """Updates a metric's running state and its copies.

        Raises:
            ValueError: The metric keeps state in Python attributes or in a `tf.Variable`.
        """
        if self._is_inside:
            return update_state()
        with self.passive():
            outcome = update_state()  # first, because it may create the metric's variables
            pairs = self._batch_metrics.copies_of(metric)
            before = _python_state(metric)
            with _on_copies(pairs) as scope:
                update_state()
            _check_python_state(before, _python_state(metric))
            for variable, copy in pairs:
                copy.assign(scope.get_current_value(variable))
        self._touched.update(map(id, metric.variables))
        if not any(metric is known for known in self._updated):
            self._updated.append(metric)
        return outcome

    def result(self, metric: keras.Metric, result: Callable[[], Any]) -> Any:
        """The result of a metric for this batch; of one that no step updates, its own.

        Raises:
            ValueError: It is called in an inner `tf.function`.
        """
        if self._is_inside:
            return result()
        graph = tf.compat.v1.get_default_graph()
        if graph is not self._graph and is_function_graph(graph):
            raise ValueError(
                f"`result` of metric '{metric.name}' is called in an inner `tf.function`, whose outputs looplab cannot "
                f"distinguish. Call it in the step itself, or remove the decorator: looplab traces the step."
            )
        self._asked.append(metric)
        of_batch = any(metric is known for known in self._updated) or self._touched & {*map(id, metric.variables)}
        with self.passive():
            if not of_batch:
                return self._recorded(metric, result())
            with _on_copies(self._batch_metrics.copies_of(metric)):
                return self._recorded(metric, result())

    def reset(self, metric: keras.Metric, reset_state: Callable[[], Any]) -> Any:
        """Resets a metric's running state and its copies."""
        if self._is_inside:
            return reset_state()
        with self.passive():
            outcome = reset_state()
            self._batch_metrics.reset(metric.variables)
        # What was returned before is no longer a result over the epoch.
        fresh = {*map(id, metric.variables)}
        kept = [known for known in self._results.values() if not fresh & {*map(id, known[1].metric.variables)}]
        self._results = {id(value): (value, source) for value, source in kept}
        return outcome

    def running(self, metric: keras.Metric) -> Any:
        """The metric's result over the epoch so far."""
        with self.passive():
            return self._recorded(metric, metric.result())

    def named(self, name: Any, value: Any, origin: str = "") -> list[Named]:
        """A value under its name; of a dict, its values under their keys, as Keras flattens logs.

        The result of a metric that is not a scalar has a value for each entry, such as `f1_score/0`.

        Args:
            origin: Where it comes from, if it is no metric's result.
        """
        if isinstance(value, dict):
            return [one for key, inner in value.items() for one in self.named(key, inner, f"{origin} under {name!r}")]
        _, source = self._results.get(id(value), (None, None))
        if source is None or not value.shape.rank or (value.shape.num_elements() or _MANY) >= _MANY:
            return [Named(name, value, str(source or origin), source)]
        found = []
        for entry in np.ndindex(*value.shape):
            one, path = value[entry], "/".join(map(str, entry))
            self._results[id(one)] = one, source._replace(entry=entry)
            found.append(Named(f"{name}/{path}", one, str(source), source._replace(entry=entry)))
        return found

    def is_updated(self, value: Any) -> bool:
        """Whether a value is no metric's result, or that of a metric that the step updates."""
        _, source = self._results.get(id(value), (None, None))
        return source is None or any(source.metric is metric for metric in self._updated)

    def not_returned(self) -> list[Named]:
        """The scalar results of the metrics that the step updated and did not ask for, such as those of layers."""
        missing = [metric for metric in self._updated if not any(metric is asked for asked in self._asked)]
        found = [one for metric in missing for one in self.named(metric.name, metric.result())]
        return [one for one in found if _is_scalar(one.value)]

    def _recorded(self, metric: keras.Metric, result: Any, keys: tuple[Any, ...] = ()) -> Any:
        """The result as tensors, each of which is recognized as this metric's from now on."""
        if isinstance(result, dict):
            return {key: self._recorded(metric, inner, (*keys, key)) for key, inner in result.items()}
        value = tf.convert_to_tensor(result)
        if id(value) in self._results:  # a metric may return the same tensor twice
            value = tf.identity(value)
        self._results[id(value)] = value, Source(metric, keys)
        return value


@contextlib.contextmanager
def _on_copies(pairs: list[tuple[Any, tf.Variable]]) -> Iterator[keras.StatelessScope]:
    """Inside it, the variables of a metric have the values of their copies."""
    with keras.StatelessScope([(variable, tf.convert_to_tensor(copy)) for variable, copy in pairs]) as scope:
        yield scope


def _python_state(metric: keras.Metric) -> dict[tuple[str, str], Any]:
    """What a metric, and the metrics inside it, hold besides Keras variables, in a comparable form."""
    found: dict[tuple[str, str], Any] = {}
    pending, seen = [metric], set()
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        pending += [inner for inner in keras.tree.flatten(list(vars(one).values())) if isinstance(inner, keras.Metric)]
        found |= {(one.name, name): _comparable(one.name, value) for name, value in vars(one).items()}
    return found


def _check_python_state(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> None:
    for (metric, name), value in after.items():
        if value != before.get((metric, name)):
            raise ValueError(
                f"Metric '{metric}' keeps state in the Python attribute `{name}`, which a graph does not update and a "
                f"checkpoint does not save. Create its state with `self.add_variable` in `__init__`."
            )


def _comparable(metric: str, value: Any, depth: int = 0) -> Any:
    """A value in a form that can be compared; None if it holds no state of the metric."""
    if isinstance(value, tf.Variable):
        raise ValueError(f"Metric '{metric}' holds a `tf.Variable`. Create its state with `self.add_variable`.")
    if isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)  # NaN equals itself
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    if isinstance(value, (keras.Variable, keras.Metric, keras.Layer)) or depth > 5:
        return None
    if tf.is_tensor(value):
        return id(value)
    if isinstance(value, dict):
        return [(key, _comparable(metric, inner, depth + 1)) for key, inner in value.items()]
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return [_comparable(metric, inner, depth + 1) for inner in value]
    if is_users(type(value)) and hasattr(value, "__dict__"):
        return _comparable(metric, vars(value), depth + 1)
    return None


def _is_scalar(value: Any) -> bool:
    return getattr(value, "shape", None) == () and value.dtype != tf.string
