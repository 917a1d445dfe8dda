"""`Trainer`: `fit`, `evaluate` and `predict` around the steps of `steps.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from looplab import checks, data
from looplab.callbacks import EpochLine, ProgressBar, hooked_to_batches
from looplab.log import Logs
from looplab.loop import CallLogs, Loop, Pace
from looplab.metrics import Means, named_result
from looplab.steps import LEARNING_RATE
from looplab.tracking import to_numpy


class Trainer(Logs):
    """Trains any callable with variables.

    Override `train_step` (and `test_step`, `predict_step`, `compute_loss`, `compute_metrics`) as in
    `keras.Model`; everything else stays as it is. What a subclass sets as attributes (models, optimizers, metrics,
    variables, also in lists and dicts) is found by itself. To train on several devices, make the trainer inside
    `strategy.scope()`.

    Args:
        model: A Keras model or layer, a `tf.Module`, or a function over variables: called with a batch's x, and with
            `training=` where it takes that. Optional for a subclass with its own steps.
        optimizer, loss, loss_weights, metrics: As in `keras.Model.compile`. Without `loss`, what the model adds with
            `add_loss` is the loss.
        log_dir: Folder for TensorBoard's event files, `train` and `validation` below it. None writes nothing.
        seed: Of the order of the data and of `seed_generator`. By default it is drawn from Python's `random`, which
            `keras.utils.set_random_seed` seeds, as Keras draws the seeds of its layers.
        steps_per_execution: How many steps one graph call does. "auto" keeps about five returns to Python a second.
            It never changes a result.
        jit_compile: Whether XLA compiles the step.
        run_eagerly: Whether Python goes through the step line by line, for debugging: slow.

    Attributes:
        history: The `keras.callbacks.History` of the last `fit`.
        seed_generator: A `keras.random.SeedGenerator` for the random numbers of a step.
        steps: How many training steps were done since the trainer was made.
        epochs: How many epochs were done.
        stop_training: A callback sets it to end `fit` after the running graph call.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        optimizer: Any = None,
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        log_dir: str | Path | None = None,
        seed: int | None = None,
        steps_per_execution: int | str = "auto",
        jit_compile: bool = False,
        run_eagerly: bool = False,
    ):
        checks.steps_per_execution(steps_per_execution)
        super().__init__(model, optimizer, loss, loss_weights, metrics, seed, log_dir)
        self.steps_per_execution = steps_per_execution
        self.jit_compile = jit_compile
        self.run_eagerly = run_eagerly
        self.history: keras.callbacks.History | None = None
        self.stop_training = False
        self.steps = 0
        self._test_steps = 0
        self._traced: list[_Traced] = []

    # The loops around the steps.

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Sequence[int] = 1,
    ) -> keras.callbacks.History:
        """Trains; the arguments are those of `keras.Model.fit`.

        Args:
            x: Arrays (with `y`, `sample_weight`), a `tf.data.Dataset` of batches, or a function of the epoch that
                returns one. The epoch counts from 0 since the trainer was made. Arrays are shuffled anew each epoch,
                by the trainer's seed and the epoch alone.
            steps_per_epoch: The data then goes on in the next epoch where it stopped, and begins again at its end.
            callbacks: Keras callbacks, which see this batch's values as the logs of a batch. With
                `steps_per_execution="auto"`, one that acts on training batches makes each graph call one step; with a
                number, its hooks are called for each step after the call.
            verbose: 1, or "auto": a bar, where standard error is a terminal. 2: a line for each epoch. 0: nothing.

        Returns:
            The history: `history.history["val_loss"]` is a list with one number for each epoch.
        """
        checks.positive(epochs=epochs, batch_size=batch_size, steps_per_epoch=steps_per_epoch)
        checks.positive(validation_steps=validation_steps, validation_batch_size=validation_batch_size)
        checks.positive(validation_freq=validation_freq if isinstance(validation_freq, int) else None)
        given = list(callbacks or [])
        checks.callbacks(given)
        if validation_split and validation_data is None:
            if not data.is_arrays(x):
                raise ValueError("`validation_split` splits arrays; of a data set, pass a part as `validation_data`.")
            arrays, validation_data = data.split(data.to_arrays("x", x, y, sample_weight), validation_split)
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(arrays)
        first = max(self.epochs, initial_epoch)
        train = self._batches(
            "x", x, y, sample_weight, batch_size, shuffle, class_weight, steps_per_epoch, training_from=first
        )
        validation = None
        if validation_data is not None:
            val_x, val_y, val_weight = keras.utils.unpack_x_y_sample_weight(validation_data)
            size = validation_batch_size or (batch_size if data.is_arrays(val_x) else None)
            validation = self._batches("validation_data", val_x, val_y, val_weight, size, steps=validation_steps)
        self._claim_log_dir()

        loop = self._prepared("train", train.element_spec, self.run_eagerly)
        if verbose:
            given.append(EpochLine() if verbose == 2 else ProgressBar())
        callback_list = keras.callbacks.CallbackList(
            given, add_history=True, model=self, epochs=epochs, steps=train.steps, verbose=verbose
        )
        self.epochs, self.stop_training = first, False
        iterator = None
        logs: dict[str, float] = {}
        try:
            callback_list.on_train_begin()
            for epoch in range(initial_epoch, epochs):
                self._reset_metrics()
                callback_list.on_epoch_begin(epoch)
                if iterator is None or not train.continues:
                    iterator = iter(train.start(self.epochs))
                    loop = self._prepared("train", iterator.element_spec, self.run_eagerly)
                logs = self._run("train", loop, iterator, train.steps, callback_list, "train")
                self.epochs += 1
                self._events.scalars("train", self.epochs, _epoch_tags(logs))
                if validation is not None and _due(validation_freq, epoch):
                    results = self._evaluate(validation, callback_list, "validation")
                    self._events.scalars("validation", self.epochs, _epoch_tags(results))
                    logs |= {f"val_{name}": value for name, value in results.items()}
                callback_list.on_epoch_end(epoch, logs)
                if self.stop_training:
                    break
            for known in self._minimized:  # as Keras does: of an optimizer with `use_ema`, the averages are the weights
                known.optimizer.finalize_variable_values(known.variables)
            callback_list.on_train_end(logs)
        finally:
            self._events.close()
        assert self.history is not None  # the list of callbacks set it
        return self.history

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
    ) -> dict[str, float]:
        """Measures the data (given as to `fit`) with `test_step`, and leaves everything as it was.

        Returns:
            The loss and each metric over all the data, by name.
        """
        checks.positive(batch_size=batch_size, steps=steps)
        checks.callbacks(callbacks or [])
        batches = self._batches("x", x, y, sample_weight, batch_size, steps=steps)
        bar = [ProgressBar()] if verbose else []
        callback_list = keras.callbacks.CallbackList([*(callbacks or []), *bar], model=self, steps=batches.steps)
        return self._evaluate(batches, callback_list)

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
    ) -> Any:
        """The outputs of `predict_step` for all the data, as NumPy arrays, and leaves everything as it was."""
        checks.positive(batch_size=batch_size, steps=steps)
        checks.callbacks(callbacks or [])
        batches = self._batches("x", x, None, None, batch_size, steps=steps)
        bar = [ProgressBar()] if verbose else []
        callback_list = keras.callbacks.CallbackList([*(callbacks or []), *bar], model=self, steps=batches.steps)

        step = self._predictor(batches.element_spec)
        outputs: list[Any] = []
        iterator = iter(batches.start(0))
        with self._undisturbed():
            callback_list.on_predict_begin()
            while batches.steps is None or len(outputs) < batches.steps:
                batch = iterator.get_next_as_optional()
                if not batch.has_value():
                    break
                callback_list.on_predict_batch_begin(len(outputs))
                outputs.append(tf.nest.map_structure(self._gathered, step(batch.get_value())))
                callback_list.on_predict_batch_end(len(outputs) - 1, {"outputs": outputs[-1]})
            callback_list.on_predict_end()
        if not outputs:
            raise ValueError("`x` has no batch: it ended at once. Pass at least one.")
        return tf.nest.map_structure(_joined, *outputs)

    def build(self, x: Any, y: Any = None, sample_weight: Any = None) -> None:
        """Makes all variables of models, metrics and optimizers, from the data's signature: nothing is run.

        `fit` does it by itself; `load_weights` needs it before.
        """
        self._prepared("train", self._batches("x", x, y, sample_weight).element_spec, eagerly=False)

    # Within.

    def _batches(
        self,
        name,
        x,
        y=None,
        sample_weight=None,
        batch_size=None,
        shuffle=False,
        class_weight=None,
        steps=None,
        training_from=None,
    ):
        return data.from_arguments(
            name,
            x,
            y,
            sample_weight,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
            class_weight=class_weight,
            steps=steps,
            training_from=training_from,
            strategy=self.strategy,
        )

    def _prepared(self, kind: str, element_spec: Any, eagerly: bool) -> Loop:
        """The loop of a kind of step, "train" or "test", for data of this signature; all variables are made then."""

        def make() -> Loop:
            step = functools.partial(self._run_step, kind, {"train": self.train_step, "test": self.test_step}[kind])
            metrics = None
            while metrics != self.metrics:  # those that a trace makes are seen by the next alone
                metrics = self.metrics
                with self._recording():
                    loop = Loop(step, element_spec, self._image_every[kind], self.strategy, self.jit_compile, eagerly)
            return loop

        return self._traced_once((kind, self.jit_compile, eagerly), element_spec, make)

    def _predictor(self, element_spec: Any) -> Callable[[Any], Any]:
        """The prediction step for data of this signature, traced, so that all variables are made."""

        def one_batch(batch):
            return self.strategy.run(self._predict, (batch,))

        def make() -> Callable[[Any], Any]:
            if self.run_eagerly:
                return one_batch
            return tf.function(one_batch, jit_compile=self.jit_compile or None).get_concrete_function(element_spec)

        return self._traced_once(("predict", self.jit_compile, self.run_eagerly), element_spec, make)

    def _traced_once(self, key: Any, element_spec: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns: made anew for another key or signature, or when what it holds fast was exchanged."""
        trained = [*map(id, self._trained())]
        self._traced = [known for known in self._traced if [*map(id, known.trained)] == trained]
        for known in self._traced:
            if known.key == key and known.element_spec == element_spec:
                return known.call
        call = make()
        self._traced.append(_Traced(key, element_spec, call, self._trained()))
        return call

    def _trained(self) -> list[Any]:
        """What a trace holds fast, and a user may exchange between two calls of `fit`."""
        return [*self.trainable_variables, *self.optimizers.values()]

    def _run(self, kind, loop, iterator, steps, callbacks, folder: str | None) -> dict[str, float]:
        """Runs an epoch of training, or one evaluation, and returns its logs."""
        hooks = hooked_to_batches(callbacks.callbacks, kind)
        pace = Pace(self._pace(hooks))
        means, done = Means(), 0
        while steps is None or done < steps:
            asked = pace.next(None if steps is None else steps - done)
            began = time.time()
            if asked == 1:
                for hook in hooks:
                    getattr(hook, f"on_{kind}_batch_begin")(done)
            with self._recording() if loop.eager else contextlib.nullcontext():
                logs = loop(iterator, asked, 1 + (self.steps if kind == "train" else done))
            pace.took(logs.done, time.time() - began)
            means.add(logs.weights, logs.scalars)
            if folder is not None:
                self._write(kind, folder, loop, logs, began)
            done += logs.done
            if hooks:
                self._replay(kind, hooks, logs, done - logs.done, begin=asked > 1)
            if logs.done < asked and steps is not None:
                warnings.warn(f"The data ended after {done} of {steps} batches.", stacklevel=3)
            if logs.done < asked or (kind == "train" and self.stop_training):
                break
        if not done:
            raise ValueError(f"The data for `{kind}_step` has no batch: it ended at once. Pass at least one.")
        tracked: dict[str, Any] = {}
        unweighed = self._output_losses()  # Keras's means of these take a ragged last batch for a whole one
        for metric in self._updated[kind].values():
            if metric not in unweighed:
                tracked |= named_result(metric)
        logged = {name: mean for name, mean in means.result().items() if not name.startswith(LEARNING_RATE)}
        results = {name: float(tracked.get(name, mean)) for name, mean in logged.items()}
        keras_mean = self._compiled.metrics[0]
        if "loss" in results and keras_mean not in self._updated[kind].values():
            keras_mean.update_state(results["loss"])  # for callbacks that look it up among the metrics
        return results

    def _write(self, kind: str, folder: str, loop: Loop, logs: CallLogs, began: float) -> None:
        """Writes what a graph call told; validation has a step count of its own, which goes on rising."""
        before = self.steps if kind == "train" else self._test_steps
        self._events.steps(folder, 1 + before, {f"batch_{n}": values for n, values in logs.scalars.items()}, began)
        for index, name, files in logs.images:
            self._events.images(folder, 1 + before + index, {name: files})
        if kind == "train":
            self._events.graph(folder, loop.graph)
            self.steps += logs.done
        else:
            self._test_steps += logs.done

    def _pace(self, hooks: Sequence[keras.callbacks.Callback]) -> int | str:
        if self.steps_per_execution != "auto":
            return self.steps_per_execution
        return "auto" if not self.run_eagerly and all(getattr(hook, "async_safe", False) for hook in hooks) else 1

    def _replay(self, kind: str, hooks: Sequence[Any], logs: CallLogs, first: int, begin: bool) -> None:
        """Calls the hooks for each step that a graph call did, with the values of that step."""
        columns = {n: v.tolist() for n, v in logs.scalars.items() if not n.startswith(LEARNING_RATE)}
        for index in range(logs.done):
            values = {name: column[index] for name, column in columns.items()}
            for hook in hooks:
                if begin:
                    getattr(hook, f"on_{kind}_batch_begin")(first + index)
                getattr(hook, f"on_{kind}_batch_end")(first + index, values)

    def _evaluate(self, batches: data.Batches, callbacks: Any, folder: str | None = None) -> dict[str, float]:
        loop = self._prepared("test", batches.element_spec, self.run_eagerly)
        with self._undisturbed():
            self._reset_metrics()
            callbacks.on_test_begin()
            logs = self._run("test", loop, iter(batches.start(0)), batches.steps, callbacks, folder)
            callbacks.on_test_end(logs)
        return logs

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Afterwards each variable that is not trained (metrics, seeds, moving means) is as it was before."""
        trained = {id(variable) for variable in self.trainable_variables}
        kept = [(variable, to_numpy(variable)) for variable in self._state() if id(variable) not in trained]
        try:
            yield
        finally:
            for variable, value in kept:
                variable.assign(value)

    def _reset_metrics(self) -> None:
        for metric in self.metrics:
            metric.reset_state()

    def _gathered(self, value: Any) -> Any:
        """All replicas' rows, in order."""
        return _joined(*self.strategy.experimental_local_results(value))


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A trace, and what it holds fast."""

    key: Any
    element_spec: Any
    call: Any
    trained: list[Any]


def _joined(*parts: Any) -> Any:
    """The rows of all parts as one array, or as one `tf.RaggedTensor`."""
    whole = tf.concat(parts, 0)
    return whole.numpy() if isinstance(whole, tf.Tensor) else whole


def _epoch_tags(logs: dict[str, float]) -> dict[str, float]:
    return {f"epoch_{name}": value for name, value in logs.items()}


def _due(validation_freq: int | Sequence[int], epoch: int) -> bool:
    """Whether Keras would validate after this epoch (from 0)."""
    if isinstance(validation_freq, int):
        return (epoch + 1) % validation_freq == 0
    return epoch + 1 in validation_freq
