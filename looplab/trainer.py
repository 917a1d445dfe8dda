"""`Trainer`: the steps that a researcher overrides, and `fit`, `evaluate`, `predict` around them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab import checks, data
from looplab.callbacks import EpochLine, ProgressBar, hooked_to_batches
from looplab.loop import CallLogs, Loop, Pace, StepLogs
from looplab.losses import Ledger
from looplab.metrics import BatchMetrics, Means, named_result
from looplab.summaries import Writer
from looplab.tracking import Tracked, to_numpy


LEARNING_RATE = "learning_rate"
LOSS_PART = "loss/"


class Trainer(Tracked):
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
        self.model = model
        # A Keras model without layers knows how losses and metrics, given as names, lists and dicts, meet outputs.
        self._compiled = keras.Model(name="compiled")
        if hasattr(model, "output_names"):
            self._compiled.output_names = model.output_names
        self._compiled.compile(optimizer=optimizer, loss=loss, loss_weights=loss_weights, metrics=metrics)
        self.optimizer = self._compiled.optimizer
        self.loss = loss
        self.loss_weights = loss_weights
        self.log_dir = None if log_dir is None else Path(log_dir)
        self.seed = random.randint(1, 10**9) if seed is None else seed
        self.seed_generator = keras.random.SeedGenerator(self.seed)
        self.steps_per_execution = steps_per_execution
        self.jit_compile = jit_compile
        self.run_eagerly = run_eagerly
        self.strategy = tf.distribute.get_strategy()
        self.stop_training = False
        self.steps = 0
        self.epochs = 0
        self._test_steps = 0
        self._found: list[tf.Variable] = []  # what a step was seen to train, and no attribute leads to
        self._ledger = Ledger()
        self._batch_metrics = BatchMetrics()
        self._now = _Now()
        self._image_every: dict[str, int] = {}
        self._loops: list[tuple[str, Loop, list[int]]] = []
        self._writers: dict[str, Writer] = {}

    # The steps, for subclasses to override.

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
        if isinstance(self.model, keras.Layer) or "training" in inspect.signature(self.model).parameters:
            return self.model(x, training=training)
        return self.model(x)

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None) -> tf.Tensor:
        """The loss of a batch, a scalar: `loss` of the targets, and all that the model calls before added to it.

        Each part is written as `batch_loss/<part>`: the loss function's name, the path of each layer that called
        `add_loss` (with `_2` for its second call in this step), and `regularization`.
        """
        losses = self._ledger.take(self.trainable_variables)
        if self.loss is not None:
            checks.targets(y, self.loss)
            # Keras divides a loss by the number of replicas, `minimize` does here: for losses of every origin.
            total = self._compiled.compute_loss(x, y, y_pred, sample_weight) * self.strategy.num_replicas_in_sync
            for name, value in self._target_losses(total).items():
                self._ledger.add(name, value)
            self._ledger.take()
            losses.insert(0, total)
        if not losses:
            raise ValueError("There is no loss: pass `loss`, let the model call `add_loss`, or override `compute_loss`.")
        return functools.reduce(tf.add, losses)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Updates the running state of `metrics`, and returns their values for this batch alone, by name."""
        values = self._compiled.compute_metrics(x, y, y_pred, sample_weight)
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
            warnings.warn(f"{type(self).__name__} has nothing to train: no trainable variables.", stacklevel=2)
            return []
        if optimizer is None:
            raise ValueError("There is no optimizer: pass `optimizer` to the trainer or to `minimize`.")
        # As the gradient of the scaled loss, without the loss itself being scaled for whoever looks at it.
        scale = optimizer.scale_loss(tf.ones_like(loss) / self.strategy.num_replicas_in_sync)
        gradients = tape.gradient(loss, variables, output_gradients=scale)
        checks.gradients(gradients, variables)
        optimizer.apply(gradients, variables)
        return gradients

    @property
    def losses(self) -> list[tf.Tensor]:
        """Within a step: all that model calls of this step added with `add_loss`, and the weights' regularizers."""
        return list(self._ledger.parts(self.trainable_variables).values())

    def log(self, name: str, value: Any) -> None:
        """Adds a scalar to those of the running step, or, outside of a step, to TensorBoard at the current epoch."""
        if self._now.scalars is not None:
            self._now.scalars[name] = checks.scalar("`log` got", name, value)
        elif self.log_dir is not None:
            self._writer("train").scalars(self.epochs, {name: float(value)})

    def log_image(self, name: str, images: Any, every: int = 1000, max_outputs: int = 3) -> None:
        """Shows images in TensorBoard: of the running step, or, outside of a step, of the current epoch.

        Args:
            name: The tag.
            images: Shape (n, height, width, channels), 1, 3 or 4 channels; uint8, or floating from 0 to 1.
            every: In a step: it is written at the steps 1, 1 + every, 1 + 2·every, …
            max_outputs: How many of the n are written at most.
        """
        images = checks.images(name, images)[:max_outputs]
        if self._now.images is not None:
            self._now.images[name] = images
            self._image_every[name] = every
        elif self.log_dir is not None:
            files = [tf.io.encode_png(image).numpy() for image in images]
            self._writer("train").image(self.epochs, name, files)

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
            x: Arrays (with `y`, `sample_weight`), a `tf.data.Dataset` of batches, or a function of the epoch (from 0)
                that returns one. Arrays are shuffled anew each epoch, by the trainer's seed and the epoch alone.
            callbacks: Keras callbacks, which see this batch's values as the logs of a batch. With
                `steps_per_execution="auto"`, one that acts on training batches makes each graph call one step; with a
                number, its hooks are called for each step after the call.
            verbose: 1, or "auto": a bar, where standard error is a terminal. 2: a line for each epoch. 0: nothing.

        Returns:
            The history: `history.history["val_loss"]` is a list with one number for each epoch.
        """
        checks.positive(epochs=epochs, batch_size=batch_size, steps_per_epoch=steps_per_epoch)
        checks.positive(validation_steps=validation_steps, validation_batch_size=validation_batch_size)
        given = list(callbacks or [])
        checks.callbacks(given)
        if validation_split and validation_data is None:
            arrays, validation_data = data.split(data.to_arrays("x", x, y, sample_weight), validation_split)
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(arrays)
        train = self._batches("x", x, y, sample_weight, batch_size, shuffle, class_weight, steps_per_epoch)
        validation = None
        if validation_data is not None:
            parts = keras.utils.unpack_x_y_sample_weight(validation_data)
            size = validation_batch_size or (batch_size if data.is_arrays(parts[0]) else None)
            validation = self._batches("validation_data", *parts, size, steps=validation_steps)
        if self.log_dir is not None and not self._writers:
            checks.no_other_run(self.log_dir)

        loop = self._prepared("train", train.element_spec, self.run_eagerly)
        if verbose:
            given.append(EpochLine() if verbose == 2 else ProgressBar())
        callback_list = keras.callbacks.CallbackList(
            given, add_history=True, model=self, epochs=epochs, steps=train.steps, verbose=verbose
        )
        self.stop_training = False
        self.epochs = max(self.epochs, initial_epoch)
        iterator = None
        logs: dict[str, float] = {}
        try:
            callback_list.on_train_begin()
            for epoch in range(initial_epoch, epochs):
                self._reset_metrics()
                callback_list.on_epoch_begin(epoch)
                if iterator is None or not train.continues:
                    iterator = iter(train.start(self.epochs))
                logs = self._run("train", loop, iterator, train.steps, callback_list, "train")
                self.epochs += 1
                self._write_epoch("train", logs)
                if validation is not None and _due(validation_freq, epoch):
                    results = self._evaluate(validation, callback_list, "validation")
                    self._write_epoch("validation", results)
                    logs |= {f"val_{name}": value for name, value in results.items()}
                callback_list.on_epoch_end(epoch, logs)
                if self.stop_training:
                    break
            callback_list.on_train_end(logs)
        finally:
            for writer in self._writers.values():
                writer.close()
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
        callback_list = keras.callbacks.CallbackList(list(callbacks or []), model=self, steps=batches.steps)
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
        callback_list = keras.callbacks.CallbackList(list(callbacks or []), model=self, steps=batches.steps)

        def step(batch):
            return self.strategy.run(self.predict_step, (batch,))

        if not self.run_eagerly:
            step = tf.function(step, jit_compile=self.jit_compile or None)
            step.get_concrete_function(batches.element_spec)  # makes variables, before their values are kept
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
        return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *outputs)

    def build(self, x: Any, y: Any = None, sample_weight: Any = None) -> None:
        """Makes all variables of models, metrics and optimizers, from the data's signature: nothing is run.

        `fit` does it by itself; `load_weights` needs it before.
        """
        self._prepared("train", self._batches("x", x, y, sample_weight).element_spec, eagerly=False)

    # Within.

    def _batches(self, name, x, y=None, sample_weight=None, batch_size=None, shuffle=False, class_weight=None, steps=None):
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
            strategy=self.strategy,
        )

    def _prepared(self, kind: str, element_spec: Any, eagerly: bool) -> Loop:
        """The loop of a kind of step, "train" or "test", for data of this signature; all variables are made then."""
        for known_kind, loop, traced_with in self._loops:
            if known_kind == kind and loop.element_spec == element_spec and traced_with == self._trained():
                return loop
        step = functools.partial(self._run_step, kind, {"train": self.train_step, "test": self.test_step}[kind])
        metrics = None
        while metrics != self.metrics:  # those that a trace makes are seen by the next alone
            metrics = self.metrics
            with self._recording():
                loop = Loop(step, element_spec, self._image_every, self.strategy, self.jit_compile, eagerly)
        self._loops.append((kind, loop, self._trained()))
        return loop

    def _trained(self) -> list[int]:
        """What a trace holds fast, and a user may change between two calls of `fit`."""
        return [id(thing) for thing in [*self.trainable_variables, *self.optimizers.values()]]

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Within it, steps can run or be traced: added losses and metrics' updates are seen."""
        with self._ledger.listening(), self._batch_metrics.watching(self.metrics):
            yield

    def _run_step(self, kind: str, step: Callable[[Any], Any], batch: Any, number: tf.Tensor) -> StepLogs:
        """Runs a step of the user's on one replica, and gathers all that it tells."""
        now = self._now
        now.scalars, now.images = {}, {}
        self._ledger.begin()
        self._batch_metrics.begin()
        try:
            rates = self._learning_rates() if kind == "train" else {}  # as they are when the step uses them
            logs = checks.step_logs(f"{kind}_step", step(batch))
            parts = {f"{LOSS_PART}{name}": part for name, part in self._ledger.parts(self.trainable_variables).items()}
            told: dict[str, tf.Tensor] = {}
            for source in (logs, now.scalars, self._batch_metrics.unasked(), parts):
                for name, value in source.items():
                    if name in told:
                        raise ValueError(f"`{kind}_step` told two values named '{name}'. Give one another name.")
                    told[name] = value
            return StepLogs({**rates, **told} if kind == "train" else told, now.images)
        finally:
            now.scalars = now.images = None
            self._ledger.end()
            self._batch_metrics.end()

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
            loss = self.loss if isinstance(self.loss, str) else getattr(self.loss, "name", None)
            return {loss or getattr(self.loss, "__name__", None) or "targets": total}
        weights = self.loss_weights
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

    def _run(self, kind, loop, iterator, steps, callbacks, folder: str | None) -> dict[str, float]:
        """Runs an epoch of training, or one evaluation, and returns its logs."""
        hooks = hooked_to_batches(callbacks.callbacks, kind)
        pace = Pace(self._pace(hooks))
        means, done = Means(), 0
        while (steps is None or done < steps) and not (kind == "train" and self.stop_training):
            asked = pace.next(None if steps is None else steps - done)
            began = time.time()
            if asked == 1:
                for hook in hooks:
                    getattr(hook, f"on_{kind}_batch_begin")(done)
            with self._recording():
                logs = loop(iterator, asked, 1 + (self.steps if kind == "train" else done))
            pace.took(logs.done, time.time() - began)
            means.add(logs.weights, logs.scalars)
            if folder is not None:
                self._write_steps(kind, folder, logs, began)
            done += logs.done
            if kind == "train":
                self.steps += logs.done
            if hooks:
                self._replay(kind, hooks, logs, done - logs.done, begin=asked > 1)
            if logs.done < asked:
                break
        if not done and not self.stop_training:
            raise ValueError(f"The data for `{kind}_step` has no batch: it ended at once. Pass at least one.")
        if steps is not None and done < steps and not self.stop_training:
            warnings.warn(f"The data ended after {done} of {steps} batches.", stacklevel=3)
        tracked = {}
        unweighed = self._output_losses()  # Keras's means of these take a ragged last batch for a whole one
        for metric in self.metrics:
            if id(metric) in self._batch_metrics.counted and metric not in unweighed:
                tracked |= named_result(metric, metric.result())
        means = {name: value for name, value in means.result().items() if not name.startswith(LEARNING_RATE)}
        return {name: float(tracked.get(name, value)) for name, value in means.items()}

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

    def _writer(self, folder: str) -> Writer:
        if folder not in self._writers:
            self._writers[folder] = Writer(self.log_dir / folder)
        return self._writers[folder]

    def _write_steps(self, kind: str, folder: str, logs: CallLogs, began: float) -> None:
        """Writes what a graph call told; validation has a step count of its own, which goes on rising."""
        first = 1 + (self.steps if kind == "train" else self._test_steps)
        if kind == "test":
            self._test_steps += logs.done
        if self.log_dir is None or not logs.done:
            return
        writer = self._writer(folder)
        tags = [f"batch_{name}" for name in logs.scalars]
        writer.steps(first, tags, np.stack(list(logs.scalars.values()), 1), began)
        for index, name, files in logs.images:
            writer.image(first + index, name, files)
        writer.flush()

    def _gathered(self, value: Any) -> np.ndarray:
        """All replicas' rows, in order."""
        return np.concatenate([part.numpy() for part in self.strategy.experimental_local_results(value)])

    def _write_epoch(self, folder: str, logs: dict[str, float]) -> None:
        if self.log_dir is not None:
            self._writer(folder).scalars(self.epochs, {f"epoch_{name}": value for name, value in logs.items()})
            self._writer(folder).flush()


class _Now(threading.local):
    """What the step that runs in this thread, which is one replica, has logged by itself; None: no step runs."""

    scalars: dict[str, tf.Tensor] | None = None
    images: dict[str, tf.Tensor] | None = None


def _due(validation_freq: int | Sequence[int], epoch: int) -> bool:
    """Whether Keras would validate after this epoch (from 0)."""
    if isinstance(validation_freq, int):
        return (epoch + 1) % validation_freq == 0
    return epoch + 1 in validation_freq
