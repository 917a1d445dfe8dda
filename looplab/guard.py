"""What goes wrong while a step runs: found in the graph, before an update is applied, and told in words afterwards."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab.graphs import written
from looplab.tracking import path_of

_LARGE = 2**14  # numbers
NO_ROWS = "the batch has no rows: filter empty ones out"
_ADVICE = "Often a smaller learning rate, or `global_clipnorm` of the optimizer, helps"


class Fault(Exception):  # noqa: N818  (`error` makes an error of it)
    """A step was wrong, and is the last.

    Args:
        code, message: As the guard tells them.
        kind: "train" or "test".
        batch_number: From 1, in its epoch.
        batch: Its parts by name, as arrays or structures of them, or None.
        losses: The step's loss and its parts, by name.
    """

    def __init__(
        self, code: int, message: str, kind: str, batch_number: int, batch: dict[str, Any], losses: dict[str, float]
    ):
        super().__init__(message)
        self.code, self.message, self.kind, self.batch_number = code, message, kind, batch_number
        self.batch, self.losses = _arrays(batch), losses

    def error(self, step: int, epoch: int, log_dir: Path | None) -> Exception:
        """What to raise; the batch is written to `log_dir/nonfinite`."""
        where = f"step {step} (batch {self.batch_number} of epoch {epoch})"
        if self.kind != "train":
            where = f"batch {self.batch_number} of an evaluation"
        told = []
        if self.message != NO_ROWS:
            told = [f"{name} = {value:.6g}" for name, value in self.losses.items() if not math.isfinite(value)]
        told += [text for name, array in self.batch.items() if (text := _described(name, array))]
        text = f"{self.message}, at {where}. {'; '.join(told)}." if told else f"{self.message}, at {where}."
        text = text[0].upper() + text[1:]
        if self.code < 0:
            return ValueError(f"{text} Nothing was learned from that batch.")
        advice = "Remove or replace such rows" if "itself is not finite" in text else _ADVICE
        advice += "; `trainer.skip_nonfinite = n` passes over up to n such steps in a row."
        if log_dir is None:
            return FloatingPointError(f"{text} The update was not made. {advice}")
        file = log_dir / "nonfinite" / f"step-{step}.npz"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, **self.batch)  # type: ignore[arg-type]
        except OSError as error:
            reason = f"The batch could not be written to {file}: {error.strerror}."
            return FloatingPointError(f"{text} The update was not made. {reason} {advice}")
        return FloatingPointError(
            f"{text} The update was not made. The batch is in {file}; a trainer with `run_eagerly=True` goes through "
            f"it again, line by line, with `fit(..., resume=True)`. {advice}"
        )


class Guard:
    """Keeps the first thing that a step finds wrong, as one number that the graph can return.

    It is kept in a variable, because a step may find it in a branch or a loop, from which no tensor comes out; each
    replica has its own. Codes are positive where nothing was updated, so that the step may be skipped, if its numbers
    were not finite; negative for what must end the training. All that costs time happens only where something is wrong.
    """

    def __init__(self) -> None:
        on_read = {"synchronization": tf.VariableSynchronization.ON_READ, "aggregation": tf.VariableAggregation.SUM}
        self._fault = tf.Variable(0, trainable=False, name="fault", **on_read)
        self._messages = [""]  # by code
        self._reported: dict[int, bool] = {}  # by thread, which is a replica: whether the traced step reports anything
        # Of the traced step: the operations of each `apply`, which change nothing where it finds a fault.
        self._guarded: list[list[tf.Operation]] = []
        self._is_last = True  # whether nothing was reported after the last of them

    def fault(self) -> tf.Tensor:
        """int32: 0, or the code of the first fault of the running step on this replica."""
        return tf.convert_to_tensor(self._fault)

    @property
    def variables(self) -> list[tf.Variable]:
        """Its own."""
        return [self._fault]

    def open(self) -> None:
        """A step begins."""
        self._reported[threading.get_ident()] = False
        self._guarded, self._is_last = [], True

    def forget(self) -> None:
        """What was wrong is dealt with: in the next step nothing is, so far."""
        self._fault.assign(0)

    def report(self, wrong: tf.Tensor, messages: Sequence[str], skippable: bool = False) -> None:
        """Tells whether something is wrong, by a vector of bools with a message for each."""
        self._reported[threading.get_ident()] = True
        self._is_last = not self._guarded
        codes = [self._code(message) * (1 if skippable and message != NO_ROWS else -1) for message in messages]

        def note() -> None:
            before = self.fault()
            first = tf.gather(tf.constant(codes), tf.argmax(wrong))
            self._fault.assign(tf.where(tf.equal(before, 0), first, before))

        tf.cond(tf.reduce_any(wrong), note, lambda: None)

    def message(self, code: int) -> str:
        """What a code means."""
        return self._messages[abs(code)]

    def report_applied(self, losses: dict[str, tf.Tensor], variables: Sequence[Any]) -> None:
        """Looks at the losses of a step that changed these variables by itself, and at what they came to."""
        messages = [f"`{name}` is not finite" for name in losses]
        messages += [f"{path_of(variable)} is not finite after the step changed it" for variable in variables]
        values = [*losses.values(), *(tf.nn.l2_loss(tf.convert_to_tensor(variable)) for variable in variables)]
        if values:
            finite = tf.math.is_finite(tf.stack([tf.cast(value, tf.float32) for value in values]))
            self.report(~finite, messages, skippable=True)

    def changed_otherwise(self, variables: Sequence[Any]) -> list[Any]:
        """Those that the traced step may change, and not by `apply` alone; where Python goes through it, all."""
        return self._written(variables, but=self._guarded)

    def to_bring_back(self, variables: Sequence[Any]) -> list[Any]:
        """Those that the traced step may have changed where it finds a fault; where Python goes through it, all."""
        decides = self._is_last and len(self._guarded) == 1
        return self._written(variables, but=self._guarded if decides else ())

    @staticmethod
    def _written(variables: Sequence[Any], but: Sequence[list[tf.Operation]]) -> list[Any]:
        if tf.executing_eagerly():
            return list(variables)
        graph = tf.compat.v1.get_default_graph()
        handles = written(set(graph.get_operations()).difference(*but))
        plain = [variable.value if isinstance(variable, keras.Variable) else variable for variable in variables]
        return [v for v, inner in zip(variables, plain, strict=True) if id(graph.capture(inner.handle)) in handles]

    def apply(
        self,
        optimizer: keras.Optimizer,
        gradients: Sequence[Any],
        variables: Sequence[Any],
        loss: tf.Tensor,
        rows: tf.Tensor,
    ) -> None:
        """Lets the optimizer apply the gradients, unless something is wrong with them, the loss, or the step so far.

        Args:
            rows: How many examples this replica has, or 1 where it may have none.

        Whether all gradients are finite shows in the sum of their squares, which costs less than to look at each
        number. What a `LossScaleOptimizer` finds not finite is its own business, as long as it scales.
        """
        if not optimizer.built:  # before the branch, in which no variable can be made
            with keras.name_scope(optimizer.name, caller=optimizer):
                optimizer.build(list(variables))
        known = [(v, g) for v, g in zip(variables, gradients, strict=True) if g is not None]
        numbers = [tf.cast(g.values if isinstance(g, tf.IndexedSlices) else g, tf.float32) for _, g in known]
        squares = tf.add_n([tf.nn.l2_loss(group) for group in _grouped(numbers)])
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            squares = tf.where(tf.convert_to_tensor(optimizer.dynamic_scale) > 1, 0.0, squares)
        context = tf.distribute.get_replica_context()
        sound = tf.math.is_finite(tf.cast(loss, tf.float32) + squares + 1 / tf.cast(rows, tf.float32))
        if self._reported.get(threading.get_ident()):
            sound &= tf.equal(self.fault(), 0)

        @tf.function(experimental_attributes={"_noinline": True})  # as one operation, where it is not needed
        def report():
            messages = [NO_ROWS, "the loss is not finite"]
            messages += [f"the gradient of {path_of(v)} is not finite, or overflows when squared" for v, _ in known]
            messages += ["the squares of all gradients overflow when added up"]
            values = [
                1 / tf.cast(rows, tf.float32),
                loss,
                *map(tf.nn.l2_loss, numbers),
                squares,
            ]
            finite = tf.math.is_finite(tf.stack([tf.cast(value, tf.float32) for value in values]))
            self.report(~finite, messages, skippable=True)

        if context.num_replicas_in_sync > 1:  # they must all apply it, or none
            tf.cond(sound, lambda: None, report)
            sound = tf.equal(context.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~sound, tf.int32)), 0)

        def on_all(strategy, gradients, sound):
            # As in Keras's LossScaleOptimizer: a branch within a replica could not apply anything to all of them.
            def apply():
                strategy.extended.call_for_each_replica(optimizer.apply, args=(gradients, variables))

            refuse = report if strategy.num_replicas_in_sync == 1 else lambda: None
            with tf.name_scope(optimizer.name):
                before = _operations()
                tf.cond(strategy.experimental_local_results(sound)[0], apply, refuse)
                self._guarded, self._is_last = [*self._guarded, _operations()[len(before) :]], True

        context.merge_call(on_all, args=(gradients, sound))

    def _code(self, message: str) -> int:
        if message not in self._messages:
            self._messages.append(message)
        return self._messages.index(message)


def _operations() -> list[tf.Operation]:
    return [] if tf.executing_eagerly() else tf.compat.v1.get_default_graph().get_operations()


def _arrays(parts: Any, path: str = "") -> dict[str, np.ndarray]:
    """The arrays in a structure, by the keys that lead to them."""
    if isinstance(parts, dict):
        items = list(parts.items())
    elif isinstance(parts, (list, tuple)):
        items = list(enumerate(parts))
    elif parts is None:
        return {}
    else:
        return {path: np.asarray(parts.to_tensor() if isinstance(parts, tf.RaggedTensor) else parts)}
    found: dict[str, np.ndarray] = {}
    for key, inner in items:
        found |= _arrays(inner, f"{path}.{key}" if path else str(key))
    return found


def _described(name: str, array: np.ndarray) -> str:
    """What is to be seen in a part of a batch."""
    if array.dtype.kind not in "iufb" or not array.size:
        return ""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.nonzero(~np.isfinite(array))[0][0])
        return f"`{name}` itself is not finite, first in row {row} of the batch"
    parts = array[array != np.floor(array)] if array.dtype.kind == "f" else array[:0]
    such = f", such as {parts.flat[0]:.6g}" if parts.size else ""
    return f"`{name}` is from {array.min():.6g} to {array.max():.6g}{such}"


def _grouped(gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The large ones, and the small ones as one: each operation costs more than it computes."""
    large = [gradient for gradient in gradients if (gradient.shape.num_elements() or _LARGE) >= _LARGE]
    small = [tf.reshape(g, [-1]) for g in gradients if (g.shape.num_elements() or _LARGE) < _LARGE]
    return [*large, tf.concat(small, 0)] if small else large
