"""Ways to train a problem: each function sets one up and returns `run(epochs)`, which trains and returns the loss.

All start from the same weights, and each epoch is one pass over the same examples, shuffled.
"""

import contextlib
import io
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import looplab

CORES = os.cpu_count()


class Problem(NamedTuple):
    """A model, its data, and what `compile` takes; the functions create new objects."""

    model: Callable[[], keras.Model]
    arrays: tuple[np.ndarray, ...]
    """x and y, or x alone if it is also y; their length is a multiple of `batch`."""
    optimizer: Callable[[], keras.Optimizer] = keras.optimizers.Adam
    loss: Callable[[], keras.Loss] = keras.losses.MeanSquaredError
    metrics: Callable[[], list] = list
    batch: int = 64

    @property
    def steps(self):
        """Of one epoch."""
        return len(self.arrays[0]) // self.batch

    def first(self, steps):
        """The same with shorter epochs."""
        return self._replace(arrays=tuple(array[: steps * self.batch] for array in self.arrays))

    def settings(self):
        return {"optimizer": self.optimizer(), "loss": self.loss(), "metrics": self.metrics()}

    def dataset(self):
        data = tf.data.Dataset.from_tensor_slices(self.arrays).shuffle(len(self.arrays[0]), seed=0)
        return data.batch(self.batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def looplab_trainer(problem, log=True, kind=looplab.Trainer, **options):
    log_dir = f"{tempfile.mkdtemp()}/run" if log else None
    return kind(problem.model(), **problem.settings(), seed=0, log_dir=log_dir, **options)


def keras_model(problem, **options):
    model = problem.model()
    model.compile(**problem.settings(), **options)
    return model


def looplab_fit(problem, validation=None, **options):
    return _fit(looplab_trainer(problem, **options), problem, validation_data=validation)


def keras_fit(problem, tensorboard=False, checkpoint=False, validation=None, **options):
    folder = tempfile.mkdtemp()
    callbacks = [keras.callbacks.TensorBoard(folder, update_freq=1)] if tensorboard else []
    callbacks += [keras.callbacks.ModelCheckpoint(f"{folder}/newest.keras")] if checkpoint else []
    return _fit(keras_model(problem, **options), problem, validation_data=validation, callbacks=callbacks)


def _fit(trainer, problem, **arguments):
    x, y = problem.arrays[0], problem.arrays[-1]
    fit = partial(trainer.fit, x, y, batch_size=problem.batch, verbose=0, **arguments)
    return lambda epochs: fit(epochs=epochs).history["loss"][-1]


def step_of(problem):
    """Forward, tape and update alone: a function of a batch that returns its loss."""
    model, optimizer, loss_fn = problem.model(), problem.optimizer(), problem.loss()
    model(problem.arrays[0][:1])
    optimizer.build(model.trainable_variables)

    def step(*batch):
        with tf.GradientTape() as tape:
            loss = loss_fn(batch[-1], model(batch[0], training=True)) + sum(model.losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return step


def bare_loop(problem, gather=True, xla=False):
    """All steps of an epoch in one graph call, which gathers its batches from memory or takes them from `tf.data`."""
    step, steps = step_of(problem), problem.steps
    rows = tf.range(steps * problem.batch)
    arrays = [tf.constant(array) for array in problem.arrays if gather]
    iterator = None if gather else iter(problem.dataset().repeat())

    @tf.function(jit_compile=xla)
    def train(order):
        losses = tf.TensorArray(tf.float32, steps)
        for i in tf.range(steps):
            batch = [tf.gather(array, order[i]) for array in arrays] if gather else next(iterator)
            losses = losses.write(i, step(*batch))
        return losses.stack()

    def run(epochs):
        for epoch in range(epochs):
            order = tf.random.experimental.stateless_shuffle(rows, [0, epoch]) if gather else rows
            losses = train(tf.reshape(order, (steps, problem.batch))).numpy()
        return losses.mean()

    return run


def python_loop(problem, compiled=True):
    """A loop as in TensorFlow's guides: Python calls each step, compiled and with a summary, or eagerly and without."""
    step = tf.function(step_of(problem)) if compiled else step_of(problem)
    data, numbers = problem.dataset(), itertools.count(1)
    writer = tf.summary.create_file_writer(tempfile.mkdtemp()) if compiled else tf.summary.create_noop_writer()

    def run(epochs):
        with writer.as_default():
            for _ in range(epochs):
                losses = []
                for batch in data:
                    losses.append(step(*batch))
                    if compiled:
                        tf.summary.scalar("loss", losses[-1], step=next(numbers))
            writer.flush()
        return np.mean(losses)

    return run


def orbit_loop(problem, steps_per_loop):
    import orbit

    step, mean, count = step_of(problem), keras.metrics.Mean(), orbit.utils.create_global_step()

    class Trainer(orbit.StandardTrainer):
        def train_loop_begin(self):
            mean.reset_state()

        def train_step(self, iterator):
            mean.update_state(step(*next(iterator)))
            count.assign_add(1)

        def train_loop_end(self):
            return {"loss": mean.result()}

    options = {"global_step": count, "steps_per_loop": steps_per_loop, "summary_dir": tempfile.mkdtemp()}
    controller = orbit.Controller(trainer=Trainer(problem.dataset().repeat()), **options)

    def run(epochs):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line for each loop
            controller.train(int(count) + epochs * problem.steps)
        return float(mean.result())

    return run


def _torch_vae(problem):
    """The recipe's VAE with the same weights, whose output is the loss, and a function that creates its optimizer."""
    import torch
    from torch import nn

    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.mean, self.log_variance = nn.Linear(784, 64), nn.Linear(64, 32), nn.Linear(64, 32)
            self.decoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 784), nn.Sigmoid())

        def forward(self, images):
            hidden = torch.relu(self.hidden(images))
            mean, log_variance = self.mean(hidden), self.log_variance(hidden)
            divergence = -0.5 * (log_variance - mean.square() - log_variance.exp() + 1).mean()
            sample = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
            return nn.functional.mse_loss(self.decoder(sample), images) + divergence

    vae = VAE()
    with torch.no_grad():
        for parameter, weight in zip(vae.parameters(), problem.model().get_weights(), strict=True):
            parameter.copy_(torch.from_numpy(weight.T))
    return vae, partial(torch.optim.Adam, list(vae.parameters()), 1e-3, eps=1e-7)


def torch_loop(problem, threads=CORES):
    import torch

    (vae, create_optimizer), images = _torch_vae(problem), torch.from_numpy(problem.arrays[0])
    optimizer = create_optimizer()

    def run(epochs):
        torch.set_num_threads(threads)
        for _ in range(epochs):
            losses = []
            for rows in torch.randperm(len(images)).split(problem.batch):
                optimizer.zero_grad()
                loss = vae(images[rows])
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return np.mean(losses)

    return run


def lightning_fit(problem):
    import lightning
    import torch
    from lightning.pytorch.loggers import TensorBoardLogger
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.vae, self.create_optimizer = _torch_vae(problem)

        def training_step(self, batch, _):
            loss = self.vae(batch[0])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return self.create_optimizer()

    # A loader that fetches each example by itself, the default, takes longer than the step.
    data = TensorDataset(torch.from_numpy(problem.arrays[0]))
    loader = DataLoader(data, sampler=BatchSampler(RandomSampler(data), problem.batch, True), batch_size=None)
    module, folder = Module(), tempfile.mkdtemp()
    options = {"accelerator": "cpu", "log_every_n_steps": 1, "default_root_dir": folder}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}

    def run(epochs):
        torch.set_num_threads(CORES)
        trainer = lightning.Trainer(max_epochs=epochs, logger=TensorBoardLogger(folder), **options)
        trainer.fit(module, loader)
        return trainer.callback_metrics["loss"]

    return run
