"""`Trainer`: what researchers call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab import checks
from looplab.callbacks import with_bar
from looplab.checkpoint.policy import Checkpoint
from looplab.keras_models import AsCompiled
from looplab.loop.engine import Engine
from looplab.loop.fit import fit
from looplab.loop.guard import Fault
from looplab.loop.on_batch import OnBatch
from looplab.loop.outputs import joined, listed, ordered
from looplab.loop.replicas import in_scope_of_model
from looplab.loop.resume import restore
from looplab.steps import Steps
from looplab.variables import to_numpy


class Trainer(Steps):
    """Trains any callable with variables.

    Override `train_step` (and `test_step`, `predict_step`, `compute_loss`, `compute_metrics`) as in `keras.Model`;
    nothing else needs to change. What a subclass sets as attributes is found: models, optimizers, metrics and
    variables, also in lists and dicts. To train on several devices, create the trainer inside `strategy.scope()`.

    Args:
        model: A Keras model or layer, a `tf.Module`, or a function that uses variables. It is called with a batch's x,
            and with `training=` if it takes that. Optional for a subclass with its own steps.
        optimizer, loss, loss_weights, metrics, weighted_metrics, auto_scale_loss: As in `keras.Model.compile`; by
            default what `model` was compiled with. Without `loss`, the loss is what the model adds with `add_loss`.
        log_dir: Folder for event files in `train`, `validation` and `time`, and for `checkpoints`; None writes nothing.
        seed: Of the order of the data and of `seed_generator`; by default from Python's `random`, as in Keras's layers.
        steps_per_execution: Steps per graph call, which never change a result; by default as `model` is compiled, where
            1 counts as "auto", which returns to Python about five times a second.
        jit_compile: Whether XLA compiles the step, which "auto" does not; by default if `model` is compiled with True.
        run_eagerly: Whether Python runs the step line by line, for debugging: slow. By default as `model` is compiled.
        checkpoint: When to save all state to `log_dir/checkpoints`, and what to keep; None saves nothing.
        fused_updates: Whether TensorFlow's kernels update large variables of `Adam`; they round otherwise than Keras.
        profile_steps: The first and the last training step of a profile for TensorBoard, such as (100, 120).

    Example:
        >>> import keras, numpy as np, looplab
        >>> x = np.arange(8, dtype="float32")[:, None]
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> trainer = looplab.Trainer(model, optimizer="sgd", loss="mse", metrics=["mae"])
        >>> history = trainer.fit(x, 3 * x, batch_size=4, epochs=2, verbose=0)
        >>> trainer.steps, trainer.epochs
        (4, 2)
        >>> sorted(trainer.evaluate(x, 3 * x, verbose=0))
        ['loss', 'mae']
        >>> trainer.predict(x, verbose=0).shape
        (8, 1)
    """

    steps_per_execution = AsCompiled("auto", checks.steps_per_execution)
    jit_compile, run_eagerly = AsCompiled(None, checks.jit_compile), AsCompiled(None, checks.run_eagerly)

    @checks.named
    @in_scope_of_model
    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        *,
        optimizer: Any = None,
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        auto_scale_loss: bool | None = None,
        log_dir: str | Path | None = None,
        seed: int | None = None,
        steps_per_execution: int | str = "auto",
        jit_compile: bool | str | None = None,
        run_eagerly: bool | None = None,
        checkpoint: Checkpoint | None = Checkpoint(),
        fused_updates: bool = False,
        profile_steps: tuple[int, int] | None = None,
    ):
        self.steps_per_execution, self.jit_compile, self.run_eagerly = steps_per_execution, jit_compile, run_eagerly
        checks.checkpoint(checkpoint, Checkpoint, log_dir)
        self.model = checks.model(model)
        given = {"optimizer": optimizer, "loss": loss, "loss_weights": loss_weights, "metrics": metrics}
        given |= {"weighted_metrics": weighted_metrics, "auto_scale_loss": auto_scale_loss}
        fused, profiled = checks.yes_or_no("fused_updates", fused_updates), checks.profile_steps(profile_steps, log_dir)
        engine = self._looplab = Engine.of(self, {n: v for n, v in given.items() if v is not None}, log_dir, seed)
        engine.on_batch, engine.profile_steps, engine.runner.fused_updates = OnBatch(engine), profiled, fused
        self.optimizer = engine.runner.objective.optimizer
        self.seed_generator = keras.random.SeedGenerator(self.seed)
        """For the random numbers of a step."""
        self.checkpoint = checkpoint
        self.history: keras.callbacks.History | None = None  # that of the last `fit`
        self.stop_training = False
        """Whether `fit` ends after the running graph call; callbacks set it."""
        self.skip_nonfinite = 0
        """How many steps in a row may not be finite before `fit` raises an error; they update and count nothing."""

    @checks.named
    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Mapping[int, float] | Sequence[float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Sequence[int] = 1,
        resume: bool = False,
    ) -> keras.callbacks.History:
        """Trains the model; all arguments but the last are those of `keras.Model.fit`.

        Args:
            x: Arrays (with `y`, `sample_weight`), anything else that `keras.Model.fit` takes, or a function of the
                epoch, from 0 since the trainer's creation, that returns a `tf.data.Dataset`. Arrays and PyDatasets are
                shuffled anew in each epoch, in an order that depends on the trainer's seed and the epoch alone.
            steps_per_epoch: The next epochs continue where the data stopped, and start it again at its end.
            callbacks: Keras callbacks. Their logs of a batch are the values of that batch. With
                `steps_per_execution="auto"`, one that acts on training batches makes each graph call one step; with a
                number, its hooks are called for each step after the call.
            verbose: 1 or "auto": a progress bar, if standard error is a terminal. 2: a line for each epoch. 0: nothing.
            resume: Whether to resume from the newest checkpoint in `log_dir`, to the same bits as if the run had never
                stopped: with the same code, arguments and data, and as many `epochs` or more. Without a checkpoint,
                training starts. A program that always passes True can be killed and started again at any time.

        Returns:
            The history: `history.history["val_loss"]` is a list with one number per epoch.

        Raises:
            ValueError: An argument, the data, a checkpoint or the folder is wrong. Nothing was changed.
            FloatingPointError: The loss or gradients are not finite. The update was not made.
            OSError: A checkpoint could not be written.
            SystemExit: SIGTERM or Ctrl-C arrived, and all is saved (status 143 or 130), or another worker ended (75).
        """
        return fit(
            self._looplab,
            x=x,
            y=y,
            sample_weight=sample_weight,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            validation_split=validation_split,
            validation_data=validation_data,
            shuffle=shuffle,
            class_weight=class_weight,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
            resume=resume,
        )

    @checks.named
    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """Evaluates the data, which is given as to `fit`, with `test_step`; changes nothing.

        Returns:
            The loss and each metric over all the data, by name; with `return_dict=False`, as a list in the order of
            `keras.Model.evaluate`, or a number if there is only the loss.
        """
        batch_size, steps = checks.positive(batch_size=batch_size, steps=steps)
        checks.test_step("evaluate", self)
        batches = self._looplab.batches("x", x, y, sample_weight, batch_size, steps=steps)
        try:
            values = self._looplab.evaluate(batches, with_bar(self, callbacks, batches.steps, verbose))[0]
        except Fault as fault:
            raise fault.error(self.steps, self.epochs, None) from None
        return values if return_dict else listed(values, ordered(values, self.metrics))

    @checks.named
    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """The outputs of `predict_step` for all the data, as NumPy arrays; changes nothing."""
        batch_size, steps = checks.positive(batch_size=batch_size, steps=steps)
        batches = self._looplab.batches("x", x, batch_size=batch_size, steps=steps)
        outputs = self._looplab.predict(batches, with_bar(self, callbacks, batches.steps, verbose))
        return tf.nest.map_structure(joined, *outputs)

    @checks.named
    def train_on_batch(
        self, x: Any, y: Any = None, sample_weight: Any = None, class_weight: Any = None, return_dict: bool = False
    ) -> Any:
        """Runs `train_step` on one batch, for a loop of your own; takes and returns what `keras.Model` does.

        The step is counted, guarded and written as in `fit`, and saved if `checkpoint.every` is in steps or seconds.
        To continue in another process, call `build` and `restore`; `steps` is then where it was. Returns the values
        of the batch: a list or a number as in Keras, or with `return_dict=True` by name.
        """
        on_batch = self._looplab.on_batch
        return on_batch.train((x, y, sample_weight), class_weight, self.checkpoint, return_dict)

    @checks.named
    def test_on_batch(self, x: Any, y: Any = None, sample_weight: Any = None, return_dict: bool = False) -> Any:
        """Runs `test_step` on one batch, and changes nothing; returns what `train_on_batch` does."""
        return self._looplab.on_batch.test((x, y, sample_weight), return_dict)

    def predict_on_batch(self, x: Any) -> Any:
        """The outputs of `predict_step` for one batch, as NumPy arrays; changes nothing."""
        return self._looplab.on_batch.predict(x)

    @checks.named
    def restore(self, checkpoint: str | Path = "newest") -> None:
        """Restores all variables (weights, seeds, metrics, optimizers) from a checkpoint.

        To continue a training, use `fit(..., resume=True)`. The trainer must be built, by `fit` or `build`.

        Args:
            checkpoint: "newest", "best" (by the `monitor` of its `looplab.Checkpoint`), or a folder.

        Raises:
            ValueError: There is none, it is damaged, or it is of another architecture. Nothing was changed.
        """
        restore(self._looplab, self.checkpoint, checkpoint)

    def build(self, x: Any, y: Any = None, sample_weight: Any = None) -> None:
        """Creates all variables from the data's signature, as `fit` does; `load_weights` and `restore` need them."""
        signature = self._looplab.batches("x", x, y, sample_weight).element_spec
        self._looplab.tracer.compiled("train", signature, eagerly=False)

    @property
    def weights(self) -> list[Any]:
        """The weights of all models, as `keras.Model.weights`: without seeds, metrics and optimizers."""
        return self._looplab.runner.variables.weights()

    @property
    def optimizers(self) -> dict[str, keras.Optimizer]:
        """The optimizers, by the path of attributes that leads to them."""
        return self._looplab.runner.variables.optimizers()

    def get_weights(self) -> list[np.ndarray]:
        """The values of `weights`."""
        return [to_numpy(weight) for weight in self.weights]

    def set_weights(self, weights: Sequence[np.ndarray]) -> None:
        """Assigns what `get_weights` returned."""
        self._looplab.runner.variables.set_weights(weights)

    def save_weights(self, filepath: str | Path, overwrite: bool = True) -> None:
        """Writes `weights` to a `.weights.h5` file; that of one Keras model is the one that the model would write."""
        model, path = self._looplab.runner.variables.saveable("save"), Path(filepath).expanduser()
        self._looplab.workers.if_chief(model.save_weights, path, overwrite=overwrite)

    def load_weights(self, filepath: str | Path) -> None:
        """Assigns the weights that `save_weights` wrote, of the same models, which must be built."""
        self._looplab.runner.variables.load_weights(Path(filepath).expanduser())

    def save(self, filepath: str | Path, overwrite: bool = True) -> None:
        """Writes the one Keras model that has all weights to a `.keras` file, compiled as the trainer is."""
        self._looplab.workers.if_chief(self._looplab.runner.save, Path(filepath).expanduser(), overwrite)

    def export(self, filepath: str | Path, **options: Any) -> None:
        """Writes the one Keras model that has all weights as a SavedModel for inference, as `keras.Model.export`."""
        model, path = self._looplab.runner.variables.one_model("export"), Path(filepath).expanduser()
        self._looplab.workers.if_chief(model.export, path, **options)

    def summary(self, **options: Any) -> None:
        """Prints `keras.Model.summary` of each Keras model, with the output shapes of subclassed ones once built."""
        self._looplab.runner.variables.summarize(**options)

    log_dir = property(lambda self: self._looplab.folder.path, doc="The log folder, as an absolute path, or None.")
    seed = property(lambda self: self._looplab.state.seed, doc="Of the order of the data and of `seed_generator`.")
    strategy = property(lambda self: self._looplab.runner.strategy, doc="The `tf.distribute.Strategy` of its creation.")
    steps = property(lambda self: self._looplab.state.steps, doc="The number of training steps since its creation.")
    epochs = property(lambda self: self._looplab.state.epochs, doc="The number of completed epochs.")
    skipped_steps = property(lambda self: self._looplab.state.skipped_steps, doc="Of these, how many were skipped.")
