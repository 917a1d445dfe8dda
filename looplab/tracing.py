"""Traces the steps, each once for data of one signature, so that all variables are made before anything runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from looplab import data
from looplab.log import Logs
from looplab.loop import Loop
from looplab.randomness import random_operations
from looplab.tracking import is_trainable, of_each_replica
from looplab.warn import warn


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A trace, and what it holds fast."""

    key: Any
    element_spec: Any
    call: Any
    trained: list[Any]


class Traces(Logs):
    """Steps as graph calls."""

    def __init__(self, *arguments: Any, jit_compile: bool, run_eagerly: bool):
        super().__init__(*arguments)
        self.jit_compile = jit_compile
        self.run_eagerly = run_eagerly
        self._traced: list[_Traced] = []
        self._signatures: dict[str, list[Any]] = {"train": [], "test": [], "predict": []}
        self._stray_variables: _Hidden = _Hidden({"train": [], "test": []})
        self._stop = _Hidden(tf.Variable(False, trainable=False, name="stop"))

    def _prepared(self, kind: str, element_spec: Any, eagerly: bool) -> Loop:
        """The loop of a kind of step, "train" or "test", for data of this signature; all variables are made then."""

        def make() -> Loop:
            step = functools.partial(self._run_step, kind, {"train": self.train_step, "test": self.test_step}[kind])
            learns = kind == "train"
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
                    )
                kept.extend(loop.unkept)
                if not eagerly:
                    self._find_strays(kind, loop)
            return loop

        return self._traced_once(kind, (self.jit_compile, eagerly), element_spec, make)

    def _predictor(self, element_spec: Any) -> Callable[[Any], Any]:
        """The prediction step for data of this signature, traced, so that all variables are made."""

        def one_batch(batch):
            return self.strategy.run(self._predict, (batch,))

        def make() -> Callable[[Any], Any]:
            if self.run_eagerly:
                return one_batch
            return tf.function(one_batch, jit_compile=self.jit_compile or None).get_concrete_function(element_spec)

        return self._traced_once("predict", (self.jit_compile, self.run_eagerly), element_spec, make)

    def _traced_once(self, kind: str, options: Any, element_spec: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns: made anew for other options or data, or when what it holds fast was exchanged."""
        trained = [*map(id, self._trained())]
        self._traced = [known for known in self._traced if [*map(id, known.trained)] == trained]
        for known in self._traced:
            if known.key == (kind, options) and known.element_spec == element_spec:
                return known.call
        self._warn_of_retraces(kind, element_spec)
        call = make()
        self._traced.append(_Traced((kind, options), element_spec, call, self._trained()))
        return call

    def _find_strays(self, kind: str, loop: Loop) -> None:
        """Finds what a step changes and the trainer does not hold.

        That of Keras's own seeds, which a bare `keras.random.normal(shape)` draws from, can be saved; that of
        TensorFlow's stateful random operations cannot.
        """
        if self.strategy.num_replicas_in_sync > 1:
            return  # there the graph has other variables, the replicas' own
        optimized = [variable for optimizer in self.optimizers.values() for variable in optimizer.variables]
        held = (*self._held_state(), *optimized, *self._guard.variables, *self._batch_metrics.variables)
        known = {id(_value(variable)) for variable in held}
        self._stray_variables.value[kind] = [
            variable for variable in loop.variables if not is_trainable(variable) and id(variable) not in known
        ]
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

    def _trained(self) -> list[Any]:
        """What a trace holds fast, and a user may exchange between two calls of `fit`."""
        return [*self.trainable_variables, *self.optimizers.values()]

    def _changeable(self) -> list[Any]:
        """Each variable that a training step may change; of several replicas, each one's."""
        whole = [*self._state(), *(v for optimizer in self.optimizers.values() for v in optimizer.variables)]
        parts = [part for variable in whole for part in getattr(_value(variable), "values", [variable])]
        return list({id(_value(part)): part for part in parts}.values())

    def _untrained(self) -> list[Any]:
        """Each variable that no optimizer changes: metrics, seeds, moving means; of several replicas, each one's."""
        trained = {id(variable) for variable in self.trainable_variables}
        whole = (variable for variable in self._state() if id(variable) not in trained)
        return [part for variable in whole for part in of_each_replica(variable).values()]


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """Keeps what an attribute leads to from being found as the trainer's own."""

    value: Any


def _value(variable: Any) -> tf.Variable:
    """The TensorFlow variable that a Keras variable is."""
    return variable.value if isinstance(variable, keras.Variable) else variable
