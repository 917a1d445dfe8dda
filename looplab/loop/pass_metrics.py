"""The metrics of one pass: reset before it, read after it, and shown to callbacks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from looplab.loop.graphs import Copies
from looplab.loop.step import StepRunner
from looplab.state import Progress
from looplab.variables import of_each_replica, plain, to_numpy
from looplab.walk import overrides


class PassMetrics:
    """The metrics of a trainer in a pass over data.

    An epoch of training works on the metrics themselves, an evaluation on copies of them.
    """

    def __init__(self, runner: StepRunner):
        self._runner = runner

    def reset(self, copies: Copies | None = None) -> None:
        """Resets the metrics before a pass; those that the pass has copies of, in the copies alone."""
        trainer = self._runner.trainer
        if copies is None or not copies.pairs:
            with self._runner.eager_lock:
                trainer.reset_metrics()
            return
        with keras.StatelessScope() as scope:
            trainer.reset_metrics()
        for variable in self._variables():
            value = scope.get_current_value(variable)
            for part in of_each_replica(variable).values():
                copy = copies.of(part)
                if copy is not None and value is not None:
                    copy.assign(value)

    def reset_updated(self) -> None:
        """Resets the metrics that training steps update, without searching for others."""
        if overrides(self._runner.trainer, "reset_metrics"):
            self._runner.trainer.reset_metrics()
        else:
            for metric in self._runner.batch_metrics.updated["train"]:
                metric.reset_state()

    def results(self, kind: str, step: Any, progress: Progress) -> dict[str, float]:
        """The values of a pass: the results of metrics, and the means of everything else."""
        sources = step.meaning.sources
        metrics = {id(source.metric): source.metric for source in sources.values()}
        with self._runner.eager_lock, self._in_scope(step):
            outcomes = {key: metric.result() for key, metric in metrics.items()}
            found = {name: source.of(outcomes[id(source.metric)]) for name, source in sources.items()}
            results = {name: float(to_numpy(value)) for name, value in found.items()}  # it may be a metric's variable
        results = {name: results.get(name, mean) for name, mean in progress.means.result().items()}
        mean = self._runner.objective.mean
        if kind == "train" and "loss" in results and mean not in self._runner.batch_metrics.updated[kind]:
            mean.update_state(results["loss"])  # which `reset` has cleared; callbacks look it up among the metrics
        return results

    @contextlib.contextmanager
    def unchanged(self, step: Any) -> Iterator[None]:
        """Afterwards all variables are as they were; a graph only changes copies of them."""
        if step.eager:
            with self._runner.eager_lock:
                kept = [(variable, to_numpy(variable)) for variable in self._runner.variables.changeable()]
                try:
                    yield
                finally:
                    for variable, value in kept:
                        variable.assign(value)
                    known = {id(plain(variable)) for variable, _ in kept}
                    for metric in self._runner.trainer.metrics:
                        if any(id(plain(variable)) not in known for variable in metric.variables):
                            metric.reset_state()  # it was built inside
            return
        with step.copies.lock:
            before = [to_numpy(copy) for _, copy in step.copies.pairs]  # of a pass that this one runs inside
            step.copies.refresh()
            try:
                yield
            finally:
                for (_, copy), value in zip(step.copies.pairs, before, strict=True):
                    copy.assign(value)

    def _in_scope(self, step: Any) -> contextlib.AbstractContextManager:
        """Inside it, in this thread, metrics have the values of the pass."""
        if self._runner.strategy.num_replicas_in_sync > 1:  # the metric itself combines several copies
            return self.visible(step, [self])
        copies = [(variable, step.copies.of(variable)) for variable in self._variables()]
        return keras.StatelessScope([(v, tf.convert_to_tensor(copy)) for v, copy in copies if copy is not None])

    @contextlib.contextmanager
    def visible(self, step: Any, viewers: Sequence[Any], loss: float | None = None) -> Iterator[None]:
        """Inside it, metrics have the values of the pass, for callbacks that look at them.

        Args:
            step: Of the pass.
            viewers: Who looks.
            loss: What Keras's tracker of the loss shows.
        """
        values: list[tuple[Any, Any]] = []
        if any(not getattr(viewer, "stateless", False) for viewer in viewers):
            parts = [part for v in self._variables() for part in of_each_replica(v).values()]
            values = [(part, copy) for part in parts if (copy := step.copies.of(part)) is not None]
            mean = self._runner.objective.mean
            if loss is not None and mean not in self._runner.batch_metrics.updated["test"]:
                shown = (mean.total, loss), (mean.count, 1.0)
                values += [(part, value) for v, value in shown for part in of_each_replica(v).values()]
        kept = [(variable, to_numpy(variable)) for variable, _ in values]
        for variable, value in values:
            variable.assign(value)
        try:
            yield
        finally:
            for variable, value in kept:
                variable.assign(value)

    def _variables(self) -> list[Any]:
        return [variable for metric in self._runner.trainer.metrics for variable in metric.variables]
