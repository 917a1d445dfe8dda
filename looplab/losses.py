"""The loss ledger: what the model calls of a step added to the loss, by name."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

REGULARIZATION = "regularization"


class Ledger(threading.local):
    """Collects every `add_loss` of one step; each thread, which is each replica, has its own.

    Keras forgets what a model added when that model is called again, so that of a step's two calls only the second
    would count. (Running the step as the call of an outer layer makes Keras remember, but then a call without
    `training` inherits it from the call before.) So the ledger listens to `add_loss` itself.
    """

    def __init__(self) -> None:
        self._parts: dict[str, tf.Tensor] | None = None  # None: no step runs in this thread
        self._taken: set[str] = set()
        self._penalty: tf.Tensor | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, what any Keras layer adds in a thread where a step was begun is collected."""
        add_loss = keras.Layer.add_loss

        def listened(layer: keras.Layer, loss: Any) -> None:
            add_loss(layer, loss)
            for value in [] if self._parts is None else tf.nest.flatten(loss):
                # A layer that Keras calls to infer shapes does not keep the loss: nor do we.
                if any(value is kept for kept in layer.losses):
                    self.add(layer.path or layer.name, value)

        keras.Layer.add_loss = listened
        try:
            yield
        finally:
            keras.Layer.add_loss = add_loss

    def begin(self, variables: Iterable[Any]) -> None:
        """Opens the ledger of a step that may train `variables` in this thread."""
        self._parts, self._taken = {}, set()
        self._penalty = _penalty(variables)

    def end(self) -> dict[str, tf.Tensor]:
        """Closes it, and returns all parts by name, also those that the step itself did not ask for.

        The regularizers are told as they were when the step asked for them, or else before it changed the weights.
        """
        parts, self._parts = self._parts or {}, None
        if self._penalty is not None:
            parts.setdefault(REGULARIZATION, self._penalty)
        return parts

    def add(self, name: str, value: Any) -> None:
        """Enters a part, as its sum, which is how Keras counts it; the second of one name becomes `<name>_2`."""
        if self._parts is not None:
            names = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(2)))
            free = next(name for name in names if name not in self._parts)
            self._parts[free] = tf.cast(tf.reduce_sum(value), keras.config.floatx())

    def parts(self, variables: Iterable[Any]) -> dict[str, tf.Tensor]:
        """All parts of this step so far, by name: the path of the layer that added it.

        The regularizers of `variables` are one part, `regularization`, however often they are asked for.
        """
        if self._parts is None:
            return {}
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
