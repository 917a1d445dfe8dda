"""One step on one batch: `train_on_batch`, `test_on_batch` and `predict_on_batch`."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from typing import Any

import tensorflow as tf

from looplab.checkpoint.policy import Checkpoint
from looplab.checkpoint.snapshot import Asked, Snapshot, values_of
from looplab.data.arrays import is_arrays, to_arrays
from looplab.data.resident import Single
from looplab.loop.engine import Engine
from looplab.loop.outputs import joined, listed, ordered
from looplab.loop.resume import open_store
from looplab.loop.weights import ClassWeights
from looplab.state import Progress


class OnBatch:
    """Runs single steps, for programs with a loop of their own.

    The first training step locks the log folder until the trainer is deleted, since all steps belong to one run.

    Args:
        engine: That of the trainer.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._faults = 0  # in a row
        self._store: Any = None
        self._orders: dict[tuple[str, ...], list[str]] = {}  # of the values in Keras's lists, by their names
        self._on_exit = contextlib.ExitStack()

    def train(
        self, arrays: tuple[Any, Any, Any], class_weight: Any, checkpoint: Checkpoint | None, return_dict: bool
    ) -> Any:
        """Learns from one batch, x, y and sample_weight; returns its values, and saves if that is due."""
        engine, state = self._engine, self._engine.state
        _alone(engine)
        if self._store is None:
            self._open(checkpoint)
        engine.runner.class_weights = ClassWeights.of(class_weight)
        engine.metrics.reset_updated()
        progress = Progress(faults=self._faults)
        values = self._run("train", arrays, progress, "train", return_dict)
        self._faults = progress.faults
        if self._store.is_due_after_step(state.steps):
            self._save()
        return values

    def test(self, arrays: tuple[Any, Any, Any], return_dict: bool) -> Any:
        """Evaluates one batch, x, y and sample_weight; returns its values."""
        _alone(self._engine)
        return self._run("test", arrays, Progress(), None, return_dict)

    def predict(self, x: Any) -> Any:
        """The outputs for one batch."""
        _alone(self._engine)
        data = _single(x)
        step = self._engine.tracer.recent("predict", data.element_spec)
        with self._engine.metrics.unchanged(step):
            logs, _, _ = self._engine.advance("predict", step, data, 1, Progress(), None)
        results = self._engine.runner.strategy.experimental_local_results  # each replica has the whole batch
        return tf.nest.map_structure(lambda output: joined(results(output)[0]), logs.outputs)

    def wait(self) -> None:
        """Waits until the last checkpoint is written."""
        if self._store is not None:
            self._store.wait()

    def _run(
        self, kind: str, arrays: tuple[Any, Any, Any], progress: Progress, folder: str | None, return_dict: bool
    ) -> Any:
        engine, data = self._engine, _single(*arrays)
        step = engine.tracer.recent(kind, data.element_spec)
        unchanged = engine.metrics.unchanged(step) if kind == "test" else contextlib.nullcontext()
        with unchanged:
            logs, _, stops = engine.advance(kind, step, data, 1, progress, folder)
        if stops:
            raise engine.fault(kind, "x", progress, logs).error(engine.state.steps + 1, 1, engine.folder.path)
        values = engine.shown(step, logs)[0]
        if return_dict:
            return values
        if tuple(values) not in self._orders:  # since to search the metrics takes longer than the step
            self._orders[tuple(values)] = ordered(values, engine.runner.trainer.metrics)
        return listed(values, self._orders[tuple(values)])

    def _open(self, checkpoint: Checkpoint | None) -> None:
        """Takes the log folder, and continues the run in it if a checkpoint was restored."""
        folder = self._engine.folder
        self._on_exit.enter_context(folder.owned(resume=folder.resumed is not None))
        self._store = open_store(self._engine, checkpoint)
        weakref.finalize(self, self._store.wait)
        folder.take(resumes=folder.resumed is not None)

    def _save(self) -> None:
        engine, runner = self._engine, self._engine.runner
        self._store.wait()  # for at most one copy of the variables in memory
        with runner.eager_lock:
            variables = values_of(runner.variables.by_path())
        snapshot = Snapshot(
            state=dataclasses.replace(engine.state, logs={}),
            asked=Asked(0, {}, runner.objective.made_with, {}),
            stopped_by="",
            starts=[0, 0],
            files=engine.folder.events.sizes(),
            appended={},
            callbacks={},
            variables=variables,
        )
        self._store.commit(snapshot, None, engine.folder.events.files())


def _alone(engine: Engine) -> None:
    if engine.workers.number > 1:
        raise ValueError(
            f"Single batches are of one process, and the trainer has {engine.workers.number} workers. Call `fit`, "
            f"`evaluate` or `predict`, in which they share each batch."
        )


def _single(x: Any, y: Any = None, sample_weight: Any = None) -> Single:
    """One batch, given as arrays."""
    if x is not None and not is_arrays(x):
        raise TypeError(f"`x` must be one batch, an array or a dict or tuple of arrays; got {type(x).__name__}.")
    return Single(to_arrays("x", x, y, sample_weight))
