"""Traces the steps, each once for data of one signature, so that all variables are made before anything runs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from looplab import data
from looplab.errors import raise_own
from looplab.graphs import Copies, trace
from looplab.log import Logs
from looplab.loop import Loop, of_one_replica
from looplab.randomness import random_operations
from looplab.tracking import of_each_replica, plain, rate_of
from looplab.warn import warn


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A trace, and what it depends on."""

    key: Any
    element_spec: Any
    call: Any
    depends_on: list[Any]


class Traces(Logs):
    """Steps as graph calls."""

    def __init__(self, *arguments: Any, jit_compile: bool, run_eagerly: bool):
        super().__init__(*arguments)
        self.jit_compile = jit_compile
        self.run_eagerly = run_eagerly
        self._traced: list[_Traced] = []
        self._tracing = threading.RLock()
        self._signatures: dict[str, list[Any]] = {"train": [], "test": [], "predict": []}
        self._stray_variables: _Hidden = _Hidden({"train": [], "test": []})
        self._read_variables: _Hidden = _Hidden([])
        self._stop = _Hidden(tf.Variable(False, trainable=False, name="stop"))

    def _prepared(self, kind: str, element_spec: Any, eagerly: bool) -> Loop:
        """The loop of a kind of step, "train" or "test", for data of this signature; all variables are made then."""
        learns = kind == "train"

        def make() -> Loop:
            of_replica = tf.nest.map_structure(of_one_replica, element_spec)
            step = functools.partial(self._run_step, kind, self._step_function(kind), of_replica)
            metrics, loop = None, None
            kept: list[Any] = []
            strays: list[Any] = []
            # Metrics that a trace makes, and strays, are seen by the next alone. What a guarded update alone changes is
            # not kept, which would cost a copy; that there is more to keep is known once the step was traced.
            while loop is None or metrics != self.metrics or loop.unkept or len(strays) < len(self._strays()):
                metrics, strays = self.metrics, self._strays()
                with self._recording():
                    loop = Loop(
                        step,
                        element_spec,
                        self._image_every[kind],
                        self.strategy,
                        (lambda: self._changeable() if eagerly else [*self._untrained(), *kept]) if learns else list,
                        (lambda: self._guard.to_bring_back(self._changeable())) if learns else list,
                        self._guard.forget,
                        self._stop.value,
                        self.jit_compile,
                        eagerly,
                        read_only=not learns,
                    )
                loop.meaning = self._batch_metrics.meanings.get(kind, loop.meaning)  # also where no step has run yet
                kept.extend(loop.unkept)
                if not eagerly:
                    self._find_strays(kind, loop)
            return loop

        class_weights = self._class_weights if learns else None
        return self._traced_once(kind, (self.jit_compile, eagerly, class_weights), element_spec, make)

    def _predictor(self, element_spec: Any) -> Predictor:
        """The prediction step for data of this signature, traced, so that all variables are made."""
        predict = self._step_function("predict")

        def one_batch(batch):
            return self.strategy.run(functools.partial(self._predict, predict), (batch,))

        def make() -> Predictor:
            if self.run_eagerly:
                return Predictor(one_batch, Copies())
            function = trace(one_batch, element_spec, jit_compile=self.jit_compile)
            return Predictor(function, Copies(function))

        return self._traced_once("predict", (self.jit_compile, self.run_eagerly), element_spec, make)

    def _step_function(self, kind: str) -> Callable[[Any], Any]:
        """The method of a kind of step; of a `tf.function`, the Python function, because looplab traces it itself."""
        name = f"{kind}_step"
        step = inspect.getattr_static(self, name)
        if isinstance(step, tf.types.experimental.PolymorphicFunction):
            return step.python_function if name in vars(self) else types.MethodType(step.python_function, self)
        return getattr(self, name)

    def _traced_once(self, kind: str, options: Any, element_spec: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns: made anew for other options or data, or when what it depends on has changed."""
        with self._tracing:
            depends_on = self._dependencies()
            self._traced = [known for known in self._traced if _same(known.depends_on, depends_on)]
            for known in self._traced:
                if known.key == (kind, options) and known.element_spec == element_spec:
                    return known.call
            self._warn_of_retraces(kind, element_spec)
            is_first = not self._traced
            try:
                call = make()
            except Exception as error:
                if is_first:
                    self._compile()  # how losses and metrics meet outputs is decided anew by the next trace
                raise_own(error)
                raise
            self._traced.append(_Traced((kind, options), element_spec, call, self._dependencies()))
            return call

    def _dependencies(self) -> list[Any]:
        """All that a user may exchange or set between two calls of `fit`, and a trace holds fast."""
        found: list[Any] = [self.model, self._loss]
        for held in self._walk():
            found.append(held.thing)
            if isinstance(held.thing, keras.Layer):
                for layer in held.thing._flatten_layers():
                    found += [layer, layer.trainable]
            elif isinstance(held.thing, (tf.Variable, keras.Variable)):
                found.append(held.thing.trainable)
            elif isinstance(held.thing, keras.Optimizer):
                found.append(rate_of(held.thing))
        own = [value for value in vars(self).values() if not isinstance(value, (list, dict)) or len(value) < 100]
        found += [leaf for leaf in keras.tree.flatten(own) if isinstance(leaf, (keras.Loss, types.FunctionType))]
        return [*found, *self.trainable_variables]

    def _find_strays(self, kind: str, loop: Loop) -> None:
        """Finds what a step uses and the trainer does not hold.

        That of Keras's own seeds, which a bare `keras.random.normal(shape)` draws from, can be saved; that of
        TensorFlow's stateful random operations cannot.
        """
        if self.strategy.num_replicas_in_sync > 1:
            return  # there the graph has other variables, the replicas' own
        optimized = [variable for optimizer in self.optimizers.values() for variable in optimizer.variables]
        held = (*self._held_state(), *optimized, *self._guard.variables, *self._batch_metrics.variables)
        known = {id(plain(variable)) for variable in held}
        strays = self._stray_variables.value[kind] = [v for v in loop.written if id(v) not in known]
        if kind == "train":
            known.update(map(id, strays))
            self._read_variables.value[:] = [variable for variable in loop.used if id(variable) not in known]
        if kind == "train" and self.log_dir is not None and loop.graph is not None:
            found = random_operations(loop.graph)
            if found:
                self._doubts.setdefault(
                    f"`train_step` has random numbers that no checkpoint can bring back ({', '.join(found)}): after a "
                    f"resume they are others. Use `keras.random` with `seed=self.seed_generator`, or a layer's own "
                    f"`keras.random.SeedGenerator`.",
                    False,
                )

    def _strays(self) -> list[tf.Variable]:
        return list({id(v): v for strays in self._stray_variables.value.values() for v in strays}.values())

    def _only_read(self) -> list[tf.Variable]:
        return self._read_variables.value

    def _warn_of_retraces(self, kind: str, element_spec: Any) -> None:
        """Once, at the third trace: a step is traced for the training's data, and it may be for one other."""
        seen = self._signatures[kind]
        if element_spec not in seen:
            seen.append(element_spec)
        if len(seen) == 3:
            changes = data.changes(seen[-2], element_spec)
            warn(
                f"`{kind}_step` is traced for the third time, which takes seconds each time: {changes}. Give all "
                f"batches the same dtypes and shapes, with None where they differ: `drop_remainder=False` leaves "
                f"it, and `padded_batch` brings rows of several lengths to one."
            )

    def _changeable(self) -> list[Any]:
        """Each variable that a training step may change; of several replicas, each one's."""
        whole = [*self._state(), *(v for optimizer in self.optimizers.values() for v in optimizer.variables)]
        parts = [part for variable in whole for part in getattr(plain(variable), "values", [variable])]
        return list({id(plain(part)): part for part in parts}.values())

    def _untrained(self) -> list[Any]:
        """Each variable that no optimizer changes: metrics, seeds, moving means; of several replicas, each one's."""
        trained = {id(variable) for variable in self.trainable_variables}
        whole = (variable for variable in self._state() if id(variable) not in trained)
        return [part for variable in whole for part in of_each_replica(variable).values()]


class Predictor(NamedTuple):
    """The prediction step for data of one signature."""

    call: Callable[[Any], Any]
    copies: Copies


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """Keeps what an attribute leads to from being found as the trainer's own."""

    value: Any
