"""A trainer's `loss` and `metrics`: matched with the model's outputs by Keras, and checked against them."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from looplab import checks
from looplab.checkpoint.callbacks import settings_of
from looplab.compat import compile_parts, loss_weights
from looplab.keras_models import compiled_model, compiled_with, overrides
from looplab.loop import plausible, step_checks
from looplab.loop.context import Step
from looplab.loop.graphs import creating_ahead
from looplab.warn import Warnings, warn

LOSS_PART = "loss/"


class Objective:
    """What the default steps minimize and measure.

    Args:
        model: That of the trainer.
        given: The arguments of Keras's `compile` that were passed to the trainer.
        doubts: For what looks wrong but may be intended.
    """

    def __init__(self, model: Any, given: dict[str, Any], doubts: Warnings) -> None:
        for argument in ("loss", "metrics", "weighted_metrics"):
            checks.known(argument, given.get(argument))
        self._model, self._given = model, given
        self.compiled = compiled_model(model, given)
        """Knows how losses and metrics, given as names, lists or dicts, match the outputs."""
        self._bounded = ""  # the part of the loss that is at most 1 if targets are in the range of the outputs
        self._compared: list[plausible.Comparison] = []  # what the losses of the last trace compared
        self._doubts = doubts
        self._read()
        self.optimizer = self.compiled.optimizer
        if self.compiled is not model:
            self.compiled.optimizer = None  # the trainer has it, and users may replace it there

    def _read(self) -> None:
        arguments = compiled_with(self.compiled)
        self.loss, self.loss_weights, self.metrics = (arguments[n] for n in ("loss", "loss_weights", "metrics"))
        self._loss, self._metrics, self.mean = compile_parts(self.compiled)
        # Now, because a callback may change a learning rate.
        self.made_with = {"optimizer": settings_of(arguments["optimizer"]), "loss": settings_of(self.loss)}
        """The settings of the optimizer and the loss, in words."""

    @property
    def marks(self) -> list[Any]:
        """Of these objects, one is another as soon as the model is compiled, or compiled again."""
        return [self.compiled.optimizer, compile_parts(self.compiled)[2], getattr(self._model, "compiled", None)]

    def follow(self) -> bool:
        """Uses what the model was compiled with since; returns whether it was."""
        if self.compiled is not self._model and not self._given and compiled_with(self._model):
            self.compiled = self._model
        elif (self._loss, self._metrics, self.mean) == compile_parts(self.compiled):
            return False
        self._read()
        self.optimizer = self.compiled.optimizer
        return True

    def forget(self) -> None:
        """Forgets how losses and metrics matched the outputs of an earlier trace."""
        if not overrides(self.compiled, "compile"):
            self.compiled.compile(**compiled_with(self.compiled))
            self._loss, self._metrics, self.mean = compile_parts(self.compiled)

    @property
    def is_used(self) -> bool:
        """Whether the trainer has a loss or metrics; a subclass may have its own."""
        return self._loss is not None or self._metrics is not None

    @property
    def compiled_metrics(self) -> Any:
        """Keras's `CompileMetrics` of `metrics` and `weighted_metrics`."""
        if self._metrics is None:
            raise AttributeError("`compiled_metrics`: the trainer has no `metrics`. Pass some to its constructor.")
        return self._metrics

    @property
    def output_losses(self) -> dict[str, keras.Metric]:
        """Keras's means of the loss of each output, if there are several, by name.

        Keras names those of outputs without names after the loss function: `mse_loss`, then `mse_loss_1` here, as Keras
        distinguishes metrics with one name.
        """
        by_name: dict[str, keras.Metric] = {}
        for metric in getattr(self._loss, "metrics", []):
            names = itertools.chain([metric.name], (f"{metric.name}_{count}" for count in itertools.count(1)))
            by_name[next(name for name in names if name not in by_name)] = metric
        return by_name

    def compute_loss(self, step: Step, y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
        """The loss of the targets; enters its parts in the step's ledger."""
        step_checks.targets(y, self.loss)
        self._compared = []
        given = {"loss": self.loss, "y": y, "sample_weight": sample_weight, "loss_weights": self.loss_weights}
        with self._inspecting(step, y), step_checks.structures(y_pred, **given):
            total = self._loss(y, y_pred, sample_weight)
        parts = self._parts(total)
        for name, value in parts.items():
            step.ledger.add(name, value)
        step.ledger.take()
        is_plain = self.loss_weights is None and sample_weight is None and len(self._compared) == 1
        self._bounded = f"{LOSS_PART}{next(iter(parts))}" if is_plain and self._compared[0].is_bounded else ""
        return total

    @contextlib.contextmanager
    def _inspecting(self, step: Step, y: Any) -> Iterator[None]:
        """Inside it, `_inspect` checks each loss; while a graph is traced, Keras does not warn of the same mistake."""
        step.inspect = lambda *call: self._inspect(step, y, *call)
        try:
            if tf.executing_eagerly():  # then each step would change the filters, which all threads share
                yield
                return
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*received `from_logits=True`")
                yield
        finally:
            step.inspect, step.loss_values = None, ""

    def _inspect(self, step: Step, y: Any, loss: Any, target: Any, output: Any, weight: Any) -> tuple[Any, Any]:
        """Checks a loss with its target, output and weight; returns the target and weight that the loss gets."""
        if weight is not None:
            leaves = tf.nest.flatten(weight)
            weight = leaves[0] if len(leaves) == 1 else weight  # a list of one, like y
            step.loss_values = f"the values of `loss` {getattr(loss, 'name', '')} of y of shape {target.shape}"
        if isinstance(target, tf.Tensor) and isinstance(output, tf.Tensor):
            if target.shape.rank and output.shape.rank and output.shape[0] is not None:
                # The batch may have any size, but the outputs have a fixed one, such as that of a model's state.
                differ = tf.reshape(tf.not_equal(tf.shape(target)[0], output.shape[0]), [1])
                step.guard.report(differ, [step_checks.row_mismatch(output.shape, "as many as y has")])
            path = next((tuple(path) for path, leaf in keras.tree.flatten_with_path(y) if leaf is target), ())
            compared = plausible.Comparison(loss, target, output, path)
            self._compared.append(compared)
            for doubt in compared.check():
                self._doubts.add(doubt)
            target = compared.checked(step.guard, target)
        return target, weight

    def _parts(self, total: tf.Tensor) -> dict[str, tf.Tensor]:
        """The parts of the loss of the targets, by name: with several outputs one for each, times its weight."""
        by_output = self.output_losses
        if not by_output:
            loss = self.loss if isinstance(self.loss, str) else getattr(self.loss, "name", None)
            return {loss or getattr(self.loss, "__name__", None) or "targets": total}
        weighted = zip(by_output.items(), loss_weights(self._loss), strict=True)
        return {name: metric.result() * weight for (name, metric), weight in weighted}

    def compute_metrics(self, step: Step, y: Any, y_pred: Any, sample_weight: Any) -> dict[str, Any]:
        """Updates the metrics, and returns their results by name."""
        assert step.metrics is not None
        by_output = self.output_losses
        metrics = [] if self._metrics is None else [self._metrics]
        with step_checks.structures(y_pred, y=y, metrics=self.metrics):
            for metric in metrics:
                if not metric.built:
                    with creating_ahead():
                        metric.build(y, y_pred)
                metric.update_state(y, y_pred, sample_weight)
        self._check_metrics(inner for metric in metrics for inner in metric.metrics)
        by_name = [*((metric.name, metric) for metric in metrics), *by_output.items()]
        results = [(name, metric.result()) for name, metric in by_name]
        named = [one for name, result in results for one in step.metrics.named(name, result)]
        step_checks.unique("compute_metrics", [("loss", "the loss"), *((one.name, one.origin) for one in named)])
        return {one.name: one.value for one in named}

    def _check_metrics(self, metrics: Iterable[keras.Metric]) -> None:
        """Warns of metrics of probabilities if a loss takes the outputs as logits."""
        names = [f"'{metric.name}'" for metric in metrics if plausible.expects_probabilities(metric)]
        if names and any(compared.has_logits for compared in self._compared):
            self._doubts.add(
                f"The model outputs logits (`loss` has from_logits=True), but a metric expects probabilities: "
                f"{', '.join(names)}. Pass one with from_logits=True or a threshold of 0.0, or end the model with a "
                f"sigmoid or softmax."
            )

    def completed(self, step: Step, results: dict[str, Any]) -> dict[str, Any]:
        """What a model's own `compute_metrics` returned, with the losses of the outputs as looplab computes them.

        Among its results may be Keras's means of losses, which only Keras's own steps update.
        """
        assert step.metrics is not None
        updated = {name: value for name, value in results.items() if step.metrics.is_updated(value)}
        return {name: mean.result() for name, mean in self.output_losses.items()} | updated

    @contextlib.contextmanager
    def compiling(self, model: keras.Model, optimizer: Any) -> Iterator[None]:
        """Inside it, a model is compiled as the trainer is, so that a file of it is too.

        A model with its own `compile` stays as it is; and if Keras cannot write what the trainer is compiled with, a
        warning says so.
        """
        before = dict(vars(model))
        is_new = self.compiled is not model or optimizer is not model.optimizer
        if is_new and (self.is_used or optimizer is not None) and not overrides(model, "compile"):
            # The optimizer already scales the loss if it should.
            model.compile(**{**compiled_with(self.compiled), "optimizer": optimizer, "auto_scale_loss": False})
            try:
                model.get_compile_config()
            except Exception as error:  # that of a user's `get_config`, too
                warn(f"`save` writes the model without its optimizer, loss and metrics: {' '.join(str(error).split())}")
                vars(model).update(before)
        try:
            yield
        finally:
            vars(model).clear()
            vars(model).update(before)

    def check_arrays(self, name: str, arrays: Any, model: Any) -> None:
        """Checks whole arrays: inputs must be finite, and targets in the range that the loss needs.

        Args:
            name: What errors call x.
            arrays: x, (x, y) or (x, y, sample_weight).
            model: The model that gets x; None if it is unknown.
        """
        x, y, _ = keras.utils.unpack_x_y_sample_weight(arrays)
        plausible.check_finite(name, x)
        if plausible.raw_images(x, model):
            self._doubts.add(
                f"`{name}` looks like images from 0 to 255, and the model has no layer that scales: divide by 255, or "
                f"start the model with `keras.layers.Rescaling(1 / 255)`."
            )
        for compared in self._compared:
            compared.check_array(y, name)

    def check_loss(self, scalars: dict[str, Any]) -> None:
        """Warns if a loss of targets and outputs from 0 to 1 is more than 1."""
        if scalars.get(self._bounded, [0])[0] > 1:
            self._doubts.add(
                "The outputs are all from 0 to 1, but the targets are not: scale them, such as images by 1/255."
            )
