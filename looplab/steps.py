"""What happens within a step: the methods that a researcher overrides, and the record of what a step tells."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from looplab import checks, plausible
from looplab.guard import NO_ROWS, Guard
from looplab.loop import StepLogs, examples
from looplab.losses import Ledger, listening
from looplab.metrics import BatchMetrics
from looplab.state import settings
from looplab.tracking import Tracked
from looplab.warn import warn

LEARNING_RATE = "learning_rate"
LOSS_PART = "loss/"


class Steps(Tracked):
    """One step of training, of evaluation and of prediction, as `keras.Model` has them: `Trainer` runs them."""

    def __init__(
        self,
        model: Callable[..., Any] | None,
        optimizer: Any,
        loss: Any,
        loss_weights: Any,
        metrics: Any,
        seed: int | None,
    ):
        self.model = model
        # A Keras model without layers knows how losses and metrics, given as names, lists and dicts, meet outputs.
        self._compiled = keras.Model(name="compiled", dtype=getattr(model, "dtype_policy", None))
        if isinstance(model, keras.Model) and hasattr(model, "output_names"):
            self._compiled.output_names = model.output_names
        self._compiled.compile(optimizer=optimizer, loss=loss, loss_weights=loss_weights, metrics=metrics)
        self.optimizer = self._compiled.optimizer
        self._loss = loss
        self._loss_weights = loss_weights
        # What they are at first: a callback may change a rate.
        self._made_with = {"optimizer": settings(self.optimizer), "loss": settings(loss)}
        self.seed = random.randint(1, 10**9) if seed is None else seed
        self.seed_generator = keras.random.SeedGenerator(self.seed)
        self.strategy = tf.distribute.get_strategy()
        self._found: list[tf.Variable] = []  # what a step was seen to train, and no attribute leads to
        self._minimized: list[_Minimized] = []
        self._batch_metrics = BatchMetrics()
        self._guard = Guard()
        # What the last trace told of targets and outputs.
        self._target_ranges: list[plausible.Range] = []
        self._bounded = ""  # a part of the loss that is 1 at most where targets are in the range of the outputs
        self._doubts: dict[str, bool] = {}  # and whether one was told
        self._image_every: dict[str, dict[str, int]] = {"train": {}, "test": {}}
        self._now = _Now()

    def train_step(self, batch: Any) -> dict[str, Any]:
        """Learns from one batch.

        Args:
            batch: x, (x, y) or (x, y, sample_weight), as tensors.

        Returns:
            This batch's values: scalars by name. An epoch's value is the result of the metric of that name, where a
            metric of that name was updated, else the mean over the batches, weighed by their size.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred, sample_weight)
        self.minimize(tape, loss)
        return {"loss": loss, **self.compute_metrics(x, y, y_pred, sample_weight)}

    def test_step(self, batch: Any) -> dict[str, Any]:
        """Measures one batch: as `train_step`, without learning."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        y_pred = self(x, training=False)
        loss = self.compute_loss(x, y, y_pred, sample_weight)
        return {"loss": loss, **self.compute_metrics(x, y, y_pred, sample_weight)}

    def predict_step(self, batch: Any) -> Any:
        """The outputs for one batch: a tensor, or a structure of them, with the examples first."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
        return self(x, training=False)

    def __call__(self, x: Any, training: bool = False) -> Any:
        """Calls the model, with `training` if it takes that."""
        if self.model is None:
            raise ValueError(f"`{type(self).__name__}` was made without `model`: override the steps that call it.")
        takes_training = isinstance(self.model, keras.Layer) or "training" in inspect.signature(self.model).parameters
        checks.strings(x, self.model)
        try:
            return self.model(x, training=training) if takes_training else self.model(x)
        except ValueError as error:
            raise checks.misfit(x, error) from error

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None) -> tf.Tensor:
        """The loss of a batch, a scalar: `loss` of the targets, and all that the model calls before added to it.

        Each part is written as `batch_loss/<part>`: the loss function's name, the path of each layer that called
        `add_loss` (with `_2` for its second call in this step), and `regularization`.
        """
        losses = self._now.ledger.take(self.trainable_variables)
        if self._loss is not None:
            checks.targets(y, self._loss)
            names = getattr(self._compiled, "output_names", None)
            self._target_ranges = list(plausible.ranges(self._loss, y, y_pred, names))
            for wanted in self._target_ranges:
                y = plausible.fitted(self._guard, wanted, y)
            for doubt in plausible.doubts(self._loss, y, y_pred, names):
                self._doubts.setdefault(doubt, False)
            # Keras divides a loss by the number of replicas, `minimize` does here: for losses of every origin.
            total = self._compiled.compute_loss(x, y, y_pred, sample_weight) * self.strategy.num_replicas_in_sync
            for name, value in self._target_losses(total).items():
                self._now.ledger.add(name, value)
                unweighed = self._loss_weights is None and sample_weight is None
                self._bounded = f"{LOSS_PART}{name}" if unweighed and plausible.bounded(self._loss, y_pred) else ""
            self._now.ledger.take(())
            losses.insert(0, total)
        if not losses:
            raise ValueError(
                "There is no loss: pass `loss`, let the model call `add_loss`, or override `compute_loss`."
            )
        return functools.reduce(tf.add, losses)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Updates the running state of `metrics`, and returns their values for this batch alone, by name."""
        values = self._compiled.compute_metrics(x, y, y_pred, sample_weight)
        checks.metric_names(self._compiled.metrics)
        del values["loss"]  # Keras's own running mean, which nothing updates here
        return values

    def minimize(
        self, tape: tf.GradientTape, loss: tf.Tensor, variables: Sequence[Any] | None = None, optimizer: Any = None
    ) -> list[tf.Tensor | None]:
        """Takes the gradients of `loss` and lets the optimizer apply them.

        Args:
            tape: The tape under which `loss` was computed.
            loss: A floating scalar: the mean over this replica's examples.
            variables: What to train. By default `trainable_variables`, and any trainable `tf.Variable` that the
                tape saw beyond those.
            optimizer: A Keras optimizer, by default the trainer's.

        Returns:
            The gradients in the order of `variables`, None where the loss does not depend on one.

        Raises:
            ValueError: No optimizer, a loss that is not one floating number, or no gradient at all.
        """
        loss = checks.loss(loss)
        optimizer = self.optimizer if optimizer is None else optimizer
        variables = self._watched(tape) if variables is None else list(variables)
        if not variables:
            warn(f"{type(self).__name__} has nothing to train: no trainable variables.")
            return []
        if optimizer is None:
            raise ValueError("There is no optimizer: pass `optimizer` to the trainer or to `minimize`.")
        # As the gradient of the scaled loss, without the loss itself being scaled for whoever looks at it.
        scale = optimizer.scale_loss(tf.ones_like(loss) / self.strategy.num_replicas_in_sync)
        gradients = tape.gradient(loss, variables, output_gradients=scale)
        checks.gradients(gradients, variables)
        self._guard.apply(optimizer, gradients, variables, loss, self._now.rows)
        self._now.guarded = True
        self._minimized = [known for known in self._minimized if known.optimizer is not optimizer]
        self._minimized.append(_Minimized(optimizer, variables))
        return gradients

    @property
    def losses(self) -> list[tf.Tensor]:
        """Within a step: all that model calls of this step added with `add_loss`, and the weights' regularizers."""
        return list(self._now.ledger.parts(self.trainable_variables).values())

    # Within.

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Within it, steps can run or be traced: added losses and metrics' updates are seen."""
        with listening(), self._batch_metrics.watching(self.metrics):
            yield

    def _run_step(self, kind: str, step: Callable[[Any], Any], batch: Any, number: tf.Tensor) -> StepLogs:
        """Runs a step of the user's on one replica, and gathers all that it tells."""
        now = self._now
        rates = self._learning_rates() if kind == "train" else {}  # as they are when the step uses them
        with now.open(self._image_every[kind]), now.ledger.open(self.trainable_variables):
            with self._batch_metrics.open(kind):
                self._guard.open()
                if self.strategy.num_replicas_in_sync == 1:  # of several, one may have none of a last batch
                    now.rows = examples(batch)
                logs = checks.step_logs(f"{kind}_step", step(batch))
                parts = {f"{LOSS_PART}{name}": part for name, part in now.ledger.all().items()}
                told: dict[str, tf.Tensor] = {}
                for source in (logs, now.scalars, self._batch_metrics.unasked(), parts):
                    for name, value in source.items():
                        if name in told:
                            raise ValueError(f"`{kind}_step` told two values named '{name}'. Give one another name.")
                        told[name] = value
                changed = self._guard.changed_otherwise(self.trainable_variables) if kind == "train" else []
                if changed:
                    losses = {name: value for name, value in told.items() if "loss" in name and value.dtype.is_floating}
                    self._guard.report_applied(losses, changed)
                if not now.guarded:
                    self._guard.report(tf.reshape(tf.equal(now.rows, 0), [1]), [NO_ROWS])
                return StepLogs({**rates, **told}, now.images, self._guard.fault())

    def _check_arrays(self, name: str, arrays: Any) -> None:
        """Looks for what a loss cannot learn from.

        Args:
            name: What an error calls x.
            arrays: x, (x, y) or (x, y, sample_weight), whole.
        """
        x, y, _ = keras.utils.unpack_x_y_sample_weight(arrays)
        plausible.check_finite(name, x)
        if plausible.raw_images(x, self.model) and type(self).__call__ is Steps.__call__:
            self._doubts.setdefault(
                f"`{name}` looks like images from 0 to 255, and the model has no layer that scales: divide by 255, or "
                f"begin the model with `keras.layers.Rescaling(1 / 255)`.",
                False,
            )
        for wanted in self._target_ranges:
            plausible.check_array(wanted, y, name)

    def _tell_doubts(self) -> None:
        """Warns of what looks wrong and may be meant, once."""
        for doubt, told in self._doubts.items():
            if not told:
                self._doubts[doubt] = True
                warn(doubt)

    def _predict(self, batch: Any) -> Any:
        """Runs the prediction step on one replica; what it logs is forgotten."""
        with self._now.open({}):
            return self.predict_step(batch)

    def _learning_rates(self) -> dict[str, tf.Tensor]:
        """The trainer's `optimizer` under `learning_rate`, any other under `learning_rate/<path>`."""
        return {
            LEARNING_RATE + ("" if path == "optimizer" else f"/{path}"): tf.convert_to_tensor(optimizer.learning_rate)
            for path, optimizer in self.optimizers.items()
        }

    def _target_losses(self, total: tf.Tensor) -> dict[str, tf.Tensor]:
        """The parts of the loss of the targets, by name: several outputs have one each, times its weight."""
        by_output = self._output_losses()
        if not by_output:
            loss = self._loss if isinstance(self._loss, str) else getattr(self._loss, "name", None)
            return {loss or getattr(self._loss, "__name__", None) or "targets": total}
        weights = self._loss_weights
        if isinstance(weights, dict):
            weights = [weights.get(metric.name.removesuffix("_loss"), 1.0) for metric in by_output]
        return {m.name: m.result() * w for m, w in zip(by_output, weights or [1.0] * len(by_output), strict=True)}

    def _output_losses(self) -> list[keras.Metric]:
        """Keras's means of the loss of each output, where there are several."""
        return [m for m in self._compiled.metrics if isinstance(m, keras.metrics.Mean) and m.name.endswith("_loss")]

    def _watched(self, tape: tf.GradientTape) -> list[Any]:
        """`trainable_variables`, and what else the tape saw that no attribute led to: it is kept from then on."""
        known = {id(v.value if isinstance(v, keras.Variable) else v) for v in self.weights}
        self._found += [v for v in tape.watched_variables() if id(v) not in known]
        return self.trainable_variables


@dataclasses.dataclass(frozen=True)
class _Minimized:
    """An optimizer, and the variables that steps apply it to."""

    optimizer: keras.Optimizer
    variables: list[Any]


class _Now(threading.local):
    """The step that runs in this thread, which is one replica: its ledger, and what it has logged by itself."""

    def __init__(self) -> None:
        self.running = False
        self.guarded = False
        self.rows: tf.Tensor | int = 1
        self.ledger = Ledger()
        self.scalars: dict[str, tf.Tensor] = {}
        self.images: dict[str, tf.Tensor] = {}
        self.image_every: dict[str, int] = {}

    @contextlib.contextmanager
    def open(self, image_every: dict[str, int]) -> Iterator[None]:
        """Within it runs a step; of the images that it logs, `image_every` is told how often each is due."""
        self.running, self.scalars, self.images, self.image_every = True, {}, {}, image_every
        self.guarded, self.rows = False, 1
        try:
            yield
        finally:
            self.running = False
