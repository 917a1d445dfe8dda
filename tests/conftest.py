import os
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


@pytest.fixture(autouse=True)
def _seeded():
    """Each test starts from the same seeds and layer names, whichever ran before it."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def data_dir():
    """The folder of the real mnist.npz."""
    folder = Path(os.environ.get("LOOPLAB_DATA_DIR", ROOT / ".data"))
    if not (folder / "mnist.npz").is_file():
        pytest.skip(f"needs mnist.npz in {folder}, or in $LOOPLAB_DATA_DIR")
    return folder


@pytest.fixture
def line():
    """100 points of a noisy plane: x of shape (100, 4) and y of shape (100, 1)."""
    random = np.random.default_rng(0)
    x = random.normal(size=(100, 4)).astype("float32")
    return x, (x @ np.array([[1], [-2], [3], [0.5]]) + 0.1 * random.normal(size=(100, 1))).astype("float32")
