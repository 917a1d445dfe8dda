"""Log folders: their paths, who else may use them, and what becomes of a run whose folder or reader disappears."""

import contextlib
import errno
import fcntl
import gc
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import looplab
from looplab.testing import read_scalars

ROOT = Path(__file__).parent.parent
X = np.arange(32, dtype="float32").reshape(8, 4) / 32
Y = X.sum(1, keepdims=True)


def trainer(log_dir, **options):
    model = keras.Sequential([keras.layers.Dense(1, name="out")])
    return looplab.Trainer(model, optimizer="sgd", loss="mse", seed=1, log_dir=log_dir, **options)


def fit(tested, epochs=1, batch_size=4, **options):
    return tested.fit(X, Y, epochs=epochs, batch_size=batch_size, verbose=0, **options).history


def small(seed=0, data=looplab.Data(), **options) -> looplab.Recipe:
    """A recipe."""
    return looplab.Recipe(trainer(**options), (X, Y), epochs=2, batch_size=4)


def files(log_dir, folder="train"):
    return list((log_dir / folder).glob("events.out.tfevents.*"))


def steps(log_dir, tag="batch_loss", folder="train"):
    return read_scalars(log_dir / folder)[tag][0].tolist()


# Paths.


@pytest.mark.parametrize("kind", [str, Path])
def test_the_home_folder_is_expanded_wherever_a_path_is_taken(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tested = trainer(kind("~/mine"))
    assert tested.log_dir == tmp_path / "mine"
    fit(tested)
    assert steps(tmp_path / "mine") == [1, 2]
    assert read_scalars(kind("~/mine/train"))["epoch_loss"][0].tolist() == [1]

    looplab.run(small, log_dir=kind("~/run"), plot=kind("~/curves.png"), verbose=0)
    assert (tmp_path / "run" / "model.weights.h5").exists()
    assert (tmp_path / "curves.png").exists()
    again = looplab.run(small, resume=kind("~/run"), log_dir=tmp_path / "run", verbose=0)
    assert again.trainer.log_dir == tmp_path / "run"
    looplab.run(small, log_dir="other", weights=kind("~/run/model.weights.h5"), verbose=0)
    assert [path.name for path in Path().iterdir()] == ["other"]

    shutil.copy(ROOT / "looplab" / "data" / "digits.npz", tmp_path / "mnist.npz")
    with pytest.raises(ValueError, match=f"`data_dir`: {re.escape(str(tmp_path))}/mnist.npz "):
        looplab.Data("mnist", data_dir=kind("~")).load()


@pytest.mark.parametrize(
    "url",
    [
        "gs://bucket/run",
        "s3://bucket",
        "hdfs://host:9000/run",
        "file:///tmp/run",
        "dbfs:/mnt/run",
        Path("gs://bucket/run"),
    ],
    ids=str,
)
def test_urls_are_refused_by_name(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refuses(argument, call):
        with pytest.raises(ValueError, match=f"`{argument}`.*{re.escape(str(url))}.*copy the files.*mount"):
            call()

    refuses("log_dir", lambda: trainer(url))
    refuses("data_dir", lambda: looplab.Data("mnist", data_dir=url).load())
    for argument in ("log_dir", "resume", "weights", "plot"):
        refuses(argument, lambda argument=argument: looplab.run(small, **{argument: url}))
    assert not list(tmp_path.iterdir())


def test_an_unknown_home_folder_and_what_is_no_path_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`log_dir`: the home folder in ~nobody-here/run is unknown"):
        trainer("~nobody-here/run")
    with pytest.raises(TypeError, match="`log_dir` must be a path; got 3"):
        trainer(3)
    assert trainer("./~x").log_dir == tmp_path / "~x"
    assert not list(tmp_path.iterdir())


RECIPE = """
import keras, numpy as np, looplab

def build(seed=0, epochs=1, **options) -> looplab.Recipe:
    '''A recipe of größte layers.'''
    def größe(y, y_pred):
        return keras.ops.abs(y_pred)
    model = keras.Sequential([keras.layers.Dense(1)])
    trainer = looplab.Trainer(model, optimizer="sgd", loss="mse", metrics=[größe], **options)
    return looplab.Recipe(trainer, (np.ones((4, 2)), np.ones((4, 1))), epochs=epochs)
"""


def test_printed_commands_can_be_copied_and_an_ascii_terminal_ends_nothing(tmp_path, monkeypatch):
    (tmp_path / "recipe.py").write_text(RECIPE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import recipe

    def run(encoding, *flags):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding)
        with monkeypatch.context() as patch, contextlib.suppress(SystemExit):  # of the help
            patch.setattr(sys, "stdout", stdout)
            looplab.main(recipe.build, ["--verbose", "2", *map(str, flags)])
        stdout.flush()
        return stdout.buffer.getvalue().decode(encoding)

    logs = tmp_path / "Läufe von 'heute' (1)"
    line = next(line for line in run("utf-8", "--log-dir", logs / "1").splitlines() if "tensorboard" in line)
    assert shlex.split(line.removeprefix("To watch it: ")) == [
        "tensorboard",
        "--logdir",
        str(logs),
        "--samples_per_plugin",
        "scalars=999999999",
    ]
    logs = tmp_path / os.fsdecode(b"L\xe4ufe")  # a name in Latin-1
    assert "gr\\xf6\\xdfe: " in run("ascii", "--log-dir", logs / "1")
    assert "epoch 2/2" in run("ascii", "--resume", logs / "1", "--epochs", "2")
    assert "A recipe of gr\\xf6\\xdfte layers." in run("ascii", "--help")
    assert steps(logs / "1") == [1, 2]
    del sys.modules["recipe"]


# Other processes, and other event files.


def test_the_users_own_event_files_are_no_other_run(tmp_path):
    for folder in ("", "mine", "eval/deep"):
        with tf.summary.create_file_writer(str(tmp_path / folder)).as_default():
            tf.summary.text("note", "hello", 0)
    (tmp_path / "events.out.tfevents.1.host.profile-empty").touch()  # as the profiler leaves it
    tested = trainer(tmp_path)
    tested.log("early", 1.0)
    fit(tested)
    with pytest.raises(ValueError, match="holds the run of another trainer"):
        fit(trainer(tmp_path))


def test_hyperparameters_alone_are_a_run(tmp_path):
    trainer(tmp_path).log_hparams({"units": 3})
    with pytest.raises(ValueError, match="holds the run of another trainer"):
        fit(trainer(tmp_path))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks_is_warned_of_once(code, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    tested = trainer(tmp_path)
    with pytest.warns(UserWarning, match=re.escape(f"`log_dir` {tmp_path} cannot be locked")) as warned:
        fit(tested)
    tested.log("later", 1.0)  # warnings are errors in these tests
    fit(tested)
    assert [warning.filename for warning in warned] == [__file__]
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_on_windows_the_import_says_what_looplab_needs():
    program = "import sys; sys.modules['fcntl'] = None; import looplab"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1].startswith("ImportError: looplab needs Linux or macOS: ")


def test_other_errors_of_locks_stay_errors(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match=r"locked by its file \.lock: Input/output error"):
        fit(trainer(tmp_path))


def test_a_forked_child_does_not_keep_the_folder(tmp_path):
    children = []

    def fork(epoch, logs=None):
        start, started = os.pipe()
        children.append(os.fork())
        if not children[0]:
            os.write(started, b"!")
            time.sleep(60)
            os._exit(0)
        os.read(start, 1)
        with (tmp_path / ".lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    try:
        fit(trainer(tmp_path), callbacks=[keras.callbacks.LambdaCallback(on_epoch_begin=fork)])
        assert len(fit(trainer(tmp_path), epochs=2, resume=True)["loss"]) == 2
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


FORKS_IN_C = """
import ctypes, os, signal, sys, time
import keras, numpy as np, looplab

def fork(epoch, logs=None):
    if ctypes.PyDLL(None).fork():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    os._exit(0)

forks = keras.callbacks.LambdaCallback(on_epoch_begin=fork)
trainer = looplab.Trainer(keras.Sequential([keras.layers.Dense(1)]), optimizer="sgd", loss="mse", log_dir=sys.argv[1])
trainer.fit(np.ones((4, 4)), np.ones((4, 1)), verbose=0, callbacks=[forks])
"""


def test_a_lock_that_outlives_its_process_names_it_and_its_children(tmp_path):
    log_dir = tmp_path / "a run"
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", FORKS_IN_C, log_dir], cwd=ROOT, **nowhere, process_group=0) as process:
        holder = rf"is in use by process {process.pid} on .* If it has ended, a child .* `lsof '{log_dir}/.lock'`"
        try:
            assert process.wait() == -signal.SIGKILL
            with pytest.raises(ValueError, match=holder):
                fit(trainer(log_dir), resume=True)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


# One event file for each process and folder.


def test_many_fits_of_a_trainer_write_one_file_for_each_folder(tmp_path):
    tested = trainer(tmp_path)
    for _ in range(5):
        fit(tested, validation_data=(X, Y))
        tested.log("between", 1.0)
    assert [len(files(tmp_path, folder)) for folder in ("train", "validation")] == [1, 1]
    assert steps(tmp_path) == list(range(1, 11))
    assert steps(tmp_path, folder="validation") == list(range(1, 11))
    assert steps(tmp_path, "between") == [1, 2, 3, 4, 5]


def test_event_files_are_closed_with_their_trainer(tmp_path):
    def open_files():
        gc.collect()
        paths = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return [path.readlink() for path in paths if path.is_symlink() and str(tmp_path) in str(path.readlink())]

    for number in range(3):
        tested = trainer(tmp_path / str(number))
        fit(tested, validation_data=(X, Y))
    assert len(open_files()) == 3
    del tested
    keras.utils.clear_session()
    assert not open_files()


def test_a_resume_shortens_a_file_that_another_trainer_has_open(tmp_path):
    first = trainer(tmp_path)
    fit(first, epochs=2)
    shutil.rmtree(tmp_path / "checkpoints" / "step-4-epoch-2")
    (file,) = files(tmp_path)
    longer = file.stat().st_size
    second = trainer(tmp_path)
    fit(second, epochs=3, resume=True)
    assert file.stat().st_size < longer
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    fit(first)  # it is at step 4, and nobody knows of what it did
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 5, 6]
    fit(second)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]


# A folder that is deleted while a run uses it.


class Between(keras.callbacks.Callback):
    """Calls a function after this training step."""

    def __init__(self, step, act):
        super().__init__()
        self._step = step
        self._act = act

    def on_train_batch_end(self, batch, logs=None):
        if self.model.steps == self._step:
            self._act()


def test_a_deleted_folder_is_warned_of_once_and_the_run_continues(tmp_path):
    tested = trainer(tmp_path / "run", checkpoint=looplab.Checkpoint(every="9 epochs"))
    with pytest.warns(UserWarning, match="deleted or moved .*checkpoints") as warned:
        fit(tested, epochs=3, callbacks=[Between(3, lambda: shutil.rmtree(tmp_path / "run"))])
    assert [warning.filename for warning in warned] == [__file__]
    assert steps(tmp_path / "run") == [4, 5, 6]
    assert len(files(tmp_path / "run")) == 1
    assert any(event.graph_def for event in events(tmp_path / "run" / "train"))
    history = fit(trainer(tmp_path / "run"), epochs=4, resume=True)
    assert len(history["loss"]) == 4
    assert steps(tmp_path / "run") == [4, 5, 6, 7, 8]


def events(folder):
    (file,) = folder.glob("events.out.*")
    return [tf.compat.v1.Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(file))]


def test_points_that_are_deleted_after_the_last_one_was_written_are_warned_of(tmp_path):
    tested = trainer(tmp_path / "run", checkpoint=None)
    delete = keras.callbacks.LambdaCallback(on_train_end=lambda logs: shutil.rmtree(tmp_path / "run"))
    with pytest.warns(UserWarning, match="deleted or moved"):
        fit(tested, callbacks=[delete])
    fit(tested)
    assert steps(tmp_path / "run") == [3, 4]
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match="deleted or moved"):
        tested.log("later", 1.0)
    assert steps(tmp_path / "run", "later") == [2]


def test_a_folder_that_is_deleted_before_its_first_point_is_warned_of(tmp_path):
    tested = trainer(tmp_path / "run")
    tested.log_hparams({"units": 3})
    delete = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: shutil.rmtree(tmp_path / "run"))
    with pytest.warns(UserWarning, match="was deleted or moved"):
        fit(tested, callbacks=[delete])
    with pytest.raises(ValueError, match="holds the run"):
        fit(trainer(tmp_path / "run"))


def test_a_deleted_folder_that_another_process_has_taken_since_is_not_written_to(tmp_path):
    """Another open file stands for another process: locks do not know the difference."""
    log_dir, others = tmp_path / "run", []

    def take():
        shutil.rmtree(log_dir)
        log_dir.mkdir()
        others.append((log_dir / ".lock").open("w"))
        fcntl.flock(others[0], fcntl.LOCK_EX)

    try:
        with (
            pytest.warns(UserWarning, match="deleted"),
            pytest.raises(ValueError, match="is in use by another process"),
        ):
            fit(trainer(log_dir, checkpoint=None), epochs=3, callbacks=[Between(3, take)])
        assert not files(log_dir)
    finally:
        others[0].close()
