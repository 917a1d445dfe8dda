"""The step that runs in this thread, and the calls of Keras objects that it records."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from looplab.compat import (
    APPLYING,
    AUTOGRAPH_LOG,
    LOSSES,
    NOT_CONVERTED,
    REDUCE,
    REDUCE_VALUES,
    REPLICA_SCALES,
    first_reads,
    read_as,
    trained_by,
    updates_plainly,
)
from looplab.loop import replicas
from looplab.loop.fused import FusedUpdates
from looplab.loop.graphs import changed
from looplab.loop.guard import Guard
from looplab.loop.hooks import Hooks
from looplab.loop.losses import Ledger
from looplab.loop.metrics import StepMetrics
from looplab.loop.weights import align

_thread = threading.local()  # .step: with several replicas, each runs its step in a thread of its own


class Step:
    """What one replica records while it runs a step.

    Args:
        kind: "train", "test" or "predict".
        guard: What is wrong with the step goes here.
        metrics: What the step does with metrics; None leaves them to Keras.
        image_every: By image name, how often it is due; filled by `log_image`.
    """

    def __init__(self, kind: str, guard: Guard, metrics: StepMetrics | None, image_every: dict[str, int]):
        self.kind = kind
        self.guard = guard
        self.metrics = metrics
        self.image_every = image_every
        self.ledger = Ledger()
        self.graph = tf.compat.v1.get_default_graph()
        self.scalars: dict[str, tf.Tensor] = {}
        """By name, what the step logs in addition to what it returns."""
        self.images: dict[str, tf.Tensor] = {}
        self.share: tuple[Any, Any] | None = None
        """With several replicas, as `replicas.share` returns it."""
        self.rows: tf.Tensor | int = 1
        """How many examples this replica has; 1 where it may have none, because other replicas have some."""
        self.is_guarded = False
        """Whether `minimize` has checked the step's numbers."""
        self.trains: Callable[[Any, Any], None] | None = None
        """Called with each optimizer that the step applies, and the variables that it changes, before it does."""
        self.inspect: Callable[[Any, Any, Any, Any], tuple[Any, Any]] | None = None
        """Maps a Keras loss, its target, output and weight to the target and the weight that the loss gets."""
        self.loss_values = ""
        """What errors call the values of a loss whose sample weights looplab aligns; "" if it aligns none."""
        self.rates: dict[int, tf.Tensor] = {}
        """By the optimizer's identity, the learning rate of its first update."""
        self._used_rates: set[int] = set()
        self.fused: FusedUpdates | None = None
        """Updates large variables, if that is asked for."""
        self.unconverted: list[Callable[[], None]] = []
        """Warnings of AutoGraph, of functions that it runs as they are."""
        self.reads: dict[tf.Graph, Any] | None = None
        """By graph, what all updates of the running optimizer read there; None if each reads for itself."""

    def uses_rates(self, optimizers: Iterable[Any]) -> None:
        """Reads the rates of optimizers that the step uses from here on, if it has changed them before.

        Within a branch or a loop, whose values are not known outside, that of the start of the step remains.
        """
        for one in optimizers:
            is_first = id(one) in self.rates and id(one) not in self._used_rates
            is_outside = tf.compat.v1.get_default_graph() is self.graph
            self._used_rates.add(id(one))
            if is_first and is_outside and (tf.executing_eagerly() or changed(one.variables, self.graph)):
                self.rates[id(one)] = tf.convert_to_tensor(one.learning_rate)


def current() -> Step | None:
    """The step that runs in this thread, if any."""
    return getattr(_thread, "step", None)


@contextlib.contextmanager
def running(step: Step) -> Iterator[Step]:
    """Makes a step the current one of this thread.

    Functions that AutoGraph cannot convert run as they are, which matters only if the step then fails.
    """
    before, _thread.step = current(), step
    try:
        with _conversions:
            yield step
    except Exception:
        for warn in step.unconverted:
            warn()
        raise
    finally:
        _thread.step = before


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Lets running steps record what layers, metrics, losses and optimizers do; other threads are not affected."""
    with _layers, _metrics, _losses, _reductions, _optimizers, drawing:
        yield


def _add_loss(add_loss: Callable[..., None], layer: keras.Layer, loss: Any) -> None:
    add_loss(layer, loss)
    if step := current():
        step.ledger.record(layer, loss)


def _update_state(update_state: Callable[..., Any], metric: keras.Metric, *args: Any, **kwargs: Any) -> Any:
    step = current()
    if step is not None and step.share is not None and replicas.is_mean_of_rows(metric, args, kwargs):
        kwargs = {"sample_weight": step.share[0]}
    update = functools.partial(update_state, metric, *args, **kwargs)
    return update() if step is None or step.metrics is None else step.metrics.update(metric, update)


def _result(result: Callable[..., Any], metric: keras.Metric) -> Any:
    step, compute = current(), functools.partial(result, metric)
    return compute() if step is None or step.metrics is None else step.metrics.result(metric, compute)


def _reset_state(reset_state: Callable[..., Any], metric: keras.Metric) -> Any:
    step, reset = current(), functools.partial(reset_state, metric)
    return reset() if step is None or step.metrics is None else step.metrics.reset(metric, reset)


def _call_loss(call: Callable[..., Any], loss: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
    step = current()
    if step is not None and step.inspect is not None:
        y_true, sample_weight = step.inspect(loss, y_true, y_pred, sample_weight)
    return call(loss, y_true, y_pred, sample_weight)


def _reduce_values(reduce: Callable[..., Any], values: Any, **options: Any) -> Any:
    step = current()
    if step is not None and step.loss_values and options.get("sample_weight") is not None:
        options["sample_weight"] = align(options["sample_weight"], values.shape, step.loss_values)
    value = reduce(values, **options)
    share = None if step is None else step.share
    return value if share is None else replicas.weighed(value, share[0], reduce, values, **options)


def _replica_scaled(scale: Callable[..., Any], loss: Any) -> Any:
    """In a step, a loss is the mean over the replica's examples; how many replicas there are counts in the update."""
    return scale(loss) if current() is None else loss


def _apply(apply: Callable[..., Any], optimizer: Any, grads: Any, *args: Any, **kwargs: Any) -> Any:
    step = current()
    if step is None:
        return apply(optimizer, grads, *args, **kwargs)
    # A `LossScaleOptimizer` applies another one.
    trains, reads, step.trains, step.reads = step.trains, step.reads, None, {} if updates_plainly(optimizer) else None
    try:
        if trains is None:
            return apply(optimizer, grads, *args, **kwargs)
        variables = args[0] if args else kwargs.get("trainable_variables")
        trains(optimizer, variables)
        if step.share is not None:
            grads = replicas.shared(grads, step.share[0])
        step.guard.check(optimizer, grads, trained_by(optimizer) if variables is None else variables, step.graph)
        with contextlib.nullcontext() if step.share is None else replicas.applying_whole(optimizer):
            return apply(optimizer, grads, *args, **kwargs)
    finally:
        step.trains, step.reads = trains, reads


def _update_step(update: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    """Lets all updates of one `apply` share a single read of the counter and the rate.

    Keras reads both for each variable. TensorFlow cannot merge reads, nor what is computed from them, such as the
    bias corrections of Adam: a seventh of the operations of a small model's step.
    """
    step, graph = current(), tf.compat.v1.get_default_graph()
    if step is None or step.reads is None or tf.executing_eagerly() or len(args) != 3 or kwargs:
        return update(optimizer, *args, **kwargs)
    gradient, variable, learning_rate = args
    if graph not in step.reads:
        step.reads[graph] = first_reads(optimizer.iterations, learning_rate)
    if any(variable is read for read, _ in step.reads[graph]):
        step.reads = None  # from now on, another value
        return update(optimizer, *args)
    with read_as(step.reads[graph]):
        if step.fused is None or not step.fused.update(optimizer, gradient, variable, learning_rate):
            update(optimizer, *args)


def _reduce(reduce: Callable[..., Any], optimizer: Any, gradients_and_variables: Any) -> Any:
    return gradients_and_variables if replicas.is_whole(optimizer) else reduce(optimizer, gradients_and_variables)


def _warning(warn: Callable[..., None], text: str, *args: Any, **kwargs: Any) -> None:
    step, give = current(), functools.partial(warn, text, *args, **kwargs)
    if step is None or not text.startswith(NOT_CONVERTED):
        give()
    else:
        step.unconverted.append(give)


def _next(
    draw: Callable[..., tf.Tensor], generator: keras.random.SeedGenerator, *args: Any, **kwargs: Any
) -> tf.Tensor:
    seed = draw(generator, *args, **kwargs)
    return seed if current() is None else replicas.own_seed(seed)


drawing = Hooks(keras.random.SeedGenerator, {"next": _next})
"""Inside it, each replica that runs a step draws random numbers of its own."""
_layers = Hooks(keras.Layer, {"add_loss": _add_loss})
_metrics = Hooks(
    keras.Metric,
    {"update_state": _update_state, "result": _result, "reset_state": _reset_state},
    subclasses=True,
)
_losses = Hooks(keras.Loss, {"__call__": _call_loss})
_conversions = Hooks(AUTOGRAPH_LOG, {"warning": _warning})
_reductions = Hooks(LOSSES, {REDUCE_VALUES: _reduce_values, **dict.fromkeys(REPLICA_SCALES, _replica_scaled)})
_optimizers = Hooks(APPLYING, {"apply": _apply, "update_step": _update_step, REDUCE: _reduce}, subclasses=True)
