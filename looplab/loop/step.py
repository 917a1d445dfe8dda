"""One step on one replica: from a batch to everything that the step returns, logs and finds wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from looplab.compat import converted, drawing_from, trained_by
from looplab.keras_models import with_rates
from looplab.loop import context, plausible, replicas, step_checks
from looplab.loop.fused import FusedUpdates
from looplab.loop.graphs import creating_ahead
from looplab.loop.guard import NO_ROWS, Guard
from looplab.loop.metrics import BatchMetrics, Named, Source
from looplab.loop.objective import LOSS_PART, Objective
from looplab.loop.weights import ClassWeights, examples
from looplab.variables import Variables, to_numpy
from looplab.warn import Warnings

LEARNING_RATE = "learning_rate"


class Meaning(NamedTuple):
    """Where the scalars of a step come from, and who sees them."""

    sources: dict[str, Source]
    """The metrics that scalars are results of."""
    rates: frozenset[str]
    """Learning rates, which only TensorBoard shows."""
    parts: frozenset[str]
    """Parts of the loss, which only TensorBoard shows."""

    def whole(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values by name, in which the entries of a metric's result are one array, as Keras logs it."""
        found: dict[str, Any] = {}
        for name, value in values.items():
            entry = self.sources[name].entry if name in self.sources else ()
            if not entry:
                found[name] = value
                continue
            whole = "/".join(name.split("/")[: -len(entry)])
            found.setdefault(whole, {})[entry] = value
        return {name: _array(value) if isinstance(value, dict) else value for name, value in found.items()}


def _array(entries: dict[tuple[int, ...], Any]) -> np.ndarray:
    """All entries of an array, in their order."""
    return np.reshape([*entries.values()], [size + 1 for size in max(entries)])


class StepLogs(NamedTuple):
    """What one replica returns for its part of a batch."""

    scalars: dict[str, tf.Tensor]
    """Scalars of any numeric dtype, by name."""
    images: dict[str, tf.Tensor]
    """uint8 images of shape (n, height, width, channels), by name."""
    fault: Any = 0
    """int32: 0, or the guard's code of a fault, for which the step did not update what it trains."""
    weight: Any = 1
    """How many examples the replica has."""
    meaning: Meaning = Meaning({}, frozenset(), frozenset())


class StepRunner:
    """Runs the steps of a trainer.

    Args:
        trainer: Whose steps, metrics and trainable variables are used.
        objective: Its loss and metrics.
        variables: What it holds.
        warnings: For what looks wrong but may be intended.
        strategy: Where steps run.
    """

    def __init__(
        self,
        trainer: Any,
        objective: Objective,
        variables: Variables,
        warnings: Warnings,
        strategy: tf.distribute.Strategy,
    ):
        self.trainer = trainer
        self.objective = objective
        self.variables = variables
        self.warnings = warnings
        self.strategy = strategy
        self.guard = Guard()
        self.eager_lock = threading.RLock()
        """Held while steps run eagerly, or read what they change: evaluations then use the variables themselves."""
        self.batch_metrics = BatchMetrics()
        self.seeds: keras.random.SeedGenerator | None = None
        """With several replicas, of `keras.random` functions without a seed."""
        self.fused_updates = False
        """Whether TensorFlow's fused kernels update large variables."""
        self.class_weights: ClassWeights | None = None
        """Of the running `fit`."""
        self.image_every: dict[str, dict[str, int]] = {"train": {}, "test": {}, "predict": {}}
        """By kind of step and image name, how often an image is due."""
        self.minimized: dict[int, tuple[keras.Optimizer, list[Any]]] = {}
        """By identity, each optimizer that steps use, and the variables that it trains."""

    def run(self, kind: str, function: Callable[[Any], Any], signature: Any, batch: Any) -> StepLogs:
        """Runs a training or test step.

        Args:
            kind: "train" or "test".
            function: The step.
            signature: That of the batch, which says which dimensions are fixed; None uses the batch itself.
            batch: This replica's part of it.
        """
        trainer, guard, metrics = self.trainer, self.guard, self.batch_metrics
        step = self.new_step(kind)
        if kind == "train":
            optimizers = with_rates(self.variables.optimizers()).values()
            step.rates = {id(one): tf.convert_to_tensor(one.learning_rate) for one in optimizers}
            step.trains, step.fused = self.prepare, FusedUpdates() if self.fused_updates else None
        assert step.metrics is not None
        with context.running(step), drawing_from(self.seeds):
            step.ledger.start(trainer.trainable_variables)
            guard.start()
            known = examples(batch, guard.report, signature)
            weight = 1 if known is None else known
            if self.strategy.num_replicas_in_sync == 1:
                step.rows = weight
            else:  # now, because TensorFlow runs the other replicas meanwhile, and calls of a model clear its `losses`
                step.share = replicas.share(weight)
                before = {id(one): tf.convert_to_tensor(one) for one in replicas.own(self.variables.held())}
            if kind == "train" and self.class_weights is not None:
                batch = self.class_weights.weigh(batch, plausible.targets_of(self.objective.loss), guard.report)
            returned = step_checks.step_logs(f"{kind}_step", converted(function)(batch))
            rates = self._learning_rates(step) if kind == "train" else {}
            named, parts = self._named(step, returned, rates)
            values = {n: step_checks.scalar(f"`{kind}_step` returned", n, value) for n, value, *_ in named}
            self.variables.adopt("metrics", metrics.updated[kind])
            if step.share is not None:
                self._settle(before, weight, step.share[1])
            if step.fused and (text := step.fused.warning(step.share is not None, trainer.jit_compile)):
                self.warnings.add(text)
            changed = guard.changed_otherwise(trainer.trainable_variables) if kind == "train" else []
            if changed:
                losses = {n: value for n, value in values.items() if "loss" in n and value.dtype.is_floating}
                if step.share is not None:  # a replica without examples has no loss
                    losses = {n: replicas.counted(value, step.share[0]) for n, value in losses.items()}
                guard.report_applied(losses, changed)
            if not step.is_guarded:
                guard.report(tf.reshape(tf.equal(step.rows, 0), [1]), [NO_ROWS])
            # Keras's means of the loss of each output weigh a smaller last batch like any other.
            by_output = self.objective.output_losses.values()
            sources = {one.name: one.source for one in named if one.source and one.source.metric not in by_output}
            meaning = Meaning(sources, frozenset(rates), frozenset(parts))
            logs = StepLogs({**rates, **values}, step.images, guard.fault(), weight, meaning)
            metrics.reset()
            return logs

    def predict(self, function: Callable[[Any], Any], batch: Any) -> Any:
        """Runs a prediction step; what it logs is forgotten."""
        with context.running(context.Step("predict", self.guard, None, {})), drawing_from(self.seeds):
            return converted(function)(batch)

    def create_seeds(self) -> None:
        """Creates `seeds`, if there are several replicas: a step can create no variables that all of them share."""
        if self.seeds is None and self.strategy.num_replicas_in_sync > 1:
            with self.strategy.scope():
                self.seeds = keras.random.SeedGenerator(self.trainer.seed, name="seeds")

    def new_step(self, kind: str) -> context.Step:
        """A step that has not recorded anything yet."""
        metrics = self.batch_metrics.step(kind, self.trainer.metrics)
        return context.Step(kind, self.guard, metrics, self.image_every[kind])

    def prepare(self, optimizer: keras.Optimizer, variables: Sequence[Any] | None) -> None:
        """Builds an optimizer that a step applies, and holds it and what it trains."""
        variables = list(trained_by(optimizer) if variables is None else variables)

        def build(_: tf.distribute.Strategy) -> None:
            # Outside of the graph, in which each step would repeat what `build` assigns.
            with tf.init_scope(), creating_ahead(), keras.name_scope(optimizer.name, caller=optimizer):
                optimizer.build(variables)

        if not optimizer.built:
            tf.distribute.get_replica_context().merge_call(build)  # once, for all replicas
        if step := context.current():
            step.uses_rates(with_rates({"": optimizer}).values())
        self.variables.adopt("optimizers", [optimizer])
        self.variables.adopt("variables", variables)
        self.minimized[id(optimizer)] = optimizer, variables

    def updates(self) -> dict[str, int]:
        """How many updates each optimizer has made, by path."""
        return {path: int(to_numpy(one.iterations)) for path, one in self.variables.optimizers().items()}

    def finalize(self, since: dict[str, int]) -> None:
        """Lets averages of weights become the weights, as Keras does at the end of `fit`: with `use_ema`.

        Args:
            since: Only of optimizers that have made updates since these numbers of them, by path.
        """
        now = self.updates()
        for path, optimizer in self.variables.optimizers().items():
            if id(optimizer) in self.minimized and now[path] != since.get(path, 0):
                optimizer.finalize_variable_values(self.minimized[id(optimizer)][1])

    def save(self, path: Path, overwrite: bool) -> None:
        """Writes the one Keras model that has all weights, compiled as the trainer is."""
        model = self.variables.one_model("save")
        with self.objective.compiling(model, self.trainer.optimizer):
            model.save(path, overwrite=overwrite)

    def warn_of_bare_variables(self, variables: Sequence[Any], gradients: Sequence[Any]) -> None:
        """Warns of variables that looplab trains and Keras would not."""
        bare = self.variables.bare()
        pairs = zip(variables, gradients, strict=True)
        names = [bare[id(v)] for v, gradient in pairs if gradient is not None and id(v) in bare]
        if names:
            self.warnings.add(
                f"looplab trains {', '.join(names)}, which Keras 3 would not: a `tf.Variable` that is an attribute and "
                f"receives a gradient. To keep one constant, create it with trainable=False."
            )

    def _settle(self, before: dict[int, tf.Tensor], rows: Any, total: Any) -> None:
        """Ends what a step on one of several replicas did to variables, which had these values by identity."""
        changed = self.guard.changed_otherwise(replicas.own(self.variables.held()))
        replicas.settle(changed, before, {*map(id, self.variables.weights())}, rows, total)

    def _named(
        self, step: context.Step, returned: dict[str, Any], rates: Iterable[str]
    ) -> tuple[list[Named], list[str]]:
        """All values of a step but its learning rates, and the names of those that are parts of the loss."""
        assert step.metrics is not None
        origin = f"returned by `{step.kind}_step`"
        named = [one for name, value in returned.items() for one in step.metrics.named(name, value, origin)]
        named += [one for name, value in step.scalars.items() for one in step.metrics.named(name, value, "`self.log`")]
        named += step.metrics.not_returned()
        parts = [Named(f"{LOSS_PART}{n}", part, "a part of the loss") for n, part in step.ledger.all().items()]
        origins = [*((name, "the learning rate of an optimizer") for name in rates)]
        origins += [(one.name, one.origin) for one in [*named, *parts]]
        step_checks.unique(f"{step.kind}_step", origins)
        return [*named, *parts], [part.name for part in parts]

    def _learning_rates(self, step: context.Step) -> dict[str, tf.Tensor]:
        """Of those that steps use, that of the trainer's `optimizer` as `learning_rate`, any other under its path."""
        optimizers = self.variables.optimizers().items()
        used = {path: optimizer for path, optimizer in optimizers if id(optimizer) in self.minimized}
        return {
            LEARNING_RATE + ("" if path == "optimizer" else f"/{path}"): step.rates[id(optimizer)]
            for path, optimizer in with_rates(used).items()
            if id(optimizer) in step.rates
        }
