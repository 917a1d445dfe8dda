"""Traces the steps of a trainer: each once per signature of the data, and again when what it depends on changes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from looplab import strategies
from looplab.compat import all_layers, learning_rate, of_all_replicas, of_one_replica
from looplab.data.arrays import changes
from looplab.data.randomness import random_operations
from looplab.loop.compiled import Compiled
from looplab.loop.costs import Costs
from looplab.loop.errors import raise_own
from looplab.loop.predictor import Predictor
from looplab.loop.step import StepRunner
from looplab.variables import plain
from looplab.walk import OURS
from looplab.warn import warn

_MOST_OUTDATED = 2  # traces that are kept in case that what they depend on changes back


@dataclasses.dataclass(frozen=True, eq=False)
class _Trace:
    """A compiled step, and what it depends on."""

    key: Any
    element_spec: Any
    compiled: Any
    depends_on: list[Any]


class Tracer:
    """Compiles the steps of a trainer.

    Args:
        runner: Runs the steps.
        is_alone: Whether there are no other workers.
    """

    def __init__(self, runner: StepRunner, is_alone: bool = True):
        self.stop = tf.Variable(False, trainable=False, name="stop")
        """Once it is true, the running step is the last one; with several workers, the running graph call."""
        self.costs = Costs()  # of the last call of `fit`
        self._runner = runner
        self._is_alone = is_alone
        self._traces: list[_Trace] = []
        self._outdated: list[_Trace] = []
        self._lock = threading.RLock()
        self._signatures: dict[str, list[Any]] = {"train": [], "test": [], "predict": []}
        self._meanings: dict[str, Any] = {}  # by kind, what the scalars of the last trace are
        self._recent: dict[str, _Trace] = {}  # by kind, the step that ran last on a single batch

    @property
    def is_built(self) -> bool:
        """Whether the training step is traced, so that all variables exist."""
        return any(trace.key[0] == "train" for trace in self._traces)

    def recent(self, kind: str, element_spec: Any) -> Any:
        """As `compiled`, in less time if nothing that shows without a search has changed since."""
        key = kind, self._runner.class_weights, element_spec
        with self._lock:
            seen, found = self._seen(), self._recent.get(kind)
            if found is None or found.key != key or not _same(found.depends_on, seen):
                compiled = self.compiled(kind, element_spec)
                found = self._recent[kind] = _Trace(key, element_spec, compiled, self._seen())
            return found.compiled

    def _seen(self) -> list[Any]:
        """What shows without a search that a trace may be outdated."""
        trainer, objective = self._runner.trainer, self._runner.objective
        return [trainer.run_eagerly, trainer.jit_compile, *objective.marks, *self._runner.variables.marks()]

    def compiled(self, kind: str, element_spec: Any, eagerly: bool | None = None) -> Any:
        """The step for data of this signature; all variables that it needs exist afterwards.

        Args:
            kind: "train" or "test", which returns a `Compiled`, or "predict", which returns a `Predictor`.
            element_spec: The signature of a batch.
            eagerly: Whether Python runs the step line by line; by default the trainer's `run_eagerly`.
        """
        trainer = self._runner.trainer
        if self._runner.objective.follow():
            trainer.optimizer = self._runner.objective.optimizer
        eagerly = trainer.run_eagerly if eagerly is None else eagerly
        class_weights = self._runner.class_weights if kind == "train" else None
        key = kind, trainer.jit_compile, eagerly, class_weights
        with self._lock:
            depends_on = self._dependencies()
            all_traces = [*self._traces, *self._outdated]
            self._traces = [trace for trace in all_traces if _same(trace.depends_on, depends_on)]
            # A layer may be frozen in every other step.
            self._outdated = [trace for trace in all_traces if trace not in self._traces][:_MOST_OUTDATED]
            for trace in self._traces:
                if trace.key == key and trace.element_spec == element_spec:
                    return trace.compiled
            found, jit_compile = self._runner.variables.walk(), bool(trainer.jit_compile)
            strategies.check(self._runner.strategy, found, kind == "train", jit_compile)
            self._runner.create_seeds()
            self._warn_of_retraces(kind, element_spec)
            is_first = not self._traces
            try:
                make = self._predictor if kind == "predict" else functools.partial(self._loop, kind)
                with self.costs.of("tracing"):
                    compiled = make(element_spec, eagerly)
            except Exception as error:
                if is_first:  # the next trace matches losses and metrics with outputs anew
                    self._runner.objective.forget()
                raise_own(error)
                raise
            self._traces.append(_Trace(key, element_spec, compiled, self._dependencies()))
            return compiled

    def _loop(self, kind: str, element_spec: Any, eagerly: bool) -> Compiled:
        """The compiled training or test step."""
        runner, variables, guard = self._runner, self._runner.variables, self._runner.guard
        trainer = runner.trainer
        trains = kind == "train"
        # Eager batches do not say which dimensions are fixed.
        signature = tf.nest.map_structure(of_one_replica, element_spec) if eagerly else None
        step = functools.partial(runner.run, kind, self._step_function(kind), signature)
        loop = Compiled(
            step,
            element_spec,
            runner.image_every[kind],
            runner.strategy,
            self.stop if self._is_alone else None,
            read_only=not trains,
            jit_compile=trainer.jit_compile,
            run_eagerly=eagerly,
        )
        if not eagerly:
            self._meanings[kind] = loop.meaning
            self._find_strays(kind, loop)
        loop.codes = guard.variables
        if trains and loop.graph is None:
            loop.restored = variables.changeable
        elif trains:
            found = guard.to_restore(variables.changeable(), loop.graph)
            loop.restored = lambda: found
        loop.meaning = self._meanings.get(kind, loop.meaning)  # in eager mode, that of the trace that a resume makes
        return loop

    def _predictor(self, element_spec: Any, eagerly: bool) -> Predictor:
        """The compiled prediction step."""
        step = functools.partial(self._runner.predict, self._step_function("predict"))
        return Predictor(step, element_spec, self._runner.strategy, self._runner.trainer.jit_compile, eagerly)

    def _step_function(self, kind: str) -> Callable[[Any], Any]:
        """The method of a kind of step; of a `tf.function` the Python function, because looplab traces it itself."""
        trainer, name = self._runner.trainer, f"{kind}_step"
        step = inspect.getattr_static(trainer, name)
        if isinstance(step, tf.types.experimental.PolymorphicFunction):
            is_attribute = name in vars(trainer)
            return step.python_function if is_attribute else types.MethodType(step.python_function, trainer)
        return getattr(trainer, name)

    def _dependencies(self) -> list[Any]:
        """Everything that a user may replace or set between two calls of `fit`, and that a trace cannot follow."""
        runner = self._runner
        found: list[Any] = [runner.trainer.model, runner.objective.loss, runner.objective.mean]
        for held in runner.variables.walk():
            found.append(held.thing)
            if isinstance(held.thing, keras.Layer):
                for layer in all_layers(held.thing):
                    found += [layer, layer.trainable]
            elif isinstance(held.thing, (tf.Variable, keras.Variable)):
                found.append(held.thing.trainable)
            elif isinstance(held.thing, keras.Optimizer):
                found.append(learning_rate(held.thing))
        values = (value for name, value in vars(runner.trainer).items() if name != OURS)
        own = [value for value in values if not isinstance(value, (list, dict)) or len(value) < 100]
        found += [leaf for leaf in keras.tree.flatten(own) if isinstance(leaf, (keras.Loss, types.FunctionType))]
        return [*found, *runner.trainer.trainable_variables]

    def _find_strays(self, kind: str, loop: Compiled) -> None:
        """Finds what a step changes and nothing leads to.

        Those of Keras's own seeds, which a bare `keras.random.normal(shape)` draws from, can be saved; the state of
        TensorFlow's random operations cannot.
        """
        runner = self._runner
        own = [*runner.guard.variables, *runner.batch_metrics.variables]
        # With several replicas, the graph has the variables of each.
        written, used, own = ([plain(of_all_replicas(v)) for v in found] for found in (loop.written, loop.used, own))
        runner.variables.find_strays(kind, written, used, but=own)
        if kind == "train" and runner.trainer.log_dir is not None and loop.graph is not None:
            found = random_operations(loop.graph)
            if found:
                runner.warnings.add(
                    f"`train_step` draws random numbers that no checkpoint can restore ({', '.join(found)}): a resumed "
                    f"run draws others. Use `keras.random` with `seed=self.seed_generator`, or a layer's own "
                    f"`keras.random.SeedGenerator`."
                )

    def _warn_of_retraces(self, kind: str, element_spec: Any) -> None:
        """Warns once, at the third trace: one is for training, and one may be for other data."""
        seen = self._signatures[kind]
        if element_spec not in seen:
            seen.append(element_spec)
        if len(seen) == 3:
            warn(
                f"`{kind}_step` is traced for the third time, which takes seconds each time: "
                f"{changes(seen[-2], element_spec)}. Give all batches the same dtypes and shapes, with None for "
                f"dimensions that vary: `drop_remainder=False` leaves None, and `padded_batch` pads rows to one "
                f"length."
            )


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
