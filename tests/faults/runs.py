"""Small trainings to be killed, the child processes in which they run, and what a run leaves in its folder.

The environment variable LOOPLAB_FAULTS sets how many faults the tests make: without it each test makes a few,
LOOPLAB_FAULTS=200 is the long form (hours).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import looplab
import looplab.checkpoint.files
import looplab.checkpoint.store
from looplab.testing import read_scalars

FAULTS = int(os.environ.get("LOOPLAB_FAULTS", "0"))
"""How many faults of a kind the long form makes; 0 is the short form."""
EVERY = 3
"""Steps between two checkpoints."""

_processes = multiprocessing.get_context("forkserver")


# Trainings.


class Sampling(layers.Layer):
    """A normal sample, whose divergence from the standard normal distribution is added to the loss."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(5)

    def call(self, inputs):
        mean, log_var = inputs
        self.add_loss(-0.5 * tf.reduce_mean(1 + log_var - mean**2 - tf.exp(log_var)))
        return mean + tf.exp(0.5 * log_var) * keras.random.normal(tf.shape(mean), seed=self.seed_generator)


def vae(log_dir: Path, every: int = EVERY, keep: int = 2) -> tuple[looplab.Trainer, dict[str, Any]]:
    """A variational auto-encoder whose learning rate a callback lowers: 3 epochs of 7 steps, 4 rows in the last."""
    _reset()
    inputs = layers.Input((12,))
    hidden = layers.Dense(8, activation="relu")(inputs)
    sample = Sampling()([layers.Dense(3)(hidden), layers.Dense(3)(hidden)])
    model = keras.Model(inputs, layers.Dense(12, activation="sigmoid")(sample))
    x = np.random.default_rng(0).random((100, 12), "float32")
    trainer = looplab.Trainer(
        model,
        optimizer=keras.optimizers.Adam(0.01),
        loss="binary_crossentropy",
        log_dir=log_dir,
        seed=7,
        checkpoint=looplab.Checkpoint(every=every, keep=keep),
    )
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", min_delta=10.0, patience=1, factor=0.5)
    return trainer, {"x": x, "y": x, "batch_size": 16, "epochs": 3, "callbacks": [plateau]}


def conv(log_dir: Path, every: int = EVERY, keep: int = 2) -> tuple[looplab.Trainer, dict[str, Any]]:
    """A convolutional net with all that has state beside its weights: 3 epochs of 8 steps, 3 rows in the last."""
    _reset()
    model = keras.Sequential(
        [
            layers.Input((6, 6, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.3, seed=3),
            layers.Dense(3),
        ]
    )
    random = np.random.default_rng(1)
    x, y = random.random((115, 6, 6, 1), "float32"), random.integers(0, 3, 115)
    trainer = looplab.Trainer(
        model,
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.02, 5, 0.8)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        log_dir=log_dir,
        seed=7,
        checkpoint=looplab.Checkpoint(every=every, keep=keep),
    )
    callbacks = [
        keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True),  # it stops in the last
        # It cannot set a learning rate that has a schedule, but it counts how long it waits.
        keras.callbacks.ReduceLROnPlateau("val_loss", patience=5, min_delta=10.0),
    ]
    return trainer, {
        **{"x": x[:-35], "y": y[:-35], "batch_size": 11, "epochs": 3},
        **{"validation_data": (x[-35:], y[-35:]), "callbacks": callbacks},
    }


NETS = {"vae": vae, "conv": conv}


def _reset() -> None:
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


# Children.


class Child:
    """A process that trains with `resume=True`, writes `history.json` into `log_dir`, and then ends.

    Args:
        build: What it trains, `build(log_dir)`: a function of a module, as it goes to the process by its name.
        log_dir: The folder. What the child reports lies beside it, in `<log_dir>.child-*`.
        before: Called in the child with the trainer and the arguments of `fit`, before it starts.
        dies_at: At which event of saving it kills itself.
    """

    def __init__(
        self,
        build: Callable[[Path], tuple[looplab.Trainer, dict[str, Any]]],
        log_dir: Path,
        before: Callable[[looplab.Trainer, dict[str, Any]], None] | None = None,
        dies_at: Event | None = None,
    ):
        self.log_dir = log_dir
        self._process = _processes.Process(target=train, args=(build, log_dir, before, dies_at))
        for file in log_dir.parent.glob(f"{log_dir.name}.child-*"):
            file.unlink()
        _start_server()
        self._process.start()

    def stderr(self) -> str:
        """What it wrote there, and to stdout."""
        file = _mark(self.log_dir, "stderr")
        return file.read_text() if file.exists() else ""

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def kill_after(self, seconds: float) -> None:
        """Kills it after so many seconds, if it has not ended by then."""
        self._process.join(seconds)
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGKILL)

    def wait(self, seconds: float = 120) -> int:
        """Waits for its end, and returns its exit status, or -9 where it was killed."""
        self._process.join(seconds)
        status = self._process.exitcode
        if status is None:
            self.send(signal.SIGKILL)
            raise AssertionError(f"A child did not end in {seconds} seconds: {self.stderr()}")
        self._process.close()
        return status

    def wait_for(self, phase: str, seconds: float = 120, ends: bool = False) -> bool:
        """Waits until it has marked a phase; False where it has ended before, and that is allowed."""
        deadline = time.monotonic() + seconds
        while not (seen := _mark(self.log_dir, phase).exists()) and self._process.is_alive():
            assert time.monotonic() < deadline, f"No {phase} in {seconds} seconds: {self.stderr()}"
            time.sleep(0.002)
        seen = seen or _mark(self.log_dir, phase).exists()
        assert seen or ends, f"It ended before {phase}: {self.stderr()}"
        return seen


def _start_server() -> None:
    """Starts the process that children are forked from, which costs seconds once and not with each child."""
    _processes.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


def mark(log_dir: Path, phase: str) -> None:
    """Reports to the parent that a child is in a phase."""
    _mark(log_dir, phase).touch()


def _mark(log_dir: Path, phase: str) -> Path:
    return log_dir.with_name(f"{log_dir.name}.child-{phase}")


class Marks(keras.callbacks.Callback):
    """Marks the start of training and validation; it is not part of a run's state."""

    stateless = True

    def __init__(self, log_dir: Path):
        super().__init__()
        self._log_dir = log_dir

    def on_train_begin(self, logs=None):
        mark(self._log_dir, "train")

    def on_test_begin(self, logs=None):
        mark(self._log_dir, "validation")


def train(build, log_dir, before=None, dies_at=None) -> None:
    """What a child does."""
    descriptor = os.open(_mark(log_dir, "stderr"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 2)
    os.dup2(descriptor, 1)
    os.close(descriptor)
    trainer, arguments = build(log_dir)
    arguments["callbacks"] = [*arguments.get("callbacks", ()), Marks(log_dir)]
    saving = Saving(dies_at)
    if before is not None:
        before(trainer, arguments)
    mark(log_dir, "fit")
    start = time.monotonic()
    history = trainer.fit(**arguments, resume=True, verbose=0).history
    seconds = time.monotonic() - start
    write_history(log_dir, history)
    report = {"seconds": seconds, "events": [dataclasses.astuple(event) for event in saving.events]}
    _mark(log_dir, "end").write_text(json.dumps(report))


def write_history(log_dir: Path, history: dict[str, list[float]]) -> None:
    """`history.json`, whole or not at all."""
    unfinished = log_dir / "history.unfinished"
    unfinished.write_text(json.dumps({name: list(map(repr, map(float, values))) for name, values in history.items()}))
    unfinished.rename(log_dir / "history.json")


# Saving, watched.


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that a save does to the disk."""

    save: int
    """Which save of the process, from 0."""
    kind: str
    """"write", "fsync", "rename" or "remove"."""
    index: int
    """Which of its kind in this save, from 0."""


class Saving:
    """Counts what saves do to the disk, and kills the process at one event.

    A write and a removal (of a folder) are killed when they are half done, an fsync and a rename before.
    """

    def __init__(self, dies_at: Event | None):
        self.events: list[Event] = []
        self._dies_at = dies_at
        self._save = -1
        store: Any = looplab.checkpoint.store
        files: Any = looplab.checkpoint.files
        self._sync = files.sync
        files.sync = self._halve
        files.shutil = _With(shutil, rmtree=self._remove)
        files.os = _With(os, fsync=self._before("fsync", os.fsync))
        store.os = _With(os, rename=self._before("rename", os.rename))
        write = store.Store._write

        def counted(checkpoints, *arguments):
            self._save += 1
            write(checkpoints, *arguments)

        store.Store._write = counted

    def _now(self, kind: str) -> bool:
        """Counts an event; whether the process has to die at it."""
        if self._save < 0:  # what comes before the first save, such as the removal of what another process left
            return False
        index = sum((event.save, event.kind) == (self._save, kind) for event in self.events)
        self.events.append(Event(self._save, kind, index))
        return self.events[-1] == self._dies_at

    def _before(self, kind: str, function: Callable) -> Callable:
        def watched(*arguments):
            if self._now(kind):
                _die()
            return function(*arguments)

        return watched

    def _remove(self, path: Path, ignore_errors: bool = False) -> None:
        if Path(path).exists() and self._now("remove"):
            sorted(Path(path).iterdir())[0].unlink()
            _die()
        shutil.rmtree(path, ignore_errors)

    def _halve(self, path: Path) -> None:
        """Flushes a file to disk, or leaves half of it."""
        if path.is_file() and self._now("write"):
            os.truncate(path, path.stat().st_size // 2)
            _die()
        self._sync(path)


class _With:
    """A thing with some of its attributes exchanged."""

    def __init__(self, thing: Any, **attributes: Any):
        self._thing = thing
        vars(self).update(attributes)

    def __getattr__(self, name):
        return getattr(self._thing, name)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# What a run leaves.


def checkpoints(log_dir: Path) -> list[tuple[int, int]]:
    """(steps, epochs) of each checkpoint, in order. Each is whole: that is checked here without looplab."""
    found = []
    for path in (log_dir / "checkpoints").glob("step-*"):
        files = json.loads((path / "manifest.json").read_text())["files"]
        assert set(files) == {"arrays.safetensors", "state.json"}
        for name, entry in files.items():
            content = (path / name).read_bytes()
            assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}, path
        found.append(tuple(map(int, re.fullmatch(r"step-(\d+)-epoch-(\d+)", path.name).groups())))
    return sorted(found)


def steps_seen(log_dir: Path) -> int:
    """The last step in the event files."""
    steps, _ = read_scalars(log_dir / "train").get("batch_loss", ([0], []))
    return int(max(steps))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All results of a run, as bytes and exact numbers."""

    newest: tuple[int, int]
    arrays: bytes
    state: dict[str, Any]
    """All but the names and sizes of files."""
    history: dict[str, list[str]]
    points: dict[str, tuple[list[int], bytes]]

    seconds: float = 0.0
    """How long `fit` took."""
    events: list[Event] = dataclasses.field(default_factory=list)
    """What its saves did to the disk."""

    @classmethod
    def of(cls, log_dir: Path) -> Outcome:
        steps, epochs = checkpoints(log_dir)[-1]
        newest = log_dir / "checkpoints" / f"step-{steps}-epoch-{epochs}"
        state = json.loads((newest / "state.json").read_text())
        del state["files"]
        points = {
            f"{folder}/{tag}": (numbers.tolist(), values.tobytes())
            for folder in ("train", "validation")
            for tag, (numbers, values) in read_scalars(log_dir / folder).items()
        }
        return cls(
            (steps, epochs),
            (newest / "arrays.safetensors").read_bytes(),
            state,
            json.loads((log_dir / "history.json").read_text()),
            points,
        )

    @classmethod
    def uninterrupted(cls, build: Callable, log_dir: Path) -> Outcome:
        """That of a run in one process, without interruption."""
        child = Child(build, log_dir)
        assert child.wait() == 0, child.stderr()
        report = json.loads(_mark(log_dir, "end").read_text())
        events = [Event(*values) for values in report["events"]]
        return dataclasses.replace(cls.of(log_dir), seconds=report["seconds"], events=events)


def check_same(log_dir: Path, expected: Outcome) -> None:
    """Checks that a run ended with the same bits as another, and left nothing unfinished."""
    found = Outcome.of(log_dir)
    assert found.newest == expected.newest
    assert found.history == expected.history
    assert found.points.keys() == expected.points.keys()
    for tag, points in expected.points.items():
        assert found.points[tag] == points, tag
    assert found.state == expected.state
    assert found.arrays == expected.arrays
    assert not list((log_dir / "checkpoints").glob(".unfinished-*"))
