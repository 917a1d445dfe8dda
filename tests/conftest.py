import contextlib
import gc
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf

# Two devices to distribute over; what is not distributed uses the first.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

ROOT = Path(__file__).parent.parent


def pytest_collection_finish():
    gc.freeze()  # what is imported by now stays: without this, the garbage collector looks through it again and again


@pytest.fixture(autouse=True)
def _seeded():
    """Each test starts from the same seeds and layer names, whichever ran before it."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def tensorboard():
    """A real server: `with tensorboard(logs) as ask`, and `ask(path, body, ready, **query)` is an answer over HTTP."""

    @contextlib.contextmanager
    def serve(logs, *flags):
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port", "0"]
        told = logs.with_suffix(".txt")  # a pipe that nobody empties would stop it at some time
        with told.open("w") as stderr:
            process = subprocess.Popen([*command, "--load_fast", "false", *flags], stderr=stderr)
        with process:
            try:
                while not (root := re.search(r"http://\S+", told.read_text())):
                    assert process.poll() is None, told.read_text()
                    time.sleep(0.1)

                def ask(path, body=None, ready=lambda answer: True, **query):
                    address = f"{root[0]}data/plugin/{path}?{urllib.parse.urlencode(query)}"
                    as_json = {"Content-Type": "application/json"}
                    request = urllib.request.Request(address, body and json.dumps(body).encode(), as_json)
                    deadline = time.monotonic() + 60
                    while True:  # it loads in the background
                        try:
                            with urllib.request.urlopen(request, timeout=20) as answer:
                                content = answer.read()
                            if ready(content):
                                return content
                        except urllib.error.HTTPError as error:
                            content = error.read()
                        assert time.monotonic() < deadline, content
                        time.sleep(0.2)

                yield ask
            finally:
                process.kill()

    return serve


@pytest.fixture(scope="session")
def data_dir():
    """The folder of the real mnist.npz."""
    folder = Path(os.environ.get("LOOPLAB_DATA_DIR", ROOT / ".data"))
    if not (folder / "mnist.npz").is_file():
        pytest.skip(f"needs mnist.npz in {folder}, or in $LOOPLAB_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def cifar10_dir():
    """The folder of the real cifar10.npz."""
    folder = Path(os.environ.get("LOOPLAB_DATA_DIR", ROOT / ".data"))
    if not (folder / "cifar10.npz").is_file():
        pytest.skip(f"needs cifar10.npz in {folder}, or in $LOOPLAB_DATA_DIR")
    return folder


@pytest.fixture(scope="module")
def no_graph_rewrites():
    """Turns Grappler off, which rearranges the operations of Keras's graph and of looplab's differently."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})


@pytest.fixture(scope="session")
def two_devices():
    """One for all tests: TensorFlow mixes up what several strategies of one process reduce."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture
def line():
    """100 points of a noisy plane: x of shape (100, 4) and y of shape (100, 1)."""
    random = np.random.default_rng(0)
    x = random.normal(size=(100, 4)).astype("float32")
    return x, (x @ np.array([[1], [-2], [3], [0.5]]) + 0.1 * random.normal(size=(100, 1))).astype("float32")
