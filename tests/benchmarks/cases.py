"""What is compared. A case has variants by name, `PEER, DETAIL` or `SECTION: PEER, DETAIL`; the first is the reference.

Each function creates a case from the command line's `--data-dir` and `count`, which scales a number by `--steps`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

import looplab
from looplab.recipes.mini_inception import MiniInception
from looplab.recipes.vae import VAE

from . import peers
from .peers import Problem, bare_loop, keras_fit, keras_model, looplab_fit, looplab_trainer

ROOT = Path(__file__).parents[2]
ALL, NONE = "looplab, all scalars", "looplab, no summaries"


class Variant(NamedTuple):
    """One of the things that a case compares."""

    set_up: Callable[[], Callable]
    """Returns `run(epochs)`, which is timed and returns the loss or None; without `steps`, `run()` returns measures."""
    steps: int | None = None
    """Of one epoch."""


class Case(NamedTuple):
    """Variants, and figures that follow from the first measure of each, in one round."""

    variants: dict[str, Variant]
    figures: dict[str, Callable[[dict[str, float]], float]]
    rounds: int = 1000
    """At most."""


def train(problem, set_up, *arguments, **options):
    return Variant(partial(set_up, problem, *arguments, **options), problem.steps)


def process(*arguments):
    """A variant that `processes.py` measures."""

    def run():
        command = [sys.executable, "-m", "tests.benchmarks.processes", str(time.time()), *map(str, arguments)]
        compiles_once = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}  # as installed packages are compiled
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=compiles_once, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    return Variant(lambda: run)


def vae_problem(steps, data_dir):
    images = looplab.Data("mnist", data_dir).load().x_train.reshape(-1, 784) / np.float32(255)
    return Problem(VAE, (np.resize(images, (64 * steps, 784)),), partial(keras.optimizers.Adam, 1e-3))


def vae(count, data_dir):
    """The recipe's VAE on MNIST, or without it on the embedded digits; batches of 64."""
    problem = vae_problem(count(800), data_dir)
    ours = "looplab, all scalars and checkpoints"
    variants = {
        ours: train(problem, looplab_fit),
        ALL: train(problem, looplab_fit, checkpoint=None),
        NONE: train(problem, looplab_fit, log=False),
        "looplab, jit_compile": train(problem, looplab_fit, log=False, jit_compile=True),
        "keras": train(problem, keras_fit),
        "keras, TensorBoard": train(problem, keras_fit, tensorboard=True),
        "keras, 32 steps per call": train(problem, keras_fit, steps_per_execution=32),
        "keras, 100 steps per call": train(problem, keras_fit, steps_per_execution=100),
        "keras, jit_compile": train(problem, keras_fit, jit_compile=True),
        "orbit, 1 step per loop": train(problem, peers.orbit_loop, 1),
        "orbit, 100 steps per loop": train(problem, peers.orbit_loop, 100),
        "lightning, TensorBoardLogger": train(problem, peers.lightning_fit),
        "torch": train(problem, peers.torch_loop),
        "torch, 1 thread": train(problem, peers.torch_loop, threads=1),
        "tensorflow, compiled step with summary": train(problem, peers.python_loop),
        "tensorflow, eager step": train(problem.first(20), peers.python_loop, compiled=False),
        "bare, gather": train(problem, bare_loop),
        "bare, tf.data": train(problem, bare_loop, gather=False),
        "bare, XLA": train(problem, bare_loop, xla=True),
    }
    figures = {
        f"{ours} ÷ bare, gather": lambda ms: ms[ours] / ms["bare, gather"],
        "looplab, jit_compile ÷ bare, XLA": lambda ms: ms["looplab, jit_compile"] / ms["bare, XLA"],
        "µs of logging per step": lambda ms: 1e3 * (ms[ALL] - ms[NONE]),
    }
    return Case(variants, figures)


def inception(count, data_dir):
    """MiniInception on random images of CIFAR-10's shape."""

    class Inception(MiniInception):
        def call(self, images, training=None):  # without this argument, Keras's `fit` normalizes as in inference
            return super().call(images)

    random, steps, variants, figures = np.random.default_rng(0), count(6), {}, {}
    for batch in (64, 128):
        arrays = random.random((steps * batch, 32, 32, 3), "float32"), random.integers(10, size=steps * batch)
        problem = Problem(Inception, arrays, loss=keras.losses.SparseCategoricalCrossentropy, batch=batch)
        for name, peer in {ALL: looplab_fit, "keras": keras_fit, "bare": bare_loop}.items():
            key = f"batch {batch}: {name}"
            variants[key] = train(problem, peer)
            figures[f"images/s, {key}"] = lambda ms, batch=batch, key=key: 1e3 * batch / ms[key]
    return Case(variants, figures)


def one_weight_problem(steps, metrics=list):
    x = np.random.default_rng(0).normal(size=(64 * steps, 1)).astype("float32")

    def model():
        return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])

    return Problem(model, (x, 3 * x), partial(keras.optimizers.SGD, 1e-3), metrics=metrics)


def one_weight(count, data_dir):
    """A linear model with one weight: what a step costs beside its model."""
    problem = one_weight_problem(count(2000))
    variants = {
        ALL: train(problem, looplab_fit),
        NONE: train(problem, looplab_fit, log=False),
        "keras": train(problem, keras_fit),
        "keras, TensorBoard": train(problem, keras_fit, tensorboard=True),
        "bare": train(problem, bare_loop),
    }
    own = {
        "own µs per step, looplab": lambda ms: 1e3 * (ms[ALL] - ms["bare"]),
        "own cost, looplab ÷ keras": lambda ms: (ms[ALL] - ms["bare"]) / (ms["keras"] - ms["bare"]),
    }
    return Case(variants, own)


def wide(count, data_dir):
    """A network of 1,000 variables, in 500 small layers."""

    def model():
        dense = partial(keras.layers.Dense, 8, "tanh", kernel_initializer="orthogonal")
        return keras.Sequential([keras.Input((8,)), *(dense() for _ in range(500))])

    problem = Problem(model, (np.random.default_rng(0).normal(size=(64 * count(20), 8)).astype("float32"),))
    variants = {NONE: train(problem, looplab_fit, log=False), "keras": train(problem, keras_fit)}
    return Case({ALL: train(problem, looplab_fit), **variants, "bare": train(problem, bare_loop)}, {})


def metrics(count, data_dir):
    """1, 10 and 100 metrics, and as many `self.log` tags, of the model with one weight."""

    def tagged(number):
        class Tagged(looplab.Trainer):
            def train_step(self, batch):
                logs = super().train_step(batch)
                for tag in range(number):
                    self.log(f"tag_{tag}", logs["loss"])
                return logs

        return Tagged

    problem, figures = one_weight_problem(count(200)), {}
    variants = {"looplab": train(problem, looplab_fit), "keras": train(problem, keras_fit)}
    for number in (1, 10, 100):
        errors = [partial(keras.metrics.MeanAbsoluteError, f"error_{i}") for i in range(number)]
        measured = problem._replace(metrics=lambda errors=errors: [error() for error in errors])
        with_metrics, with_tags = (f"{number} {word}{'s' * (number > 1)}" for word in ("metric", "tag"))
        variants[f"{with_metrics}: looplab"] = train(measured, looplab_fit)
        variants[f"{with_metrics}: keras"] = train(measured, keras_fit)
        variants[f"{with_tags}: looplab"] = train(problem, looplab_fit, kind=tagged(number))
        for key in (f"{with_metrics}: looplab", f"{with_tags}: looplab"):
            figures[f"µs each, {key}"] = lambda ms, n=number, key=key: 1e3 / n * (ms[key] - ms["looplab"])
    return Case(variants, figures)


def gan(count, data_dir):
    """The DCGAN of keras.io, which has two optimizers, unchanged: `Trainer(model).fit` and `model.fit`."""
    sys.path.insert(0, str(ROOT / "tests"))
    from published.gans import SYSTEMS

    system, steps = SYSTEMS[0], count(300)
    data = system.data().repeat().take(steps).cache()

    def fit(kind):
        model, folder = system.model(), tempfile.mkdtemp()
        trainer = looplab.Trainer(model, log_dir=f"{folder}/run") if kind == ALL else model
        callbacks = [keras.callbacks.TensorBoard(folder, update_freq=1)] if "TensorBoard" in kind else []
        call = partial(trainer.fit, data, shuffle=False, verbose=0, callbacks=callbacks)
        return lambda epochs: call(epochs=epochs).history["d_loss"][-1]

    return Case({kind: Variant(partial(fit, kind), steps) for kind in (ALL, "keras", "keras, TensorBoard")}, {})


def calls(layers, method, arguments, times):
    """Variants that call a method of a built trainer with one batch, so many times per epoch."""

    def model():
        hidden = [keras.layers.Dense(8, "relu") for _ in range(layers)]
        return keras.Sequential([keras.Input((4,)), *hidden, keras.layers.Dense(1)])

    x = np.random.default_rng(0).random((32, 4)).astype("float32")
    problem = Problem(model, (x, x.sum(1, keepdims=True)), metrics=lambda: ["mae"])
    batch = problem.arrays[:1] if method == "predict" else problem.arrays

    def set_up(create):
        call = partial(getattr(create(problem), method), *batch, **arguments)

        def run(epochs):
            for _ in range(epochs * times):
                call()

        return run

    logged = partial(looplab_trainer, checkpoint=looplab.Checkpoint(every=1000))
    creators = {NONE: partial(looplab_trainer, log=False), ALL: logged, "keras": keras_model}
    return {name: Variant(partial(set_up, create), times) for name, create in creators.items()}


def on_batch(count, data_dir):
    """`train_on_batch` of networks with 2 and with 20 layers; a step is a call."""
    sections = {f"{layers} layers": calls(layers, "train_on_batch", {}, count(100)) for layers in (2, 20)}
    return Case({f"{section}: {n}": v for section, variants in sections.items() for n, v in variants.items()}, {})


def start(count, data_dir):
    """From the command to the end of the first step, in a new process; then calls with one batch, each a step."""
    sections = {"new process": {name: process("start", name) for name in (NONE, ALL, "keras")}}
    sections |= {call: calls(2, call, {"verbose": 0}, count(10)) for call in ("fit", "evaluate", "predict")}
    variants = {f"{section}: {n}": v for section, variants in sections.items() for n, v in variants.items()}
    ours, theirs = f": {NONE}", ": keras"
    return Case(
        variants, {f"{s}: looplab ÷ keras": lambda cost, s=s: cost[s + ours] / cost[s + theirs] for s in sections}
    )


def checkpoint(count, data_dir):
    """What a checkpoint and a validation of 100 batches cost the loop of the VAE."""
    problem = vae_problem(count(800), data_dir)
    validation = problem.first(100).arrays * 2
    often = looplab.Checkpoint(every=max(1, problem.steps // 8))
    variants = {
        "looplab": train(problem, looplab_fit, checkpoint=None),
        "looplab, 1 checkpoint": train(problem, looplab_fit),
        "looplab, 8 checkpoints": train(problem, looplab_fit, checkpoint=often),
        "looplab, validation": train(problem, looplab_fit, checkpoint=None, validation=validation),
        "keras": train(problem, keras_fit),
        "keras, 1 checkpoint": train(problem, keras_fit, checkpoint=True),
        "keras, validation": train(problem, keras_fit, validation=validation),
    }
    added = {name: name.partition(",")[0] for name in variants if "," in name}
    figures = {f"ms per epoch, {n}": lambda ms, n=n, p=p: problem.steps * (ms[n] - ms[p]) for n, p in added.items()}
    return Case(variants, figures)


def memory(count, data_dir):
    """Peak memory of one epoch over 50,000 images of CIFAR-10's shape."""
    names = "looplab, uint8", "keras, float32", "keras, uint8"
    figures = {f"{names[0]} ÷ {name}": lambda mb, name=name: mb[names[0]] / mb[name] for name in names[1:]}
    return Case({name: process("memory", name) for name in names}, figures, rounds=1)


def growth(count, data_dir):
    """What a step of the model with one weight costs after 10,000 and after 1,000,000 steps."""
    return Case({ALL: process("growth", ALL, count(10_000))}, {}, rounds=1)
