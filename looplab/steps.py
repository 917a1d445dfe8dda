"""What happens within a step: the methods that a researcher overrides, and the record of what a step tells."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from looplab import checks, plausible
from looplab.guard import NO_ROWS, Guard
from looplab.loop import Meaning, StepLogs
from looplab.losses import Ledger
from looplab.losses import listening as listening_to_layers
from looplab.metrics import BatchMetrics, Named, watching
from looplab.state import settings
from looplab.tracking import Tracked, plain
from looplab.warn import warn
from looplab.weights import ClassWeights, align, examples

LEARNING_RATE = "learning_rate"
LOSS_PART = "loss/"
_STEPS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")


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
        if isinstance(model, keras.Model) and any(map(self._of_model, _STEPS)) and not model.compiled:
            # Its own steps use what it is compiled with.
            model.compile(optimizer=self.optimizer, loss=loss, loss_weights=loss_weights, metrics=metrics)
        self._loss = loss
        self._loss_weights = loss_weights
        self._metrics = metrics
        # What they are at first: a callback may change a rate.
        self._made_with = {"optimizer": settings(self.optimizer), "loss": settings(loss)}
        self.seed = random.randint(1, 10**9) if seed is None else seed
        self.seed_generator = keras.random.SeedGenerator(self.seed)
        self.strategy = tf.distribute.get_strategy()
        # What steps were seen to use, and no attribute leads to.
        self._found: dict[str, list[Any]] = {"variables": [], "metrics": [], "optimizers": []}
        self._class_weights: ClassWeights | None = None
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
        """Learns from one batch: by the model's own `train_step`, if its class has one.

        Args:
            batch: x, (x, y) or (x, y, sample_weight), as tensors.

        Returns:
            This batch's values: scalars by name, also in dicts. The epoch's value of a metric's result, or of an entry
            of it, is that metric's result over the epoch, under whatever name; of any other value it is the mean over
            the batches, weighted by their number of examples.
        """
        if own := self._of_model("train_step"):
            return own(batch)
        x, y, sample_weight = checks.parts(batch)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred, sample_weight)
        self.minimize(tape, loss)
        return {"loss": loss, **self.compute_metrics(x, y, y_pred, sample_weight)}

    def test_step(self, batch: Any) -> dict[str, Any]:
        """Measures one batch: as `train_step`, without learning."""
        if own := self._of_model("test_step"):
            return own(batch)
        x, y, sample_weight = checks.parts(batch)
        y_pred = self(x, training=False)
        loss = self.compute_loss(x, y, y_pred, sample_weight)
        return {"loss": loss, **self.compute_metrics(x, y, y_pred, sample_weight)}

    def predict_step(self, batch: Any) -> Any:
        """The outputs for one batch: a tensor, or a structure of them, with the examples first."""
        if own := self._of_model("predict_step"):
            return own(batch)
        x, _, _ = checks.parts(batch)
        return self(x, training=False)

    def __call__(self, x: Any, training: bool = False) -> Any:
        """Calls the model, with `training` if it takes that."""
        if self.model is None:
            raise ValueError(f"`{type(self).__name__}` was made without `model`: override the steps that call it.")
        takes_training = isinstance(self.model, keras.Layer) or "training" in inspect.signature(self.model).parameters
        checks.inputs(x, self.model)
        return self.model(x, training=training) if takes_training else self.model(x)

    def __getattr__(self, name: str) -> Any:
        if "_now" not in vars(self):
            raise AttributeError(
                f"`{type(self).__name__}.__init__` must call `super().__init__(...)` before `{name}` is used."
            )
        return object.__getattribute__(self, name)  # raises what a property raised

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None) -> tf.Tensor:
        """The loss of a batch, a scalar: `loss` of the targets, and all that the model calls before added to it.

        Each part is written as `batch_loss/<part>`: the loss function's name, the path of each layer that called
        `add_loss` (with `_2` for its second call in this step), and `regularization`.
        """
        if own := self._of_model("compute_loss"):
            return own(x, y, y_pred, sample_weight)
        losses = self._now.ledger.take(self.trainable_variables)
        if self._loss is not None:
            checks.targets(y, self._loss)
            self._target_ranges, self._now.logits = [], []
            given = {"loss": self._loss, "y": y, "sample_weight": sample_weight, "loss_weights": self._loss_weights}
            with checks.structures(y_pred, **given), plausible.inspected(functools.partial(self._inspect, y)):
                total = self._compiled.compute_loss(x, y, y_pred, sample_weight)
            # Keras divides a loss by the number of replicas, `minimize` does here: for losses of every origin.
            total *= self.strategy.num_replicas_in_sync
            for name, value in self._target_losses(total).items():
                self._now.ledger.add(name, value)
                unweighed = self._loss_weights is None and sample_weight is None
                self._bounded = f"{LOSS_PART}{name}" if unweighed and plausible.bounded(self._loss, y_pred) else ""
            self._now.ledger.take(())
            losses.insert(0, total)
        if not losses:
            raise ValueError(
                "There is no loss: pass `loss`, let the model call `add_loss`, or override `compute_loss` or the step."
            )
        return functools.reduce(tf.add, losses)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Updates the running state of `metrics`, and returns their values for this batch alone, by name.

        As in `keras.Model`, `metrics` do not see `sample_weight`. With several outputs, the loss of each is among the
        values.
        """
        by_output = self._output_losses()
        if own := self._of_model("compute_metrics"):
            # Among its results are Keras's means of losses, which only Keras's own `compute_loss` and steps update.
            results = own(x, y, y_pred, sample_weight)
            updated = {name: value for name, value in results.items() if self._batch_metrics.is_updated(value)}
            return {name: mean.result() for name, mean in by_output.items()} | updated
        means = by_output.values()
        metrics = [metric for metric in self._compiled.metrics[1:] if metric not in means]  # the first is the loss
        with checks.structures(y_pred, y=y, metrics=self._metrics):
            for metric in metrics:
                metric.update_state(y, y_pred, sample_weight)
        for metric in metrics:
            self._doubt_metrics(getattr(metric, "metrics", [metric]))
        by_name = [*((metric.name, metric) for metric in metrics), *by_output.items()]
        results = ((name, metric.result()) for name, metric in by_name)
        named = [one for name, result in results for one in self._batch_metrics.named(name, result)]
        checks.unique("compute_metrics", [Named("loss", None, "the loss"), *named])
        return {one.name: one.value for one in named}

    def minimize(
        self, tape: tf.GradientTape, loss: tf.Tensor, variables: Sequence[Any] | None = None, optimizer: Any = None
    ) -> list[tf.Tensor | None]:
        """Takes the gradients of `loss` and lets the optimizer apply them.

        Args:
            tape: The tape under which `loss` was computed.
            loss: A floating scalar: the mean over this replica's examples.
            variables: What to train, as a flat list. By default `trainable_variables`, and any trainable
                `tf.Variable` that the tape saw beyond those.
            optimizer: A Keras optimizer, by default the trainer's.

        Returns:
            The gradients of `loss` in the order of `variables`, without any loss scale; None where the loss does not
            depend on one.

        Raises:
            ValueError: No optimizer, a loss that is not one floating number, or no gradient at all.
        """
        loss = checks.loss(loss)
        optimizer = self.optimizer if optimizer is None else optimizer
        is_default = variables is None
        variables = self._watched(tape) if variables is None else checks.variables(variables)
        if not variables:
            warn(f"{type(self).__name__} has nothing to train: no trainable variables.")
            return []
        if optimizer is None:
            raise ValueError("There is no optimizer: pass `optimizer` to the trainer or to `minimize`.")
        checks.new_variables(optimizer, variables)
        # As the gradient of the scaled loss, without the loss itself being scaled for whoever looks at it.
        one = tf.ones_like(loss) / self.strategy.num_replicas_in_sync
        scale = optimizer.scale_loss(one)
        gradients = tape.gradient(loss, variables, output_gradients=scale)
        checks.gradients(gradients, variables)
        if is_default:
            self._doubt_bare_variables(variables, gradients)
        self._guard.apply(optimizer, gradients, variables, loss, self._now.rows)
        self._now.guarded = True
        self._adopt("optimizers", [optimizer])
        self._adopt("variables", variables)
        self._minimized = [known for known in self._minimized if known.optimizer is not optimizer]
        self._minimized.append(_Minimized(optimizer, variables))
        if scale is one and self.strategy.num_replicas_in_sync == 1:
            return gradients
        return [gradient if gradient is None else _divided(gradient, scale) for gradient in gradients]

    def running_result(self, metric: keras.Metric) -> Any:
        """Within a step: the metric's result over the epoch so far, where `metric.result()` is that of this batch."""
        return self._batch_metrics.running(metric)

    @property
    def losses(self) -> list[tf.Tensor]:
        """Within a step: all that model calls of this step added with `add_loss`, and the weights' regularizers."""
        return list(self._now.ledger.parts(self.trainable_variables).values())

    # Within.

    def _check_test_step(self, argument: str) -> None:
        """There is a step to evaluate with.

        Raises:
            ValueError: A subclass without a model has its own `train_step` alone.
        """
        own = {name for name in ("train_step", "test_step", "__call__") if self._overrides(name)}
        if self.model is None and own == {"train_step"}:
            raise ValueError(
                f"`{argument}` needs `{type(self).__name__}` to override `test_step` too: it has its own `train_step` "
                f"and no `model`. Return the values of one batch from it, as from `train_step`."
            )

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(Steps, name)

    def _of_model(self, name: str) -> Callable[..., Any] | None:
        """The model's own method of this name, where its class overrides that of `keras.Model`."""
        is_own = isinstance(self.model, keras.Model) and getattr(type(self.model), name) is not getattr(
            keras.Model, name
        )
        return getattr(self.model, name) if is_own else None

    def _compile(self) -> None:
        """Forgets how losses and metrics met the outputs of an earlier trace."""
        settings = {"loss": self._loss, "loss_weights": self._loss_weights, "metrics": self._metrics}
        self._compiled.compile(optimizer=self.optimizer, **settings)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Within it, steps can run or be traced: added losses and metrics' updates are seen."""
        with listening_to_layers, plausible.listening, watching:
            yield

    def _run_step(
        self, kind: str, step: Callable[[Any], Any], element_spec: Any, batch: Any, number: tf.Tensor
    ) -> StepLogs:
        """Runs a step of the user's on one replica, and gathers all that it tells."""
        now = self._now
        rates = self._learning_rates() if kind == "train" else {}  # as they are when the step uses them
        with now.open(self._image_every[kind]), now.ledger.open(self.trainable_variables):
            with self._batch_metrics.open(kind, self.metrics):
                self._guard.open()
                # Where Python goes through the step, batches do not say which of their dimensions are fixed.
                known = examples(batch, self._guard.report, element_spec if self.run_eagerly else None)
                weight = 1 if known is None else known
                if self.strategy.num_replicas_in_sync == 1:  # of several, one may have none of a last batch
                    now.rows = weight
                if kind == "train" and self._class_weights is not None:
                    batch = self._class_weights.weigh(batch, plausible.target_kind(self._loss), self._guard.report)
                returned = checks.step_logs(f"{kind}_step", step(batch))
                named = [
                    one
                    for name, value in returned.items()
                    for one in self._batch_metrics.named(name, value, f"returned by `{kind}_step`")
                ]
                logged = now.scalars.items()
                named += [one for name, value in logged for one in self._batch_metrics.named(name, value, "`self.log`")]
                named += self._batch_metrics.not_returned()
                parts = {f"{LOSS_PART}{name}": part for name, part in now.ledger.all().items()}
                named += [Named(name, value, "a part of the loss") for name, value in parts.items()]
                checks.unique(f"{kind}_step", named)
                values = {n: checks.scalar(f"`{kind}_step` returned", n, value) for n, value, *_ in named}
                self._adopt("metrics", self._batch_metrics.updated[kind])
                changed = self._guard.changed_otherwise(self.trainable_variables) if kind == "train" else []
                if changed:
                    losses = {n: value for n, value in values.items() if "loss" in n and value.dtype.is_floating}
                    self._guard.report_applied(losses, changed)
                if not now.guarded:
                    self._guard.report(tf.reshape(tf.equal(now.rows, 0), [1]), [NO_ROWS])
                sources = {one.name: one.source for one in named if one.source is not None}
                means = self._output_losses().values()  # these of Keras's take a ragged last batch for a whole one
                sources = {n: source for n, source in sources.items() if source.metric not in means}
                meaning = self._batch_metrics.meanings[kind] = Meaning(sources, frozenset(rates), frozenset(parts))
                return StepLogs({**rates, **values}, now.images, self._guard.fault(), weight, meaning)

    def _inspect(self, y: Any, loss: Any, target: Any, output: Any, weight: Any) -> tuple[Any, Any]:
        """Looks whether a loss, its target, output and weight go together; the target and weight that the loss gets."""
        path = next((tuple(path) for path, leaf in keras.tree.flatten_with_path(y) if leaf is target), ())
        for doubt in plausible.doubts(loss, target, output, path):
            self._doubts.setdefault(doubt, False)
        if plausible.takes_logits(loss):
            self._now.logits.append(output)
        if isinstance(target, tf.Tensor) and target.shape.rank and output.shape.rank and output.shape[0] is not None:
            # A batch of unknown size, and outputs of a known one: as of a model whose state has a size of its own.
            differ = tf.not_equal(tf.shape(target)[0], output.shape[0])
            self._guard.report(tf.reshape(differ, [1]), [_row_mismatch(output.shape, "as many as y has")])
        if weight is not None:
            name = getattr(loss, "name", "")
            leaves = tf.nest.flatten(weight)
            weight = leaves[0] if len(leaves) == 1 else weight  # a list of one, beside y in a list of one
            shape = plausible.values_shape(loss, target, output)
            weight = align("sample_weight", weight, shape, f"the values of `loss` {name} of y of shape {target.shape}")
        wanted = plausible.wanted(loss, target, output, path)
        if wanted is not None:
            self._target_ranges.append(wanted)
            target = plausible.fitted(self._guard, wanted, target)
        return target, weight

    def _doubt_metrics(self, metrics: Sequence[keras.Metric]) -> None:
        """Warns of metrics of probabilities, where the loss says that the outputs are logits."""
        for metric in metrics if self._now.logits else ():
            if plausible.expects_probabilities(metric):
                self._doubts.setdefault(
                    f"Metric '{metric.name}' expects probabilities, but the model outputs logits (`loss` has "
                    f"from_logits=True): pass a metric with from_logits=True or a threshold of 0.0, or end the model "
                    f"with a sigmoid or softmax.",
                    False,
                )

    def _doubt_bare_variables(self, variables: Sequence[Any], gradients: Sequence[Any]) -> None:
        """Warns of variables that this trains and Keras would not."""
        bare = {id(held.thing): held.path for held in self._walk() if held.is_bare}
        pairs = zip(variables, gradients, strict=True)
        names = [bare[id(v)] for v, gradient in pairs if gradient is not None and id(v) in bare]
        if names:
            self._doubts.setdefault(
                f"looplab trains {', '.join(names)}, which Keras 3 would not: a `tf.Variable` that is an attribute and "
                f"receives a gradient. To keep one constant, create it with trainable=False.",
                False,
            )

    def _adopt(self, kind: str, things: Iterable[Any]) -> None:
        """Keeps what a step uses among what the trainer holds, if nothing leads to it yet."""
        held = {"optimizers": self.optimizers.values(), "metrics": self.metrics, "variables": self._held_state()}[kind]
        known = {id(part) for thing in held for part in (thing, plain(thing))}
        self._found[kind] += [thing for thing in things if id(plain(thing)) not in known]

    def _check_arrays(self, name: str, arrays: Any) -> None:
        """Looks for what a loss cannot learn from.

        Args:
            name: What an error calls x.
            arrays: x, (x, y) or (x, y, sample_weight), whole.
        """
        x, y, _ = keras.utils.unpack_x_y_sample_weight(arrays)
        plausible.check_finite(name, x)
        if plausible.raw_images(x, self.model) and not self._overrides("__call__"):
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

    def _predict(self, step: Callable[[Any], Any], batch: Any) -> Any:
        """Runs the prediction step on one replica; what it logs is forgotten."""
        with self._now.open({}):
            return step(batch)

    def _check_rows(self, element_spec: Any, batch: Any, outputs: Any) -> None:
        """The default prediction step gives one row for each example.

        Raises:
            ValueError: It gives another number of rows, such as where a model's state broadcasts against a short batch.
        """
        if not self._overrides("predict_step") and self.strategy.num_replicas_in_sync == 1:
            x, signature = (checks.parts(part)[:1] for part in (batch, element_spec))
            known = examples(x, signature=signature)
            expected = None if known is None else int(known)
            for output in tf.nest.flatten(outputs):
                if output.shape[:1] != (expected,) and expected is not None:
                    raise ValueError(f"`predict`: {_row_mismatch(output.shape, expected)}.")

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
            weights = [weights.get(name.removesuffix("_loss"), 1.0) for name in by_output]
        weighted = zip(by_output.items(), weights or [1.0] * len(by_output), strict=True)
        return {name: metric.result() * weight for (name, metric), weight in weighted}

    def _output_losses(self) -> dict[str, keras.Metric]:
        """Keras's means of the loss of each output, where there are several.

        Keras names those of outputs without names after the loss function: `mse_loss`, then `mse_loss_1` here, as Keras
        itself tells metrics of one name apart.
        """
        by_name: dict[str, keras.Metric] = {}
        for metric in self._compiled.metrics:
            if isinstance(metric, keras.metrics.Mean) and metric.name.endswith("_loss"):
                names = itertools.chain([metric.name], (f"{metric.name}_{count}" for count in itertools.count(1)))
                by_name[next(name for name in names if name not in by_name)] = metric
        return by_name

    def _watched(self, tape: tf.GradientTape) -> list[Any]:
        """`trainable_variables`, and what else the tape saw that nothing leads to: it is kept from then on."""
        self._adopt("variables", tape.watched_variables())
        return self.trainable_variables


def _row_mismatch(shape: Any, expected: Any) -> str:
    return (
        f"the model returns {shape[0] if len(shape) else 'no'} rows for a batch of {expected}: a stateful model needs "
        f"batches of one size, such as with `drop_remainder=True`"
    )


def _divided(gradient: Any, scale: tf.Tensor) -> Any:
    scale = tf.cast(scale, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values / scale, gradient.indices, gradient.dense_shape)
    return gradient / scale


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
        self.logits: list[Any] = []
        self.graph: Any = None
        self.ledger = Ledger()
        self.scalars: dict[str, tf.Tensor] = {}
        self.images: dict[str, tf.Tensor] = {}
        self.image_every: dict[str, int] = {}

    @contextlib.contextmanager
    def open(self, image_every: dict[str, int]) -> Iterator[None]:
        """Within it runs a step; of the images that it logs, `image_every` is told how often each is due."""
        self.running, self.scalars, self.images, self.image_every = True, {}, {}, image_every
        self.guarded, self.rows, self.logits = False, 1, []
        self.graph = tf.compat.v1.get_default_graph()
        try:
            yield
        finally:
            self.running = False
