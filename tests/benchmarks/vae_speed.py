"""How long a step of the VAE takes, against `Model.fit` with TensorBoard at every batch.

    python tests/benchmarks/vae_speed.py --data-dir .data

All variants run in turn in one process, on the same images and from the same weights; each round is two epochs of each.
The figures are milliseconds a step, and ratios within a round: medians over the rounds, the first left out.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import looplab
from looplab.recipes.vae import VAE


def looplab_epochs(images, log_dir):
    trainer = looplab.Trainer(VAE(), optimizer=keras.optimizers.Adam(1e-3), loss="mse", seed=0, log_dir=log_dir)
    return lambda: trainer.fit(images, images, batch_size=64, epochs=2, verbose=0)


def keras_epochs(images, log_dir):
    model = VAE()
    model.compile(optimizer=keras.optimizers.Adam(1e-3), loss="mse")
    callbacks = [] if log_dir is None else [keras.callbacks.TensorBoard(log_dir, update_freq=1)]
    return lambda: model.fit(images, images, batch_size=64, epochs=2, verbose=0, callbacks=callbacks)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data-dir")
    arguments = parser.parse_args()

    arrays = looplab.Data("mnist", arguments.data_dir).load()
    images = arrays.x_train.reshape(len(arrays.x_train), -1) / np.float32(255)
    steps = 2 * -(-len(images) // 64)
    with tempfile.TemporaryDirectory() as folder:
        variants = {
            "looplab, every scalar": looplab_epochs(images, Path(folder) / "looplab"),
            "looplab, no summaries": looplab_epochs(images, None),
            "Model.fit, TensorBoard(update_freq=1)": keras_epochs(images, str(Path(folder) / "keras")),
            "Model.fit, no summaries": keras_epochs(images, None),
        }
        seconds = {name: [] for name in variants}
        for _ in range(arguments.rounds + 1):
            for name, epochs in variants.items():
                began = time.perf_counter()
                epochs()
                seconds[name].append(time.perf_counter() - began)
    ours = seconds["looplab, every scalar"][1:]
    print(f"{arrays.name}, {steps} steps a round, {arguments.rounds} rounds")
    for name, all_taken in seconds.items():
        taken = all_taken[1:]
        ratio = statistics.median(other / our for other, our in zip(taken, ours, strict=True))
        median = statistics.median(taken) / steps * 1e3
        print(f"{name:38} {median:6.2f} ms a step   {ratio:5.2f} times looplab with every scalar")


if __name__ == "__main__":
    main()
