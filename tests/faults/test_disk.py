"""A disk that is full, or cannot be written to: one clear error, what was saved loads, and with room it resumes.

All of it happens in a small file system in memory, in a mount namespace of its own. With LOOPLAB_FAULTS set it
tries twenty sizes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONG = os.environ.get("LOOPLAB_FAULTS", "0") != "0"
# A checkpoint has 300 KiB, and 20 are kept; the event files have less than 100.
SIZES = [4, 16, 48, 96, 200, 330, 340, 350, 400, 620, 640, 660, 700, 1000, 1300, 1650, 2200, 3100, 4200, 5200]
SIZES = SIZES if LONG else [16, 350, 1000]

# It forks, because TensorFlow takes seconds to import; what runs in it has not been used before.
DRIVER = '''
import contextlib, functools, hashlib, json, os, shutil, subprocess, sys, time, traceback, warnings
from pathlib import Path

import keras, numpy as np, tensorflow as tf
import looplab
from looplab.checkpoint.store import Store
from looplab.testing import read_scalars

with contextlib.suppress(ImportError):
    import preloaded  # what it has translated, each child need not

disk, out, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
run, filler = disk / "run", disk / "filler"


class Fill(keras.callbacks.Callback):
    """Leaves no room from a step in the first epoch on."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 11 and not filler.exists():
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))


def trainer(every=2):
    keras.utils.set_random_seed(0)
    inputs = keras.layers.Input((8,))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dense(7500, "relu")(inputs)))
    return looplab.Trainer(
        model,
        optimizer=keras.optimizers.SGD(1e-4),
        loss="mse",
        seed=1,
        log_dir=run,
        checkpoint=looplab.Checkpoint(every=every, keep=99),
    )


def fit(every=2, callbacks=()):
    x = np.random.default_rng(0).normal(size=(40, 8)).astype("float32")
    made = trainer(every)
    history = made.fit(
        x, x[:, :1], batch_size=2, epochs=2, resume=True, verbose=0, callbacks=list(callbacks)
    ).history
    np.savez(out / "weights.npz", *made.get_weights())
    return {"history": history, "steps": made.steps}


def restore():
    made = trainer()
    made.build(np.zeros((2, 8), "float32"), np.zeros((2, 1), "float32"))
    made.restore("newest")
    return {"steps": int(made.optimizer.iterations)}


def newest():
    with warnings.catch_warnings(action="error"):  # all are whole
        saved = Store(run / "checkpoints", looplab.Checkpoint(keep=99)).newest()
    return {"steps": saved and saved.snapshot.state.steps, "kept": len(list(run.glob("checkpoints/step-*")))}


def points():
    scalars = read_scalars(run / "train")
    return {tag: [steps.tolist(), values.tolist()] for tag, (steps, values) in scalars.items()}


def child(do):
    """The outcome of a process that does it: its exit status, what it reports, how long it took."""
    start = time.monotonic()
    if (pid := os.fork()) == 0:
        os.dup2(os.open(out / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        status = 1
        try:
            (out / "report").write_text("null")
            (out / "report").write_text(json.dumps(do()))
            status = 0
        except BaseException as error:
            traceback.print_exc()
            kind = [base.__name__ for base in type(error).__mro__]
            (out / "report").write_text(json.dumps({"kind": kind, "message": str(error)}))
        sys.stderr.flush()
        os._exit(status)
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() - start > 60:
            os.kill(pid, 9)
            return {"status": "hangs"}
        time.sleep(0.02)
    status = os.waitstatus_to_exitcode(ended[1])
    seconds = time.monotonic() - start
    report = json.loads((out / "report").read_text())
    return {"status": status, "report": report, "stderr": (out / "stderr").read_text()[-3000:], "seconds": seconds}


def mount(*options):
    subprocess.run(["mount", *options, str(disk)], check=True)


def case(name):
    options = "size=16m,nr_inodes=20" if name == "inodes" else f"size={name}k" if isinstance(name, int) else "size=16m"
    mount("-t", "tmpfs", "-o", options, "tmpfs")
    if name == "full":
        Fill().on_train_batch_end(11)
    done = {"first": child(functools.partial(fit, 10, [Fill()]) if name == "filled" else fit)}
    if name == "enough":
        mount("-o", "remount,ro")
        done["read-only"], done["restore"] = child(fit), child(restore)
    done["newest"] = child(newest)
    mount("-o", "remount,rw,size=64m,nr_inodes=1000")
    filler.unlink(missing_ok=True)
    done["second"] = child(fit)
    done["points"] = child(points)
    done["left"] = [path.name for path in [*run.glob("checkpoints/.*"), *run.glob(".*")] if path.name != ".lock"]
    with np.load(out / "weights.npz") as file:
        done["weights"] = hashlib.sha256(b"".join(array.tobytes() for array in file.values())).hexdigest()
    if name == "enough":
        shutil.rmtree(run)
        mount("-o", "remount,ro")
        done["new, read-only"] = child(fit)
    subprocess.run(["umount", str(disk)], check=True)
    return done


print(json.dumps({str(name): case(name) for name in cases}))
'''

CASES = ["enough", *SIZES, "full", "filled", *(["inodes"] if LONG else [])]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The outcome of each case, all from one process."""
    alone = ["unshare", "-Urm"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs `unshare` with user namespaces, to mount a small file system")
    disk, out = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("out")
    command = [*alone, sys.executable, "-c", DRIVER, str(disk), str(out), json.dumps(CASES)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60 + 60 * len(CASES), check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_with_enough_room_completes(outcomes):
    enough = outcomes["enough"]
    assert enough["first"]["status"] == enough["second"]["status"] == 0, enough["first"]["stderr"]
    assert enough["first"]["report"]["steps"] == 40
    assert (enough["newest"]["report"]["steps"], enough["newest"]["report"]["kept"]) == (40, 21)


def is_one_clear_error(first, reason):
    """It ended by itself, and its message names the folder and the reason."""
    assert first["status"] == 1, first
    assert first["seconds"] < 30
    assert "disk" in first["report"]["message"]
    assert reason in first["report"]["message"], first["report"]
    assert {"OSError", "ValueError"} & set(first["report"]["kind"]), first["report"]


@pytest.mark.parametrize("case", CASES[1:])
def test_a_full_disk_is_one_clear_error(case, outcomes):
    is_one_clear_error(outcomes[str(case)]["first"], "No space left on device")


@pytest.mark.parametrize("which", ["read-only", "new, read-only"])
def test_a_disk_that_cannot_be_written_to_is_one_clear_error(which, outcomes):
    is_one_clear_error(outcomes["enough"][which], "Read-only file system")


@pytest.mark.parametrize("case", CASES)
def test_what_was_saved_before_loads(case, outcomes):
    newest = outcomes[str(case)]["newest"]
    assert newest["status"] == 0, newest["stderr"]
    kept = newest["report"]["kept"]
    saved = {"enough": 40, "full": 0, "filled": 10}.get(case, 2 * kept)
    assert (newest["report"]["steps"] or 0) == saved
    if isinstance(case, int):
        assert case // 310 - 1 <= kept <= case // 290  # as many as there was room for


def test_a_checkpoint_on_a_disk_that_cannot_be_written_to_is_restored(outcomes):
    restored = outcomes["enough"]["restore"]
    assert restored["status"] == 0, restored["stderr"]
    assert restored["report"]["steps"] == 40


@pytest.mark.parametrize("case", CASES)
def test_with_room_it_resumes_to_the_same_end(case, outcomes):
    here, enough = outcomes[str(case)], outcomes["enough"]
    second = here["second"]
    assert second["status"] == 0, second["stderr"]
    assert second["report"]["steps"] == 40
    assert second["report"]["history"] == enough["first"]["report"]["history"]
    assert here["weights"] == enough["weights"]
    assert here["points"]["report"] == enough["points"]["report"]


@pytest.mark.parametrize("case", CASES)
def test_nothing_unfinished_is_left_in_the_end(case, outcomes):
    assert outcomes[str(case)]["left"] == []
