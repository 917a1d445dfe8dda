"""The loss ledger: what a step's model calls add to the loss, by name."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

REGULARIZATION = "regularization"


class Ledger:
    """Records every `add_loss` call of one step.

    Keras forgets what a model added when that model is called again: of a step's two calls, only the second would
    count. (If the step runs as the call of an outer layer, Keras remembers, but then a call without `training` inherits
    it from the call before.) So the ledger records each `add_loss` call itself.
    """

    def __init__(self) -> None:
        self._parts: dict[str, tf.Tensor] = {}
        self._taken: set[str] = set()
        self._penalty: tf.Tensor | None = None
        self._graph = tf.compat.v1.get_default_graph()

    def start(self, variables: Iterable[Any]) -> None:
        """Computes the regularization of the weights before the step changes them."""
        self._penalty = _penalty(variables)

    def record(self, layer: keras.Layer, loss: Any) -> None:
        """Adds what a layer passed to `add_loss`.

        Raises:
            ValueError: The layer called it inside a branch, a loop or an inner `tf.function`.
        """
        name = layer.path or layer.name
        for value in tf.nest.flatten(loss):
            if not any(value is kept for kept in layer.losses):  # Keras called the layer only to infer shapes
                continue
            if tf.compat.v1.get_default_graph() is not self._graph:
                raise ValueError(
                    f"Layer '{name}' calls `add_loss` inside a tensor condition or loop, or an inner `tf.function`, "
                    f"from which no tensor comes out. Call it outside."
                )
            self.add(name, value)

    def add(self, name: str, value: Any) -> None:
        """Adds a part, as its sum, which is how Keras counts it; the second with one name becomes `<name>_2`."""
        names = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(2)))
        free = next(name for name in names if name not in self._parts)
        self._parts[free] = tf.cast(tf.reduce_sum(value), keras.config.floatx())

    def parts(self, variables: Iterable[Any]) -> dict[str, tf.Tensor]:
        """All parts so far, by name; the regularizers of `variables` are one part, however often they are asked for."""
        if REGULARIZATION not in self._parts:  # computed now, under the caller's tape
            penalty = _penalty(variables)
            if penalty is not None:
                self.add(REGULARIZATION, penalty)
        return dict(self._parts)

    def take(self, variables: Iterable[Any] = ()) -> list[tf.Tensor]:
        """The values of the parts that no earlier `take` returned, in the order in which they were added."""
        fresh = {name: value for name, value in self.parts(variables).items() if name not in self._taken}
        self._taken.update(fresh)
        return list(fresh.values())

    def all(self) -> dict[str, tf.Tensor]:
        """All parts of the step by name, also those that it did not ask for.

        The regularization is that of when the step asked for it, otherwise that of before it changed the weights.
        """
        return self._parts if self._penalty is None else {REGULARIZATION: self._penalty, **self._parts}


def _penalty(variables: Iterable[Any]) -> tf.Tensor | None:
    """The sum of the variables' regularizers."""
    penalties = [tf.reduce_sum(v.regularizer(v)) for v in variables if getattr(v, "regularizer", None) is not None]
    return tf.cast(tf.add_n(penalties), keras.config.floatx()) if penalties else None
