"""Which target, output and loss belong together where there are several, as Keras's `CompileLoss` has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf


class _Target:
    """A target, and the keys that lead to it within y: it goes through Keras's arrangement in place of the target."""

    def __init__(self, path: tuple[Any, ...], value: Any):
        self.path, self.value = path, value


def pairs(
    loss: Any, y: Any, y_pred: Any, names: Sequence[str] | None
) -> Iterator[tuple[tuple[Any, ...], Any, Any, Any]]:
    """(keys that lead to it within y, loss, target, output) of each output that has a loss and a target.

    They meet as Keras's `CompileLoss` lets them meet. What does not fit is left to Keras, which tells it.
    """
    try:
        targets = keras.tree.pack_sequence_as(y, [_Target(*found) for found in keras.tree.flatten_with_path(y)])
        targets = _arranged(targets, loss, y_pred, names)
        found = list(_matched(_losses(loss, y_pred, names), targets, y_pred))
    except (KeyError, IndexError, TypeError, ValueError):
        return
    if not keras.tree.is_nested(y) and not keras.tree.is_nested(y_pred):
        found = found[:1]  # of several losses of one output, Keras counts the first then
    for function, target, output in found:
        if isinstance(target, _Target) and isinstance(target.value, tf.Tensor) and isinstance(output, tf.Tensor):
            yield target.path, function, target.value, output


def _losses(loss: Any, y_pred: Any, names: Sequence[str] | None) -> Any:
    """The losses, in the structure of the outputs or what `_matched` brings into it."""
    if not keras.tree.is_nested(loss):
        return keras.tree.map_structure(lambda _: loss, y_pred)
    if isinstance(loss, dict) and not isinstance(y_pred, dict) and names:
        if {*names} != {*loss}:
            raise KeyError(*({*names} ^ {*loss}))
        return [loss[name] for name in names]
    return loss


def _arranged(targets: Any, loss: Any, y_pred: Any, names: Sequence[str] | None) -> Any:
    """The targets in the structure of the outputs, or of the losses where only some outputs have one.

    A list meets a dict in the order of the dict's sorted keys, and a dict a list by the names of the outputs.
    """
    if _is_accepted(keras.tree.assert_same_structure, y_pred, targets):
        return targets
    if isinstance(targets, _Target) and len(y_pred) == 1:
        targets = [targets]
    elif isinstance(y_pred, (list, tuple)) and isinstance(targets, dict) and {*(names or ())} == {*targets}:
        targets = [targets[name] for name in names or ()]
    if _is_accepted(keras.tree.pack_sequence_as, y_pred, targets):
        return keras.tree.pack_sequence_as(y_pred, targets)
    flat = keras.tree.flatten(targets)
    if _is_accepted(keras.tree.assert_same_paths, targets, y_pred):
        return keras.tree.pack_sequence_as(y_pred, flat)
    losses, rest = keras.tree.flatten(loss), iter(flat)
    if len(flat) != sum(one is not None for one in losses):
        raise ValueError("There is not one target for each loss.")
    return keras.tree.pack_sequence_as(loss, [None if one is None else next(rest) for one in losses])


def _is_accepted(function: Callable[[Any, Any], Any], first: Any, second: Any) -> bool:
    """Whether a function of Keras's takes these two structures."""
    try:
        function(first, second)
    except (TypeError, ValueError):
        return False
    return True


def _matched(loss: Any, targets: Any, y_pred: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(loss, target, output) of each loss, as the keys of all three meet."""
    if not keras.tree.is_nested(loss):
        if loss is not None:
            yield loss, targets, y_pred
        return
    if isinstance(loss, (list, tuple)):
        is_flat = not any(map(keras.tree.is_nested, loss))
        if is_flat and len(loss) == len(keras.tree.flatten(y_pred)):
            loss = keras.tree.pack_sequence_as(y_pred, loss)
        elif not isinstance(y_pred, type(loss)):  # several losses of one output
            for one in loss:
                yield from _matched(one, targets, y_pred)
            return
    if not keras.tree.is_nested(loss):
        yield from _matched(loss, targets, y_pred)
        return
    kind = dict if isinstance(loss, dict) else (list, tuple)
    if not isinstance(loss, type(y_pred)) or not isinstance(targets, kind):
        raise TypeError("The losses are not in the structure of the outputs.")
    for key, inner in loss.items() if isinstance(loss, dict) else enumerate(loss):
        if inner is not None:
            yield from _matched(inner, targets[key], y_pred[key])
