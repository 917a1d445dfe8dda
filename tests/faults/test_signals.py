"""SIGTERM and SIGINT while a run traces, trains, validates or saves: it saves, exits, and resumes to the same bits.

Each once by default, 50 times each with LOOPLAB_FAULTS=200.
"""

import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from runs import FAULTS, NETS, Child, Outcome, check_same, checkpoints, mark, steps_seen

import looplab
import looplab.checkpoint.store

TIMES = FAULTS // 4 or 1
STEP = 0.05
"""Seconds that a step sleeps."""
SAVE = 0.3
"""Seconds that a save sleeps, in the tests of signals in it."""
SLACK = 2.0
"""Seconds that a busy machine may take for everything else."""
SIGNALS = [signal.SIGTERM, signal.SIGINT]
# What marks the start of a phase, and how many seconds it lasts at least: the signal arrives in these.
PHASES = {
    "trace": ("trace", 0.3),
    "train": ("step", 4 * STEP),
    "validation": ("validation", STEP),
    "save": ("save", SAVE),
    "last save": (".unfinished-step-12-epoch-2", SAVE),
}


class Slow(layers.Layer):
    """Sleeps when it is called or traced, and notes in a file the time of each step."""

    def __init__(self, seconds, log_dir):
        super().__init__()
        self._seconds = seconds
        self._log_dir = log_dir

    def call(self, inputs):
        mark(self._log_dir, "trace")
        time.sleep(0.2)
        with tf.control_dependencies([tf.py_function(self._sleep, [], [])]):
            return tf.identity(inputs)

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, inputs.dtype)

    def _sleep(self):
        with steps_file(self._log_dir).open("a") as file:
            file.write(f"{time.time()}\n")
        mark(self._log_dir, "step")
        time.sleep(self._seconds)


def steps_file(log_dir: Path) -> Path:
    return log_dir.with_name(f"{log_dir.name}.child-steps")


def slow(log_dir, seconds=STEP, **options):
    """Two epochs of 6 steps, with a validation of 3 after each."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(22, 4)).astype("float32")
    y = x.sum(1, keepdims=True)
    inputs = layers.Input((4,))
    outputs = layers.Dense(1)(layers.Dropout(0.2, seed=1)(Slow(seconds, log_dir)(inputs)))
    checkpoint = looplab.Checkpoint(every=3)
    options |= {"log_dir": log_dir, "seed": 1, "checkpoint": checkpoint}
    trainer = looplab.Trainer(keras.Model(inputs, outputs), optimizer="adam", loss="mse", **options)
    return trainer, {"x": x, "y": y, "batch_size": 4, "epochs": 2, "validation_data": (x[:11], y[:11])}


def slower(log_dir):
    return slow(log_dir, seconds=1.0, steps_per_execution=3)


def very_slow(log_dir):
    return slow(log_dir, seconds=6.0)


def save_slowly(trainer, arguments):
    """Lets each of the three files of a save take its time."""
    sync = looplab.checkpoint.files.sync

    def slowly(path):
        if path.is_file():
            mark(trainer.log_dir, "save")
            mark(trainer.log_dir, path.parent.name)
            time.sleep(SAVE / 3)
        sync(path)

    looplab.checkpoint.files.sync = slowly


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return Outcome.uninterrupted(slow, tmp_path_factory.mktemp("slow") / "run")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_a_signal_ends_resumes_to_the_same_bits(phase, number, expected, tmp_path):
    dice = random.Random(f"{number.name} in {phase}")
    for attempt in range(TIMES):
        log_dir = tmp_path / f"run-{attempt}"
        child = Child(slow, log_dir, before=save_slowly if "save" in phase else None)
        start, seconds = PHASES[phase]
        child.wait_for(start)
        time.sleep(dice.uniform(0, seconds))
        sent = time.time()
        child.send(number)
        assert child.wait() == 128 + number, child.stderr()
        if phase != "trace":  # the trace ends first
            assert time.time() - sent < STEP + 2 * SAVE + SLACK
        check_interrupted(log_dir, child.stderr(), number, sent, traced=phase != "trace")
        child = Child(slow, log_dir)
        assert child.wait() == 0, child.stderr()
        check_same(log_dir, expected)


def check_interrupted(log_dir, stderr, number, sent, traced):
    """At most one step started after the signal, all steps are saved, and one line says how to resume."""
    steps = list(map(float, steps_file(log_dir).read_text().split())) if traced else []
    assert sum(moment > sent for moment in steps) <= 1
    saved = max([done for done, _ in checkpoints(log_dir)], default=0)
    assert saved == steps_seen(log_dir)
    assert (saved > 0) == traced
    assert not list((log_dir / "checkpoints").glob(".unfinished-*"))
    lines = [line for line in stderr.splitlines() if "To resume" in line]
    assert lines == [
        f"looplab: {number.name}: {saved} steps are saved in {log_dir}. To resume: `fit(..., resume=True)`"
    ]
    assert len(re.findall("again to exit at once", stderr)) == 1
    assert "Traceback" not in stderr


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_step_that_a_signal_comes_in_is_the_last(number, tmp_path):
    child = Child(slower, tmp_path / "run")
    child.wait_for("step")
    time.sleep(0.3)
    child.send(number)
    assert child.wait() == 128 + number, child.stderr()
    assert len(steps_file(tmp_path / "run").read_text().split()) == steps_seen(tmp_path / "run") == 1


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_ends_a_run_within_its_step(number, tmp_path):
    for attempt in range(TIMES):
        log_dir = tmp_path / f"run-{attempt}"
        child = Child(very_slow, log_dir)
        child.wait_for("step")
        child.send(number)
        deadline = time.monotonic() + SLACK
        while "again to exit at once" not in child.stderr():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        again = time.monotonic()
        child.send(number)
        assert child.wait() == 128 + number
        assert time.monotonic() - again < SLACK  # the step takes longer
        assert checkpoints(log_dir) == []


@pytest.mark.parametrize("number", SIGNALS if FAULTS else SIGNALS[:1], ids=lambda number: number.name)
def test_a_program_that_a_signal_ends_has_the_exit_status_of_shells(number, tmp_path):
    log_dir = tmp_path / "run"
    program = f"import pathlib, runs, test_signals; runs.train(test_signals.slow, pathlib.Path({str(log_dir)!r}))"
    with subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent) as process:
        try:
            deadline = time.monotonic() + 120
            while not log_dir.with_name("run.child-step").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(number)
            assert process.wait(60) == 128 + number
        finally:
            process.kill()


@pytest.mark.parametrize("main_thread", [True, False])
def test_handlers_are_installed_in_the_main_thread_alone_and_only_while_it_trains(main_thread, tmp_path):
    def now():
        threads = [thread.name for thread in threading.enumerate() if thread.name == "looplab-signals"]
        return [signal.getsignal(number) for number in SIGNALS], threads

    class Look(keras.callbacks.Callback):
        stateless = True

        def on_epoch_end(self, epoch, logs=None):
            seen.append(now())

    def fit():
        trainer, arguments = NETS["vae"](tmp_path / "run")
        ended.append(trainer.fit(**{**arguments, "callbacks": [Look()]}, verbose=0))

    before, seen, ended = now(), [], []
    if main_thread:
        fit()
    else:
        thread = threading.Thread(target=fit)
        thread.start()
        thread.join()
    assert len(ended) == 1
    assert len(seen) == 3
    for handlers, threads in seen:
        assert (handlers == before[0]) != main_thread
        assert threads == ["looplab-signals"] * main_thread
    assert now() == before
    assert signal.set_wakeup_fd(-1) == -1
