"""Several workers: processes on this machine that find each other over loopback.

Each runs this file, and does what `AS_WORKER` names.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from test_replicas import BATCH, CASES, X, Y, assert_equal_but_for_rounding, interrupted, losses, table, train

import looplab
from looplab.testing import read_scalars

ROOT = Path(looplab.__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = 230
NUMBERS = np.arange(EXAMPLES, dtype="float32")[:, None]
LOST = 75
FAULTS = int(os.environ.get("LOOPLAB_FAULTS", "0"))
SRUN = """#!/bin/bash
export SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NUM_TASKS=2
for rank in 0 1; do SLURM_PROCID=$rank "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit ${status:-0}
"""


def launch(workers, *arguments, timeout=240):
    """Runs this file in several workers: their exit statuses, and what each printed."""
    cluster, index = {"worker": addresses(workers)}, range(workers)
    configs = [json.dumps({"cluster": cluster, "task": {"type": "worker", "index": rank}}) for rank in index]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, env={**environment, "TF_CONFIG": config}, **options) for config in configs]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], printed


def addresses(number):
    with contextlib.ExitStack() as on_exit:
        sockets = [on_exit.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]


# What workers do.


class Seen(looplab.Trainer):
    """Notes the rows that this worker sees."""

    def train_step(self, batch):
        tf.py_function(lambda rows: self.rows.extend(rows.numpy().ravel().tolist()), [batch[0]], [])
        return super().train_step(batch)


def compute(strategy, rank, folder):
    """Compares with one device: what is computed, read, predicted, and wrong."""
    workers = strategy.num_replicas_in_sync
    found = table(strategy, CASES if workers == 2 or FAULTS else ["two optimizers", "sample weights"])
    records = folder / "records"
    for name, data in readings(records).items():
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
            trainer = Seen(model, optimizer=keras.optimizers.SGD(1e-9), loss="mse", seed=0)
        trainer.rows = []
        history = trainer.fit(**data, epochs=1 if name == "generator" else 3, verbose=0)
        found[f"rows: {name}"] = np.array(trainer.rows)
        found[f"losses: {name}"] = np.array(history.history["loss"])
    found["prediction"] = trainer.predict(NUMBERS, batch_size=24, verbose=0)
    found["prediction of files"] = trainer.predict(from_files(records).map(lambda x, y: x), verbose=0)
    evaluation = trainer.evaluate(from_files(records), verbose=0)
    found["evaluation"] = np.array(evaluation["loss"])
    found["weights"] = np.concatenate([weight.ravel() for weight in model.get_weights()])
    broken = X[: 4 * BATCH].copy()
    broken[3 * BATCH + BATCH - 1] = np.nan  # a row of the last worker
    with strategy.scope():
        net = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
        other = looplab.Trainer(net, optimizer="sgd", loss="mse", log_dir=folder / "broken")
    with pytest.raises(FloatingPointError) as raised:
        other.fit(tf.data.Dataset.from_tensor_slices((broken, Y[: 4 * BATCH])).batch(BATCH), verbose=0)
    found["error"] = np.array(str(raised.value))
    tf.random.set_seed(None)
    with pytest.raises(ValueError, match=r"`x` has `shuffle` without a `seed`, so the . workers, which each read"):
        trainer.fit(tf.data.Dataset.from_tensor_slices((NUMBERS, NUMBERS)).shuffle(9).batch(4), verbose=0)
    pairs = tf.data.Dataset.from_tensor_slices((NUMBERS, NUMBERS)).batch(4)
    unordered = pairs.map(lambda x, y: (x, y), num_parallel_calls=2, deterministic=False)
    for method in (trainer.fit, trainer.evaluate):
        with pytest.raises(ValueError, match=r"`x` has `map` with `deterministic=False`, so the . workers, which each"):
            method(unordered, verbose=0)
    with pytest.raises(ValueError, match=f"the trainer has {workers} workers"):
        trainer.train_on_batch(NUMBERS, NUMBERS)
    with pytest.raises(ValueError, match=r"`fit`: `epochs` is 1 on the first worker, and 2 on worker 1. Pass the same"):
        trainer.fit(NUMBERS, NUMBERS, epochs=1 + rank, verbose=0)
    with pytest.raises(ValueError, match="`x`: checksum is"):
        trainer.fit(NUMBERS + rank, NUMBERS, verbose=0)
    trainer.save_weights(folder / "all.weights.h5")
    looks = [keras.callbacks.Callback()] if rank == 0 else []
    assert trainer.evaluate(NUMBERS, NUMBERS, callbacks=looks, verbose=0)
    with strategy.scope():  # of an uneven last batch, whose sparse gradients have another shape
        words = keras.Sequential([keras.Input((1,), dtype="int32"), layers.Embedding(5, 1), layers.Flatten()])
        other = looplab.Trainer(words, optimizer=keras.optimizers.SGD(0.1), loss="mse", seed=0)
    words.set_weights([np.zeros((5, 1))])
    other.fit(NUMBERS[:50] % 5, NUMBERS[:50], batch_size=8, verbose=0, shuffle=False)
    found["embedding"] = words.get_weights()[0]
    np.savez(folder / f"found-{rank}.npz", **found)


def readings(records):
    """The arguments of `fit` for each kind of data."""
    dataset = tf.data.Dataset.from_tensor_slices((NUMBERS, NUMBERS))
    parts = [NUMBERS[start : start + 24] for start in range(0, EXAMPLES, 24)]

    class Parts(keras.utils.PyDataset):
        def __len__(self):
            return len(parts)

        def __getitem__(self, index):
            return parts[index], parts[index]

    return {
        "arrays": {"x": NUMBERS, "y": NUMBERS, "batch_size": 24},
        "dataset": {"x": dataset.shuffle(100, seed=2).batch(24)},
        "files": {"x": from_files(records)},
        "one file": {"x": from_files(records, "3")},
        "function": {"x": lambda epoch: dataset.shuffle(300, seed=epoch).batch(24)},
        "PyDataset": {"x": Parts()},
        "generator": {"x": ((part, part) for part in parts)},
        "passes cut into epochs": {"x": dataset.batch(23), "steps_per_epoch": 10},
    }


def from_files(records, which="*"):
    files = tf.data.Dataset.list_files(f"{records}/{which}", shuffle=False)
    numbers = files.interleave(tf.data.TFRecordDataset, cycle_length=1).map(
        lambda text: tf.reshape(tf.strings.to_number(text), (1,))
    )
    return numbers.map(lambda number: (number, number)).batch(24)


def write_files(records):
    """Five files, the last ones longer."""
    records.mkdir()
    numbers = iter(range(EXAMPLES))
    for index, size in enumerate((20, 30, 50, 60, 70)):
        with tf.io.TFRecordWriter(str(records / str(index))) as writer:
            for _ in range(size):
                writer.write(str(next(numbers)).encode())


class Killed(keras.callbacks.Callback):
    """A worker gets a signal after a step."""

    def __init__(self, step, number):
        super().__init__()
        self.step, self.number = step, number

    def on_train_batch_end(self, batch, logs=None):
        if self.model.steps == self.step:
            os.kill(os.getpid(), self.number)


def run(strategy, rank, folder, *killed):
    """A run of a network with noise and statistics, whose folder is this worker's own disk."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        inner = [layers.Dense(8, "relu"), layers.BatchNormalization(), layers.Dropout(0.2), layers.Dense(1)]
        trainer = looplab.Trainer(
            keras.Sequential([keras.Input((4,)), *inner]),
            optimizer="adam",
            loss="mse",
            metrics=["mae"],
            seed=0,
            log_dir=folder / f"disk-{rank}",
            checkpoint=looplab.Checkpoint(every=7),
        )
    triples = zip(*[iter(map(int, killed))] * 3, strict=True)
    callbacks = [Killed(step, number) for which, step, number in triples if which == rank]
    callbacks.append(looplab.callbacks.Pictures(lambda: {"nothing": np.zeros((1, 1, 1), "uint8")}))
    options = {"batch_size": BATCH, "epochs": 3, "verbose": 0, "resume": True, "callbacks": callbacks}
    history = trainer.fit(X[: 9 * BATCH + 5], Y[: 9 * BATCH + 5], validation_split=0.1, **options)
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"found-{rank}.npz", *trainer.get_weights(), **history.history)


def resume(strategy, rank, folder):
    train(strategy, folder, resume=True)


AS_WORKER = {function.__name__: function for function in (compute, run, resume)}


# Tests.


@pytest.fixture(scope="module")
def one():
    return table(None)


@pytest.fixture(scope="module", params=[2, 3])
def computed(request, tmp_path_factory):
    """What each of two or three workers has found."""
    folder = tmp_path_factory.mktemp("computed")
    write_files(folder / "records")
    statuses, printed = launch(request.param, "compute", folder)
    assert statuses == [0] * request.param, "\n".join(printed)
    return [np.load(folder / f"found-{rank}.npz") for rank in range(request.param)]


def test_workers_compute_what_one_device_computes(computed, one):
    for found in computed:
        cases = [case for case in CASES if case in found]
        assert len(cases) == (7 if len(computed) == 2 or FAULTS else 2)
        assert_equal_but_for_rounding(found, one, cases)


def test_two_workers_compute_the_bits_of_two_replicas(computed, two_devices):
    if len(computed) > 2:
        pytest.skip("TensorFlow adds three numbers in another order")
    for name, values in table(two_devices).items():
        for found in computed:
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_each_example_is_read_once_in_an_epoch(computed):
    names = [name for name in computed[0] if name.startswith("rows: ")]
    assert len(names) == 8
    for name in names:
        every = np.concatenate([found[name] for found in computed])
        seen = np.bincount(every.astype(int), minlength=EXAMPLES)
        expected = np.ones(EXAMPLES) * (1 if name == "rows: generator" else 3)
        if name == "rows: one file":
            expected[(np.arange(EXAMPLES) < 100) | (np.arange(EXAMPLES) >= 160)] = 0
        np.testing.assert_array_equal(seen, expected, err_msg=name)
        assert all(len(found[name]) for found in computed), name


def test_predictions_and_evaluations_are_complete_on_each_worker(computed):
    for found in computed:
        kernel, bias = found["weights"]
        np.testing.assert_allclose(found["prediction"], NUMBERS * kernel + bias, rtol=1e-5)
        np.testing.assert_allclose(found["prediction of files"], NUMBERS * kernel + bias, rtol=1e-5)
        expected = np.mean(np.square(NUMBERS * kernel + bias - NUMBERS), dtype=float)
        np.testing.assert_allclose(found["evaluation"], expected, rtol=1e-5)


def test_workers_have_one_history(computed):
    for name in (name for name in computed[0] if name.startswith("losses: ")):
        for found in computed:
            np.testing.assert_array_equal(found[name], computed[0][name])


def test_a_fault_on_one_worker_is_the_same_error_on_all(computed):
    for found in computed:
        assert found["error"] == computed[0]["error"]
    assert "The loss is not finite, at step 4" in str(computed[0]["error"])
    assert "`x` itself is not finite, first in row 23 of the batch" in str(computed[0]["error"])


def test_sparse_gradients_of_an_uneven_batch_are_added_up(computed):
    table = np.zeros((5, 1))
    for start in range(0, 50, 8):
        rows = np.arange(start, min(start + 8, 50))
        gradient = np.zeros((5, 1))
        for row in rows:
            gradient[row % 5] += 2 * (table[row % 5] - row) / len(rows)
        table -= 0.1 * gradient
    for found in computed:
        np.testing.assert_allclose(found["embedding"], table, rtol=1e-5)


def results(folder):
    return [dict(np.load(folder / f"found-{rank}.npz")) for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What two workers find that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    statuses, printed = launch(2, "run", folder)
    assert statuses == [0, 0], "\n".join(printed)
    assert [path.name for path in sorted(folder.glob("disk-*"))] == ["disk-0"]
    return results(folder)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_workers_end_together_and_resume_to_the_same_bits(tmp_path, whole, number):
    """Once, or as often as LOOPLAB_FAULTS says: one worker ends, or both."""
    dice = random.Random(number.name)
    for end in range(FAULTS or 1):
        folder = tmp_path / str(end)
        killed = [(end + 1) % 2] if number == signal.SIGKILL or end % 3 < 2 else [0, 1]
        ends = [part for rank in killed for part in (rank, dice.randrange(1, 27), int(number))]
        statuses, printed = launch(2, "run", folder, *ends)
        expected = [143, 143] if number == signal.SIGTERM else [-9 if rank in killed else LOST for rank in (0, 1)]
        assert statuses == expected, "\n".join([str(ends), *printed])
        if number == signal.SIGKILL:
            said = f"looplab: worker {end % 2} of 2 stops, because another one has ended. Start all of them again"
            assert said in printed[end % 2]
        for newest in sorted(folder.glob("disk-0/checkpoints/step-*"))[-1:] if end % 4 == 0 else ():
            shutil.rmtree(newest)  # an older one is enough, or none
        statuses, printed = launch(2, "run", folder)
        assert statuses == [0, 0], "\n".join([str(ends), *printed])
        for found, other in zip(results(folder), whole, strict=True):
            assert found.keys() == other.keys()
            for name, values in found.items():
                np.testing.assert_array_equal(values, other[name], err_msg=f"{name} {ends}")


def test_workers_continue_what_replicas_started(tmp_path, two_devices):
    interrupted(two_devices, tmp_path / "two")
    statuses, printed = launch(2, "resume", tmp_path / "two")
    assert statuses == [0, 0], "\n".join(printed)
    found = read_scalars(tmp_path / "two" / "train")["batch_loss"][1]
    np.testing.assert_array_equal(found, losses(two_devices, tmp_path / "whole"))


def test_the_job_file_for_slurm_runs_a_recipe_and_resumes_it(tmp_path):
    """With a stand-in for `srun`, which starts two tasks on this machine."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    job = re.search(r"^```bash\n(#!/bin/bash.*?)^```", README, re.DOTALL | re.MULTILINE)[1]
    flags = "--dataset digits --limit 64 --epochs"
    path = os.pathsep.join([str(srun.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "-1",
        "PATH": path,
        "SLURM_JOB_ID": "7",
    }
    for epochs, said in ((1, "looplab: 2 steps in"), (2, "looplab: 2 of 4 steps in")):
        script = job.replace("looplab.recipes.vae", f"looplab.recipes.mlp {flags} {epochs}")
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 240}
        ended = subprocess.run(["bash", "-c", script], check=False, **options)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count(said) == 1
    folder = tmp_path / "logs" / "vae-7"
    assert (folder / "report.txt").exists()
    assert json.loads((folder / "history.json").read_text())["loss"][1:]
    assert [path.name for path in folder.parent.iterdir()] == ["vae-7"]


def test_the_job_file_for_kubernetes_names_the_workers():
    script = re.search(r"^ +- \|\n(.*?)^ +volumeMounts", README, re.DOTALL | re.MULTILINE)[1]
    script = textwrap.dedent(script).replace("exec python -m looplab.recipes.vae", 'echo "$TF_CONFIG"')
    printed = subprocess.check_output(["bash", "-c", script], env={"JOB_COMPLETION_INDEX": "1"}, text=True)
    config, _, flags = printed.partition(" --strategy")
    assert json.loads(config) == {
        "cluster": {"worker": ["vae-0.vae:2222", "vae-1.vae:2222"]},
        "task": {"type": "worker", "index": 1},
    }
    assert flags.split() == ["multi_worker", "--log-dir", "/runs/vae", "--resume", "/runs/vae"]


if __name__ == "__main__":
    together = tf.distribute.MultiWorkerMirroredStrategy()
    task, own_folder, *rest = sys.argv[1:]
    AS_WORKER[task](together, together.cluster_resolver.task_id, Path(own_folder), *rest)
