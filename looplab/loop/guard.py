"""What goes wrong in a step: detected in the graph before an update is applied, and reported in words afterwards."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab.loop.graphs import changed
from looplab.loop.replicas import applying_whole
from looplab.variables import of_each_replica, path_of, plain

NO_ROWS = "the batch has no rows: filter empty ones out"
_LARGE = 2**14  # elements
_ADVICE = "Often a smaller learning rate, or `global_clipnorm` of the optimizer, helps"


class Fault(Exception):  # noqa: N818  (`error` turns it into an error)
    """A step has a fault and is the last one.

    Args:
        code, message: From the guard.
        kind: "train" or "test".
        batch_number: In its epoch, from 1.
        batch: The parts of the batch by name: arrays, structures of arrays, or None.
        losses: The step's loss and its parts, by name.
    """

    def __init__(
        self, code: int, message: str, kind: str, batch_number: int, batch: dict[str, Any], losses: dict[str, float]
    ):
        super().__init__(message)
        self.code, self.message, self.kind, self.batch_number = code, message, kind, batch_number
        self.batch, self.losses = _arrays(batch), losses

    def error(self, step: int, epoch: int, log_dir: Path | None) -> Exception:
        """The error to raise; writes the batch to `log_dir/nonfinite`."""
        where = f"step {step} (batch {self.batch_number} of epoch {epoch})"
        if self.kind != "train":
            where = f"batch {self.batch_number} of an evaluation"
        details = [text for name, array in self.batch.items() if (text := _described(name, array))]
        if self.message != NO_ROWS:
            losses = [f"{name} = {value:.6g}" for name, value in self.losses.items() if not math.isfinite(value)]
            details = losses + details
        text = f"{self.message}, at {where}. " + (f"{'; '.join(details)}." if details else "")
        text = (text[0].upper() + text[1:]).strip()
        if self.code < 0:
            return ValueError(f"{text} Nothing was learned from that batch.")
        advice = "Remove or replace such rows" if "itself is not finite" in text else _ADVICE
        advice += "; `trainer.skip_nonfinite = n` skips up to n such steps in a row."
        text += " The update was not made."
        if log_dir is not None:
            file = log_dir / "nonfinite" / f"step-{step}.npz"
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                np.savez(file, **self.batch)  # type: ignore[arg-type]
                text += (
                    f" The batch is in {file}; a trainer with `run_eagerly=True` runs it again, line by line, with "
                    f"`fit(..., resume=True)`."
                )
            except OSError as error:
                text += f" The batch could not be written to {file}: {error.strerror}."
        return FloatingPointError(f"{text} {advice}")


class Guard:
    """Holds the first fault of a step as one number, which the graph can return.

    The number is in a variable, because a step may find a fault inside a branch or a loop, from which no tensor comes
    out; each replica has its own. Codes are positive for numbers that are not finite: nothing was updated, and the step
    may be skipped. They are negative for what must stop the training. Only a step with a fault costs time.
    """

    def __init__(self) -> None:
        on_read = {"synchronization": tf.VariableSynchronization.ON_READ, "aggregation": tf.VariableAggregation.SUM}
        self._fault = tf.Variable(0, trainable=False, name="fault", **on_read)
        self._messages = [""]  # by code
        self.start()

    def start(self) -> None:
        """Forgets the graph of the step that was traced before."""
        self._has_reports = False
        self._is_applying = False
        self._unguarded: list[tuple[str, tf.Tensor]] = []  # of gradients, as `_report_infinite` takes them
        self._applied: list[list[tf.Operation]] = []  # the operations of each `apply`, skipped if there is a fault
        self._ends_with_apply = True  # whether nothing was reported after the last `apply`

    def fault(self) -> tf.Tensor:
        """int32: 0, or the code of the first fault of the running step on this replica."""
        return tf.convert_to_tensor(self._fault)

    @property
    def variables(self) -> list[tf.Variable]:
        """Its own; with replicas, those of each."""
        return [plain(part) for part in of_each_replica(self._fault).values()]

    def report(self, wrong: tf.Tensor, messages: Sequence[str], skippable: bool = False) -> None:
        """Records the first fault, if any: `wrong` is a vector of bools with a message for each."""
        self._has_reports = True
        self._ends_with_apply = not self._applied
        codes = [self._code(message) * (1 if skippable and message != NO_ROWS else -1) for message in messages]

        def record() -> None:
            before = self.fault()
            first = tf.gather(tf.constant(codes), tf.argmax(wrong))
            self._fault.assign(tf.where(tf.equal(before, 0), first, before))

        tf.cond(tf.reduce_any(wrong), record, lambda: None)

    def message(self, code: int) -> str:
        """What a code means."""
        return self._messages[abs(code)]

    def report_applied(self, losses: dict[str, tf.Tensor], variables: Sequence[Any]) -> None:
        """Checks a step that changed these variables without `apply`: its losses, and the variables now."""
        pairs = [(f"`{name}` is not finite", value) for name, value in losses.items()] + self._unguarded
        for one in variables:
            text = f"{path_of(one)} is not finite after the step changed it"
            pairs.append((text, tf.nn.l2_loss(tf.convert_to_tensor(one))))
        self._report_infinite(pairs)

    def check(self, optimizer: keras.Optimizer, gradients: Sequence[Any], variables: Sequence[Any], graph: Any) -> None:
        """Checks gradients that a step applies without `apply`: what is wrong may show only in the optimizer's state.

        Args:
            optimizer, gradients, variables: As for `apply`.
            graph: That of the step. What is wrong in it is reported by `report_applied`, in a branch or loop at once.
        """
        if self._is_applying:
            return
        known = [(v, g) for v, g in zip(variables, gradients, strict=False) if g is not None]
        pairs = [(_wrong_gradient(v), _unscaled(tf.nn.l2_loss(_numbers(g)), optimizer)) for v, g in known]
        if tf.compat.v1.get_default_graph() is graph:
            self._unguarded += pairs
        else:
            self._report_infinite(pairs)

    def changed_otherwise(self, variables: Sequence[Any]) -> list[Any]:
        """The variables that the step may change outside of `apply`; in eager mode, all."""
        if tf.executing_eagerly():
            return list(variables)
        return changed(variables, tf.compat.v1.get_default_graph(), ignoring=self._applied)

    def to_restore(self, variables: Sequence[Any], graph: Any) -> list[Any]:
        """The variables that the step, just traced as `graph`, may have changed although it has a fault."""
        decides = self._ends_with_apply and len(self._applied) == 1
        return changed(variables, graph, ignoring=self._applied if decides else ())

    def apply(
        self,
        optimizer: keras.Optimizer,
        gradients: Sequence[Any],
        variables: Sequence[Any],
        loss: tf.Tensor,
        rows: tf.Tensor | int,
        faults: tf.Tensor | None = None,
    ) -> None:
        """Lets the optimizer apply the gradients, unless there is a fault in them, the loss, or the step so far.

        Whether all gradients are finite shows in the sum of their squares, which costs less than checking each number.
        While a `LossScaleOptimizer` scales the loss, it deals with gradients that are not finite itself.

        Args:
            optimizer: One that is built, because the update runs in a branch, in which no variable can be created.
            gradients, loss: With several replicas, those of the whole batch.
            rows: How many examples the batch has.
            faults: On how many replicas the step so far has one: all of them apply the gradients, or none.
        """
        known = [(v, g) for v, g in zip(variables, gradients, strict=True) if g is not None]
        numbers = [_numbers(g) for _, g in known]
        squares = _unscaled(tf.add_n([tf.nn.l2_loss(group) for group in _grouped(numbers)]), optimizer)
        sound = tf.math.is_finite(tf.cast(loss, tf.float32) + squares + 1 / tf.cast(rows, tf.float32))
        if faults is not None:
            sound &= tf.equal(faults, 0)
        elif self._has_reports:
            sound &= tf.equal(self.fault(), 0)

        # Not inlined: one operation, in a branch that is rarely taken.
        @tf.function(autograph=False, experimental_attributes={"_noinline": True})
        def report() -> None:
            messages = [NO_ROWS, "the loss is not finite"]
            messages += [_wrong_gradient(v) for v, _ in known]
            messages += ["the squares of all gradients overflow when added up"]
            values = [1 / tf.cast(rows, tf.float32), loss, *map(tf.nn.l2_loss, numbers), squares]
            self.report(~_are_finite(values), messages, skippable=True)

        context = tf.distribute.get_replica_context()
        if context.num_replicas_in_sync > 1:  # from whose common branch each cannot report
            tf.cond(sound, lambda: None, report)

        def on_all(strategy: tf.distribute.Strategy, gradients: Any, sound: Any) -> None:
            # As in Keras's LossScaleOptimizer: from a branch inside one replica, nothing can be applied to all.
            def apply() -> None:
                several = strategy.num_replicas_in_sync > 1
                self._is_applying = True
                with applying_whole(optimizer) if several else contextlib.nullcontext():
                    strategy.extended.call_for_each_replica(optimizer.apply, args=(gradients, variables))
                self._is_applying = False

            refuse = report if strategy.num_replicas_in_sync == 1 else lambda: None
            with tf.name_scope(optimizer.name):
                before = len(_operations())
                tf.cond(strategy.experimental_local_results(sound)[0], apply, refuse)
                self._applied, self._ends_with_apply = [*self._applied, _operations()[before:]], True

        context.merge_call(on_all, args=(gradients, sound))

    def _report_infinite(self, pairs: Sequence[tuple[str, tf.Tensor]]) -> None:
        """Reports which numbers are not finite: for each, what is wrong then, and the number."""
        if pairs:
            messages, values = zip(*pairs, strict=True)
            self.report(~_are_finite(values), messages, skippable=True)

    def _code(self, message: str) -> int:
        if message not in self._messages:
            self._messages.append(message)
        return self._messages.index(message)


def _wrong_gradient(variable: Any) -> str:
    return f"the gradient of {path_of(variable)} is not finite, or overflows when squared"


def _numbers(gradient: Any) -> tf.Tensor:
    return tf.cast(gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient, tf.float32)


def _unscaled(squares: tf.Tensor, optimizer: keras.Optimizer) -> tf.Tensor:
    """The squares of gradients, or 0 while a `LossScaleOptimizer` scales the loss, which deals with them itself."""
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return squares
    return tf.where(tf.convert_to_tensor(optimizer.dynamic_scale) > 1, 0.0, squares)


def _are_finite(values: Sequence[Any]) -> tf.Tensor:
    return tf.math.is_finite(tf.stack([tf.cast(value, tf.float32) for value in values]))


def _operations() -> list[tf.Operation]:
    return [] if tf.executing_eagerly() else tf.compat.v1.get_default_graph().get_operations()


def _grouped(gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The large ones, and the small ones as one: each operation costs more than it computes."""
    large = [gradient for gradient in gradients if (gradient.shape.num_elements() or _LARGE) >= _LARGE]
    small = [tf.reshape(g, [-1]) for g in gradients if (g.shape.num_elements() or _LARGE) < _LARGE]
    return [*large, tf.concat(small, 0)] if small else large


def _arrays(parts: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays in a structure, by the keys that lead to them."""
    leaves = keras.tree.flatten_with_path({name: part for name, part in parts.items() if part is not None})
    dense = ((path, leaf.to_tensor() if isinstance(leaf, tf.RaggedTensor) else leaf) for path, leaf in leaves)
    return {".".join(map(str, path)): np.asarray(leaf) for path, leaf in dense if leaf is not None}


def _described(name: str, array: np.ndarray) -> str:
    """What stands out in a part of a batch."""
    if array.dtype.kind not in "iufb" or not array.size:
        return ""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.nonzero(~np.isfinite(array))[0][0])
        return f"`{name}` itself is not finite, first in row {row} of the batch"
    parts = array[array != np.floor(array)] if array.dtype.kind == "f" else array[:0]
    example = f", such as {parts.flat[0]:.6g}" if parts.size else ""
    return f"`{name}` is from {array.min():.6g} to {array.max():.6g}{example}"
