"""A long training takes no more memory, files, threads or traces than a short one.

Some 3,000 steps by default, 100,000 with LOOPLAB_FAULTS set.
"""

import ctypes
import gc
import json
import os
import time
from pathlib import Path

import keras
import numpy as np
from runs import FAULTS, Child

import looplab

STEPS_PER_EPOCH = 500
EPOCHS = 200 if FAULTS else 6


class Counting(looplab.Trainer):
    """Counts how often Python goes through its steps."""

    traces = 0

    def train_step(self, batch):
        self.traces += 1
        return super().train_step(batch)

    def test_step(self, batch):
        self.traces += 1
        return super().test_step(batch)


class Measured(keras.callbacks.Callback):
    """Notes what the process holds at the end of each epoch, when no save is under way."""

    stateless = True

    def __init__(self, log_dir):
        super().__init__()
        self._log_dir = log_dir
        self._notes = []

    def on_epoch_end(self, epoch, logs=None):
        deadline = time.monotonic() + 30
        while list((self._log_dir / "checkpoints").glob(".unfinished-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        gc.collect()
        # What is free, and not yet given back, makes a saw of some 5 MiB, which falls each 30,000 steps.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._notes.append(
            {
                "MiB": memory(),
                "files": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
                "traces": self.model.traces,
            }
        )

    def on_train_end(self, logs=None):
        (self._log_dir / "notes.json").write_text(json.dumps(self._notes))


def memory() -> float:
    """The memory of this process that is resident, in MiB."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def tiny(log_dir):
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(2 * STEPS_PER_EPOCH - 1, 4)).astype("float32")
    y = x.sum(1, keepdims=True)
    trainer = Counting(
        keras.Sequential([keras.layers.Input((4,)), keras.layers.Dropout(0.1, seed=1), keras.layers.Dense(1)]),
        optimizer="adam",
        loss="mse",
        metrics=["mae"],
        log_dir=log_dir,
        seed=1,
    )
    arguments = {"x": x, "y": y, "batch_size": 2, "epochs": EPOCHS, "validation_data": (x[:21], y[:21])}
    return trainer, {**arguments, "callbacks": [Measured(log_dir)]}


def test_a_long_run_holds_no_more_than_a_short_one(tmp_path):
    child = Child(tiny, tmp_path / "run")
    assert child.wait(60 + EPOCHS * 10) == 0, child.stderr()
    assert "Warning" not in child.stderr()
    notes = json.loads((tmp_path / "run" / "notes.json").read_text())
    assert len(notes) == EPOCHS
    later = notes[1000 // STEPS_PER_EPOCH - 1 :]  # from 1,000 steps on
    grown = max(note["MiB"] for note in later) - later[0]["MiB"]
    print(
        f"{EPOCHS * STEPS_PER_EPOCH} steps: {grown:.1f} MiB more than after 1,000; then {later[0]}, at last {later[-1]}"
    )
    assert grown <= 5
    for held in ("files", "threads", "traces"):
        assert {note[held] for note in later} == {later[0][held]}, held
    assert notes[-1]["traces"] == notes[0]["traces"] <= 4  # of two steps, each traced again where it makes metrics


class Steps(keras.callbacks.Callback):
    """Notes the memory after each step."""

    stateless = True

    def __init__(self, log_dir):
        super().__init__()
        self._log_dir = log_dir
        self._notes = []

    def on_train_batch_end(self, batch, logs=None):
        self._notes.append(memory())

    def on_train_end(self, logs=None):
        (self._log_dir / "notes.json").write_text(json.dumps(self._notes))


def large(log_dir):
    """A state of 48 MiB, saved after each of 20 steps."""
    keras.utils.set_random_seed(0)
    x = np.ones((20, 1024), "float32")
    model = keras.Sequential([keras.layers.Input((1024,)), keras.layers.Dense(4096)])
    checkpoint = looplab.Checkpoint(every=1)
    trainer = looplab.Trainer(model, optimizer="adam", loss="mse", log_dir=log_dir, checkpoint=checkpoint)
    arguments = {"x": x, "y": np.ones((20, 4096), "float32"), "batch_size": 1}
    return trainer, {**arguments, "callbacks": [Steps(log_dir)]}


def without_collector(trainer, arguments):
    gc.disable()


def test_what_is_saved_is_freed_at_once_and_not_by_the_garbage_collector(tmp_path):
    child = Child(large, tmp_path / "run", before=without_collector)
    assert child.wait() == 0, child.stderr()
    notes = json.loads((tmp_path / "run" / "notes.json").read_text())
    print(f"MiB after each step: {' '.join(f'{note:.0f}' for note in notes)}")
    assert max(notes) - notes[3] < 3 * 48  # some copies may be on their way; not one for each step
