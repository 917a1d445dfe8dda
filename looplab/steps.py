"""The steps that researchers override, and what they can call inside a step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from looplab import checks, keras_names
from looplab.compat import converted
from looplab.keras_models import own_method
from looplab.loop import context, replicas, step_checks
from looplab.loop.engine import Engine
from looplab.names import check_assignment, check_subclass
from looplab.summaries import projector
from looplab.summaries.writer import image_content
from looplab.walk import OURS
from looplab.warn import warn


class Steps:
    """One step of training, evaluation and prediction, with the methods that `keras.Model` has: `Trainer` runs them."""

    if TYPE_CHECKING:
        model: Callable[..., Any] | None
        optimizer: Any
        _looplab: Engine

    def __reduce__(self) -> Any:
        raise TypeError(
            f"`{type(self).__name__}` cannot be pickled or copied: use its `save` or `save_weights`; of a `History` "
            f"pickle `history.history`."
        )

    def train_step(self, batch: Any) -> dict[str, Any]:
        """Learns from one batch; by the model's own `train_step`, if its class overrides that of `keras.Model`.

        Args:
            batch: x, (x, y) or (x, y, sample_weight), as tensors.

        Returns:
            This batch's values: scalars by name, also in dicts. The epoch's value of a metric's result, or of an entry
            of one, is that metric's result over the epoch, whatever its name. The epoch's value of anything else is the
            mean over the batches, weighted by their number of examples.
        """
        if own := own_method(self.model, "train_step"):
            return converted(own)(batch)
        x, y, sample_weight = step_checks.parts(batch)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = _with_training(self.compute_loss, x, y, y_pred, sample_weight, training=True)
        self.minimize(tape, loss)
        return {"loss": loss, **converted(self.compute_metrics)(x, y, y_pred, sample_weight)}

    def test_step(self, batch: Any) -> dict[str, Any]:
        """Evaluates one batch; takes and returns what `train_step` does."""
        if own := own_method(self.model, "test_step"):
            return converted(own)(batch)
        x, y, sample_weight = step_checks.parts(batch)
        y_pred = self(x, training=False)
        loss = _with_training(self.compute_loss, x, y, y_pred, sample_weight, training=False)
        return {"loss": loss, **converted(self.compute_metrics)(x, y, y_pred, sample_weight)}

    def predict_step(self, batch: Any) -> Any:
        """The outputs for one batch: a tensor or a structure of tensors, with the examples along the first axis."""
        if own := own_method(self.model, "predict_step"):
            return converted(own)(batch)
        x, _, _ = step_checks.parts(batch)
        return self(x, training=False)

    def __call__(self, x: Any, training: bool | None = None) -> Any:
        """Calls the model, or the subclass's own `call`; with `training`, if that is given and it takes it."""
        call = self.model
        if self.model is None:
            call = inspect.getattr_static(self, "call", None) and self.call  # as in a subclass of `keras.Model`
        if call is None:
            step = context.current()
            missing = "the steps that call it" if step is None else f"`{step.kind}_step`"
            raise ValueError(f"`{type(self).__name__}` has no `model`: pass one, or override {missing}.")
        # Any layer takes it, also if its `call` does not: the layers inside obey it.
        takes_training = isinstance(call, keras.Layer) or "training" in inspect.signature(call).parameters
        with step_checks.inputs(x, call):
            call = call if isinstance(call, keras.Layer) else converted(call)
            return call(x, training=training) if takes_training and training is not None else call(x)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> tf.Tensor:
        """The loss of a batch, a scalar: that of the targets, and everything that earlier model calls added to it.

        TensorBoard shows each part as `batch_loss/<part>`: the loss function's name, the path of each layer that called
        `add_loss` (with `_2` for its second call in this step), and `regularization`.
        """
        if own := own_method(self.model, "compute_loss"):
            return _with_training(own, x, y, y_pred, sample_weight, training=training)
        step, objective = _running(self._looplab), self._looplab.runner.objective
        losses = step.ledger.take(self.trainable_variables)
        if objective.loss is not None:
            losses.insert(0, objective.compute_loss(step, y, y_pred, sample_weight))
        if not losses:
            raise ValueError(
                "There is no loss: pass `loss`, let the model call `add_loss`, or override `compute_loss` or the step."
            )
        return functools.reduce(tf.add, losses)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Updates the running state of `metrics`, and returns their values for this batch alone, by name.

        As in `keras.Model`, `metrics` do not use `sample_weight`. With several outputs, the values include the loss of
        each.
        """
        step, objective = _running(self._looplab), self._looplab.runner.objective
        if own := own_method(self.model, "compute_metrics"):
            return objective.completed(step, converted(own)(x, y, y_pred, sample_weight))
        return objective.compute_metrics(step, y, y_pred, sample_weight)

    def reset_metrics(self) -> None:
        """Resets the state of all metrics; called before each epoch, each evaluation, and each `train_on_batch`."""
        for metric in self.metrics:
            metric.reset_state()

    def minimize(
        self, tape: tf.GradientTape, loss: tf.Tensor, variables: Sequence[Any] | None = None, optimizer: Any = None
    ) -> list[tf.Tensor | None]:
        """Computes the gradients of `loss`, checks them, and lets the optimizer apply them.

        Args:
            tape: The tape under which `loss` was computed.
            loss: A floating-point scalar: the mean over this replica's examples.
            variables: What to train, as a flat list. By default `trainable_variables`, and any trainable
                `tf.Variable` that the tape watched besides those.
            optimizer: A Keras optimizer, by default the trainer's.

        Returns:
            The gradients of `loss` in the order of `variables`, without any loss scale; None where the loss does not
            depend on a variable. With several replicas, those of the mean over the whole batch.

        Raises:
            ValueError: There is no optimizer, the loss is not one floating-point number, or there is no gradient.
        """
        runner, step = self._looplab.runner, _running(self._looplab)
        loss = step_checks.loss(loss)
        optimizer = self.optimizer if optimizer is None else optimizer
        is_default = variables is None
        if variables is None:
            runner.variables.adopt("variables", tape.watched_variables())
            variables = self.trainable_variables
        variables = step_checks.variables(variables)
        if not variables:
            warn(f"{type(self).__name__} has nothing to train: no trainable variables.")
            return []
        if optimizer is None:
            raise ValueError("There is no optimizer: pass `optimizer` to the trainer or to `minimize`.")
        step_checks.new_variables(optimizer, variables)
        runner.prepare(optimizer, variables)
        # Scales the gradient rather than the loss, whose value is logged.
        one = tf.ones_like(loss)
        scale, part, rows, faults = optimizer.scale_loss(one), None, step.rows, None
        if runner.strategy.num_replicas_in_sync > 1:
            part, rows = step.share or replicas.share(1)
        weight = scale if part is None else scale * tf.cast(part, scale.dtype)
        gradients = tape.gradient(loss, variables, output_gradients=weight)
        step_checks.gradients(gradients, variables)
        if is_default:
            runner.warn_of_bare_variables(variables, gradients)
        if part is not None:
            own = replicas.counted(loss * tf.cast(part, loss.dtype), part), tf.cast(step.guard.fault() != 0, loss.dtype)
            gradients, loss, faults = replicas.added(gradients, part, *own)
        step.guard.apply(optimizer, gradients, variables, loss, rows, faults)
        step.is_guarded = True
        if scale is one:
            return gradients
        return [gradient if gradient is None else _divided(gradient, scale) for gradient in gradients]

    def running_result(self, metric: keras.Metric) -> Any:
        """Inside a step: the metric's result over the epoch so far, while `metric.result()` is that of this batch."""
        step = context.current()
        return metric.result() if step is None or step.metrics is None else step.metrics.running(metric)

    def log(self, name: str, value: Any) -> None:
        """Adds a scalar to those of the running step; outside a step, to TensorBoard at the current epoch."""
        step = context.current()
        if step is None:
            epoch, values = self._looplab.state.epochs, {name: float(value)}
            self._looplab.folder.log(lambda events: events.scalars("train", epoch, values))
        else:
            step_checks.outside_of_branches("log", name, step.graph)
            step.scalars[name] = step_checks.scalar("`log` got", name, value)

    def log_image(self, name: str, images: Any, every: int = 1000, max_outputs: int = 3) -> None:
        """Shows images on TensorBoard: those of the running step, or outside a step, of the current epoch.

        Args:
            name: The tag.
            images: Shape (n, height, width, channels), with 1, 3 or 4 channels; uint8, or floating point from 0 to 1.
            every: In a step: write them at the steps 1, 1 + every, 1 + 2·every, …
            max_outputs: How many of the n to write at most.
        """
        checks.positive(every=every, max_outputs=max_outputs)
        images = step_checks.images(name, images)[:max_outputs]
        step = context.current()
        if step is None:
            epoch, contents = self._looplab.state.epochs, {name: image_content(images).numpy()}
            self._looplab.folder.log(lambda events: events.images("train", epoch, contents))
        else:
            step_checks.outside_of_branches("log_image", name, step.graph)
            step.images[name], step.image_every[name] = images, every

    def log_hparams(self, hparams: dict[str, Any]) -> None:
        """Shows hyperparameters in TensorBoard's HPARAMS tab, next to the last value of each scalar of the run.

        Those of all calls on this trainer are shown together, in place of those of earlier processes. A TensorBoard
        that has already read the run shows them after a restart. It finds the scalars if it looks at a folder above
        `log_dir`.

        Args:
            hparams: By name: bool, int, float or str. A scalar array or variable becomes its value, anything else
                its `str`.

        Raises:
            ValueError: `log_dir` holds another run.
        """
        checks.hparams(hparams)
        self._looplab.folder.log(lambda events: events.hparams(hparams), if_resumed=True)

    def log_embeddings(self, name: str, vectors: Any, labels: Any = None, images: Any = None) -> None:
        """Shows vectors in TensorBoard's PROJECTOR tab, in place of earlier ones with that name.

        A TensorBoard that has already read the run shows them after a restart.

        Args:
            name: Their name in the tab; `&`, `#`, `+` and `%` become `_`.
            vectors: Numbers, shape (n, d).
            labels: n strings or numbers, shown at the points.
            images: uint8, shape (n, height, width) or (n, height, width, channels), with 1 or 3 channels, drawn at the
                points. Together, in ceil(sqrt(n)) rows and columns, they may have 8192x8192 pixels.

        Raises:
            ValueError: An argument has another shape or dtype, there are too many pixels, or `log_dir` holds another
                run.
        """
        embeddings = projector.checked(name, vectors, labels, images)
        self._looplab.folder.log(lambda events: events.embeddings("train", embeddings))

    @property
    def losses(self) -> list[tf.Tensor]:
        """Inside a step: everything that its model calls added with `add_loss`, and the weights' regularizers."""
        return list(_running(self._looplab).ledger.parts(self.trainable_variables).values())

    @property
    def trainable_variables(self) -> list[Any]:
        """The trainable variables of all models, in the order of the attributes that lead to them."""
        return self._looplab.runner.variables.trainable()

    @property
    def metrics(self) -> list[keras.Metric]:
        """All metrics: those of the constructor, those among the attributes, and those that layers own."""
        return self._looplab.runner.variables.metrics()

    def __setattr__(self, name: str, value: Any) -> None:
        check_assignment(self, name)
        super().__setattr__(name, value)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_subclass(cls)

    def __getattr__(self, name: str) -> Any:
        if OURS not in vars(self):
            raise AttributeError(
                f"`{type(self).__name__}.__init__` must call `super().__init__(...)` before `{name}` is used."
            )
        if any(name in vars(kind) for kind in type(self).__mro__):
            return object.__getattribute__(self, name)  # raises what a property raised
        return keras_names.find(self, self._looplab, name)


def _with_training(compute_loss: Callable[..., Any], *arguments: Any, training: bool) -> Any:
    """Calls a `compute_loss`, which may have been written before Keras gave it the argument `training`."""
    parameters = inspect.signature(compute_loss).parameters.values()
    takes_training = any(p.name == "training" or p.kind is p.VAR_KEYWORD for p in parameters)
    return converted(compute_loss)(*arguments, **({"training": training} if takes_training else {}))


def _running(engine: Engine) -> context.Step:
    """The running step; in a step that is called by hand, a new one."""
    return context.current() or engine.runner.new_step("train")


def _divided(gradient: Any, scale: tf.Tensor) -> Any:
    scale = tf.cast(scale, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values / scale, gradient.indices, gradient.dense_shape)
    return gradient / scale
