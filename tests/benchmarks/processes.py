"""What a process of its own must measure: `python -m tests.benchmarks.processes NOW TASK KIND` prints it as JSON.

Memory is measured on Linux alone.
"""

import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np


def trainer_of(kind, layers, optimizer="sgd", loss="mse"):
    """A network in a trainer, with or without a log folder, or compiled by Keras."""
    model, settings = keras.Sequential(layers), {"optimizer": optimizer, "loss": loss}
    if kind.startswith("keras"):
        model.compile(**settings)
        return model
    import looplab  # not in processes that measure Keras

    return looplab.Trainer(model, log_dir=f"{tempfile.mkdtemp()}/run" if "all scalars" in kind else None, **settings)


def start(began, kind):
    """Seconds from the command to the end of `fit` of one batch."""
    x = np.zeros((64, 784), "float32")
    layers = [keras.Input((784,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(784, "sigmoid")]
    trainer_of(kind, layers, "adam").fit(x, x, batch_size=64, verbose=0)
    return {"seconds": time.time() - began}


def memory(began, kind):
    """Peak memory of one epoch over arrays of the size of CIFAR-10."""
    random, shape = np.random.default_rng(0), (50_000, 32, 32, 3)
    images = random.integers(256, size=shape, dtype="uint8") if "uint8" in kind else random.random(shape, "float32")
    labels = random.integers(10, size=len(images), dtype="uint8")
    layers = [keras.Input(shape[1:]), keras.layers.Rescaling(1 / 255), keras.layers.Flatten()]
    trainer = trainer_of(kind, [*layers, keras.layers.Dense(10, "softmax")], loss="sparse_categorical_crossentropy")
    trainer.fit(images, labels, batch_size=64, verbose=0)
    # `ru_maxrss` includes the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"peak MB": int(peak[1]) * 1024 / 1e6}


def growth(began, kind, steps):
    """What a step costs in the first and in the last of 100 epochs of so many steps, and how much memory they add."""
    seconds, megabytes = [], []

    def record(epoch, logs):
        seconds.append(time.perf_counter())
        megabytes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)

    x = np.random.default_rng(0).normal(size=(64 * steps, 1)).astype("float32")
    trainer = trainer_of(kind, [keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    trainer.fit(
        x, 3 * x, epochs=100, batch_size=64, verbose=0, callbacks=[keras.callbacks.LambdaCallback(None, record)]
    )
    costs = np.diff(seconds) / steps * 1e3
    first, last = statistics.median(costs[:5]), statistics.median(costs[-5:])
    measures = {f"ms at {steps:,} steps": first, f"at {100 * steps:,}": last, "late ÷ early": last / first}
    return measures | {"MB per 100,000 steps": (megabytes[-1] - megabytes[9]) / (90 * steps) * 1e5}


if __name__ == "__main__":
    now, task, kind, *numbers = sys.argv[1:]
    print(json.dumps({"start": start, "memory": memory, "growth": growth}[task](float(now), kind, *map(int, numbers))))
