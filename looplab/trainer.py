"""`Trainer`: `fit`, `evaluate` and `predict` around the steps of `steps.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from looplab import checks, data, state
from looplab.arrays import held_out, is_arrays
from looplab.callbacks import EpochLine, ProgressBar
from looplab.checkpoint import Checkpoint, Checkpoints
from looplab.epoch import Epochs, joined
from looplab.fit import Fit
from looplab.guard import Fault
from looplab.metrics import lower_is_better
from looplab.paths import local_path
from looplab.plain_files import Saved
from looplab.resume import Resumed, find
from looplab.warn import say, warn
from looplab.weights import ClassWeights


class Trainer(Epochs):
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
        log_dir: Folder for TensorBoard's event files, `train` and `validation` below it, and `checkpoints`. None writes
            nothing.
        seed: Of the order of the data and of `seed_generator`. By default it is drawn from Python's `random`, which
            `keras.utils.set_random_seed` seeds, as Keras draws the seeds of its layers.
        steps_per_execution: How many steps one graph call does. "auto" keeps about five returns to Python a second.
            It never changes a result.
        jit_compile: Whether XLA compiles the step.
        run_eagerly: Whether Python goes through the step line by line, for debugging: slow.
        checkpoint: When to save all state to `log_dir/checkpoints`, and what to keep; None saves nothing.

    Attributes:
        history: The `keras.callbacks.History` of the last `fit`.
        seed_generator: A `keras.random.SeedGenerator` for the random numbers of a step.
        steps: How many training steps were done since the trainer was made.
        epochs: How many epochs were done.
        stop_training: A callback sets it to end `fit` after the running graph call.
        skip_nonfinite: How many steps in a row may have a loss or gradients that are not finite, before `fit` ends with
            an error. Such a step updates nothing, and does not count in an epoch's values.
        skipped_steps: How many steps were passed over so.
    """

    @checks.named
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
        checkpoint: Checkpoint | None = Checkpoint(),
    ):
        checks.steps_per_execution(steps_per_execution)
        checks.checkpoint(checkpoint, Checkpoint)
        if log_dir is None and checkpoint not in (None, Checkpoint()):
            raise ValueError("`checkpoint` came without `log_dir`: there would be no folder to save to. Pass both.")
        super().__init__(
            *(model, optimizer, loss, loss_weights, metrics, seed, log_dir),
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            run_eagerly=run_eagerly,
        )
        self.checkpoint = checkpoint
        self.history: keras.callbacks.History | None = None
        self._given_seed = seed

    @checks.named
    def fit(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: keras.callbacks.Callback | Sequence[keras.callbacks.Callback] | None = None,
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
        """Trains; the arguments but the last are those of `keras.Model.fit`.

        Args:
            x: Arrays (with `y`, `sample_weight`), a `tf.data.Dataset` of batches, or a function of the epoch that
                returns one. The epoch counts from 0 since the trainer was made. Arrays are shuffled anew each epoch,
                by the trainer's seed and the epoch alone.
            steps_per_epoch: The data then goes on in the next epoch where it stopped, and begins again at its end.
            callbacks: Keras callbacks, which see this batch's values as the logs of a batch. With
                `steps_per_execution="auto"`, one that acts on training batches makes each graph call one step; with a
                number, its hooks are called for each step after the call.
            verbose: 1, or "auto": a bar, where standard error is a terminal. 2: a line for each epoch. 0: nothing.
            resume: Whether to go on where the run in `log_dir` was saved last, to the same bits as if it had never
                ended: with the same code, arguments and data, and `epochs` as many as before or more. Where nothing was
                saved yet, it begins. A program that always passes True can be killed and started again at any time.

        Returns:
            The history: `history.history["val_loss"]` is a list with one number for each epoch.

        Raises:
            ValueError: An argument, the data, a checkpoint or the folder is not what it should be; before anything is
                changed.
            FloatingPointError: A loss or gradients are not finite; the update was not made.
            OSError: A checkpoint could not be written.
            SystemExit: SIGTERM or Ctrl-C came, and all is saved: with status 143 or 130.
        """
        batch_size, steps_per_epoch = checks.positive(batch_size=batch_size, steps_per_epoch=steps_per_epoch)
        validation_steps, validation_batch_size = checks.positive(
            validation_steps=validation_steps, validation_batch_size=validation_batch_size
        )
        epochs = checks.whole(1, "epochs", epochs)
        initial_epoch = checks.whole(0, "initial_epoch", initial_epoch)
        validation_freq = checks.validation_freq(validation_freq)
        self.skip_nonfinite = checks.whole(0, "skip_nonfinite", self.skip_nonfinite)
        checks.resume(resume, self.log_dir)
        checks.learning_rates(self.optimizers)
        given = checks.callbacks(callbacks)
        class_weights = ClassWeights.of(class_weight)
        with self._owning(resume):
            checkpoints, resumed = self._checkpoints(resume)
            writes = checkpoints is not None and self.checkpoint is not None
            if resumed.saved is not None and self._given_seed is None:
                self.seed = resumed.saved.tree["seed"]
            if validation_split and validation_data is None:
                x, y, sample_weight, validation_data = held_out(x, y, sample_weight, validation_split)
            first = max(self.epochs, initial_epoch)
            self._class_weights = class_weights
            train = self._batches("x", x, y, sample_weight, batch_size, shuffle, steps_per_epoch, training_from=first)
            validation = None
            if validation_data is not None:
                self._check_test_step("validation_data")
                val_x, val_y, val_weight = keras.utils.unpack_x_y_sample_weight(validation_data)
                size = validation_batch_size or (batch_size if is_arrays(val_x) else None)
                validation = self._batches("validation_data", val_x, val_y, val_weight, size, steps=validation_steps)
            if resumed.newest is not None and resumed.newest.tree["fit"] > self._fits.count:
                return self._skip(resumed.newest, train)
            resumed.check(self._given_seed, train.described, self._made_with)
            if train.unseeded and (writes or resume):
                checks.unseeded(train.unseeded, resume)
            if verbose:
                given.append(EpochLine() if verbose == 2 else ProgressBar())
            callback_list = keras.callbacks.CallbackList(
                given, add_history=True, model=self, epochs=epochs, steps=train.steps, verbose=verbose
            )
            self._fits.start()
            Fit(
                self,
                train,
                validation,
                functools.partial(_due, validation_freq),
                callback_list,
                initial_epoch,
                epochs,
                checkpoints if writes else None,
                resumed,
            ).run()
        assert self.history is not None  # the list of callbacks set it
        self._fits.complete(self.history.history)
        return self.history

    @checks.named
    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        callbacks: keras.callbacks.Callback | Sequence[keras.callbacks.Callback] | None = None,
    ) -> dict[str, float]:
        """Measures the data (given as to `fit`) with `test_step`, and leaves everything as it was.

        Returns:
            The loss and each metric over all the data, by name.
        """
        batch_size, steps = checks.positive(batch_size=batch_size, steps=steps)
        given = checks.callbacks(callbacks)
        self._check_test_step("evaluate")
        batches = self._batches("x", x, y, sample_weight, batch_size, steps=steps)
        bar = [ProgressBar()] if verbose else []
        callback_list = keras.callbacks.CallbackList([*given, *bar], model=self, steps=batches.steps)
        try:
            return self._evaluate(batches, callback_list)[0]
        except Fault as fault:
            raise fault.error(self.steps, self.epochs, None) from None

    @checks.named
    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        callbacks: keras.callbacks.Callback | Sequence[keras.callbacks.Callback] | None = None,
    ) -> Any:
        """The outputs of `predict_step` for all the data, as NumPy arrays, and leaves everything as it was."""
        batch_size, steps = checks.positive(batch_size=batch_size, steps=steps)
        given = checks.callbacks(callbacks)
        batches = self._batches("x", x, None, None, batch_size, steps=steps)
        bar = [ProgressBar()] if verbose else []
        callback_list = keras.callbacks.CallbackList([*given, *bar], model=self, steps=batches.steps)

        predictor = self._predictor(batches.element_spec)
        outputs: list[Any] = []
        iterator = batches.iterate(0)
        with self._undisturbed() if self.run_eagerly else predictor.copies.lock:
            predictor.copies.refresh()
            callback_list.on_predict_begin()
            while batches.steps is None or len(outputs) < batches.steps:
                batch = iterator.get_next_as_optional()
                if not batch.has_value():
                    break
                callback_list.on_predict_batch_begin(len(outputs))
                rows = tf.nest.map_structure(self._gathered, predictor.call(batch.get_value()))
                self._check_rows(batches.element_spec, batch.get_value(), rows)
                outputs.append(rows)
                callback_list.on_predict_batch_end(len(outputs) - 1, {"outputs": outputs[-1]})
            callback_list.on_predict_end()
        if not outputs:
            raise ValueError("`x` has no batch: it ended at once. Pass at least one.")
        return tf.nest.map_structure(joined, *outputs)

    @checks.named
    def restore(self, checkpoint: str | Path = "newest") -> None:
        """Brings all variables (weights, seeds, metrics, optimizers) to what they were at a checkpoint.

        To go on with a training, use `fit(..., resume=True)`. The trainer must be built, by `fit` or `build`.

        Args:
            checkpoint: "newest", "best" (by the `monitor` of its `looplab.Checkpoint`), or a folder.

        Raises:
            ValueError: There is none, it is damaged, or of another architecture; nothing was changed.
        """
        if not any(known.key[0] == "train" for known in self._traced):
            raise ValueError("`restore` needs all variables to be there: call `build` with the data before, or `fit`.")
        saved: Saved | None
        if checkpoint in ("newest", "best"):
            if self.log_dir is None or self.checkpoint is None:
                raise ValueError("`restore` needs the trainer's `log_dir` and `checkpoint`, or a checkpoint's folder.")
            checkpoints = Checkpoints(self.log_dir / "checkpoints", self.checkpoint)
            if checkpoint == "newest":
                saved, skipped = checkpoints.newest()
            else:
                if self.checkpoint.monitor is None:
                    raise ValueError('`restore("best")` needs a `monitor` of the trainer\'s `checkpoint`.')
                checkpoints.prefer(lower_is_better(self.checkpoint.monitor, self.checkpoint.mode, self.metrics))
                saved, skipped = checkpoints.best()
            for reason in skipped:
                warn(f"Skipped: {reason}")
            if saved is None:
                raise ValueError(f"`checkpoint`: there is no {checkpoint} one in {checkpoints.folder}.")
        elif (folder := local_path("checkpoint", checkpoint)).is_dir():
            saved = Saved(folder)
            state.check_structure(saved.path, saved.tree)
        else:
            raise ValueError(f'`checkpoint` must be "newest", "best", or a folder; {checkpoint} came, and is none.')
        variables = self._all_state()
        values = saved.load(state.most_bytes(variables))["variables"]
        state.check(variables, values, saved.path)
        state.assign(variables, values)

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
            steps=steps,
            training_from=training_from,
            strategy=self.strategy,
        )

    def _checkpoints(self, resume: bool) -> tuple[Checkpoints | None, Resumed]:
        """Where the trainer's state is saved, if anywhere, and where it goes on."""
        if self.log_dir is None:
            return None, Resumed()
        checkpoints = Checkpoints(self.log_dir / "checkpoints", self.checkpoint or Checkpoint())
        checkpoints.clean()
        resumed = find(checkpoints, self._fits.count) if resume else Resumed()
        if resume and resumed.newest is None and not self._events.begun:
            say(f"looplab: {self.log_dir} has no checkpoint: starting at step 1.")
        return checkpoints, resumed

    def _skip(self, newest: Saved, train: data.Batches) -> keras.callbacks.History:
        """What a `fit` returns that the run has completed: its history. The state is the newest, of a later call."""
        self._prepared("train", train.element_spec, eagerly=False)
        variables = self._all_state()
        saved = newest.load(state.most_bytes(variables))
        state.assign_known(variables, saved["variables"])
        self._settle(goes_on=True)
        number = self._fits.count
        self._take_over(saved)
        self._fits.count = number + 1
        self.history = keras.callbacks.History()
        self.history.history = self._fits.history(number)
        epochs = max(map(len, self.history.history.values()), default=0)
        self.history.epoch = list(range(epochs))
        say(
            f"looplab: call {number + 1} of `fit` in {self.log_dir} is complete, with {epochs} epochs: skipped. The "
            f"state is the newest, after {self.epochs} epochs in all."
        )
        return self.history


def _due(validation_freq: int | Sequence[int], epoch: int) -> bool:
    """Whether Keras would validate after this epoch (from 0)."""
    if isinstance(validation_freq, int):
        return (epoch + 1) % validation_freq == 0
    return epoch + 1 in validation_freq
