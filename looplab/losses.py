"""The loss ledger: what the model calls of a step added to the loss, by name."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from looplab.hooks import Hooks

REGULARIZATION = "regularization"

_thread = threading.local()  # .ledger: that of the step which runs in this thread


def _adding(add_loss: Callable[..., None], layer: keras.Layer, loss: Any) -> None:
    add_loss(layer, loss)
    ledger: Ledger | None = getattr(_thread, "ledger", None)
    if ledger is not None:
        for value in tf.nest.flatten(loss):
            # A layer that Keras calls to infer shapes does not keep the loss: nor do we.
            if any(value is kept for kept in layer.losses):
                if tf.compat.v1.get_default_graph() is not ledger.graph:
                    raise ValueError(
                        f"Layer '{layer.path or layer.name}' calls `add_loss` inside a tensor condition or loop, or an "
                        f"inner `tf.function`, from which no tensor comes out. Call it outside."
                    )
                ledger.add(layer.path or layer.name, value)


listening = Hooks(keras.Layer, {"add_loss": _adding})
"""Within it, what Keras layers add goes to the open ledger of the thread that adds it, if there is one."""


class Ledger:
    """Collects every `add_loss` of one step; each thread, which is each replica, has its own.

    Keras forgets what a model added when that model is called again, so that of a step's two calls only the second
    would count. (Running the step as the call of an outer layer makes Keras remember, but then a call without
    `training` inherits it from the call before.) So a ledger listens to `add_loss` itself.
    """

    def __init__(self) -> None:
        self._parts: dict[str, tf.Tensor] = {}
        self._taken: set[str] = set()
        self._penalty: tf.Tensor | None = None
        self.graph: Any = None
        """The graph of the step."""

    @contextlib.contextmanager
    def open(self, variables: Iterable[Any]) -> Iterator[None]:
        """Within it runs a step, which may train `variables`."""
        self._parts, self._taken, self._penalty = {}, set(), _penalty(variables)
        self.graph = tf.compat.v1.get_default_graph()
        before, _thread.ledger = getattr(_thread, "ledger", None), self
        try:
            yield
        finally:
            _thread.ledger = before

    def all(self) -> dict[str, tf.Tensor]:
        """All parts of the step by name, also those that it did not ask for.

        The regularizers are told as they were when the step asked for them, or else before it changed the weights.
        """
        return self._parts if self._penalty is None else {REGULARIZATION: self._penalty, **self._parts}

    def add(self, name: str, value: Any) -> None:
        """Enters a part, as its sum, which is how Keras counts it; the second of one name becomes `<name>_2`."""
        names = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(2)))
        free = next(name for name in names if name not in self._parts)
        self._parts[free] = tf.cast(tf.reduce_sum(value), keras.config.floatx())

    def parts(self, variables: Iterable[Any]) -> dict[str, tf.Tensor]:
        """All parts of this step so far, by name: the path of the layer that added it.

        The regularizers of `variables` are one part, `regularization`, however often they are asked for.
        """
        if REGULARIZATION not in self._parts:  # now, under the tape of whoever asks
            penalty = _penalty(variables)
            if penalty is not None:
                self.add(REGULARIZATION, penalty)
        return dict(self._parts)

    def take(self, variables: Iterable[Any]) -> list[tf.Tensor]:
        """The values of those parts that no earlier `take` of this step returned, in the order of their coming."""
        fresh = {name: value for name, value in self.parts(variables).items() if name not in self._taken}
        self._taken.update(fresh)
        return list(fresh.values())


def _penalty(variables: Iterable[Any]) -> tf.Tensor | None:
    """The sum of what the variables' regularizers give."""
    penalties = [tf.reduce_sum(v.regularizer(v)) for v in variables if getattr(v, "regularizer", None) is not None]
    return tf.cast(tf.add_n(penalties), keras.config.floatx()) if penalties else None
