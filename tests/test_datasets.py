import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import looplab
from looplab.data.named import DataError, read_picture

KEYS = ("x_train", "y_train", "x_test", "y_test")


def small_set():
    random = np.random.default_rng(0)
    sizes = {"x_train": (6, 3, 3), "y_train": (6,), "x_test": (4, 3, 3), "y_test": (4,)}
    return {key: random.integers(0, 256, size).astype("uint8") for key, size in sizes.items()}


def write(folder, save=np.savez, **changed):
    """mnist.npz of a few small images; a key that is changed to None is left out."""
    path = folder / "mnist.npz"
    save(path, **{key: array for key, array in (small_set() | changed).items() if array is not None})
    return path


def load(folder, **options):
    return looplab.Data("mnist", data_dir=str(folder), **options).load((3, 3))


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# Files.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_file_is_read(tmp_path, save):
    path = write(tmp_path, save)
    arrays = load(tmp_path)
    for key, expected in small_set().items():
        assert np.array_equal(getattr(arrays, key), expected)
        assert getattr(arrays, key).dtype == "uint8"
    assert (arrays.name, arrays.source, arrays.fallback) == ("mnist", str(path), None)
    assert arrays.sha256 == hashlib.sha256(b"".join(small_set()[key].tobytes() for key in KEYS)).hexdigest()


def test_folder_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPLAB_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=re.escape(f"{tmp_path} has no file mnist.npz")):
        looplab.Data().load()
    path = write(tmp_path)
    assert looplab.Data().load().source == str(path)


def test_argument_comes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPLAB_DATA_DIR", str(tmp_path / "elsewhere"))
    path = write(tmp_path)
    assert load(tmp_path).source == str(path)


@pytest.mark.parametrize("limit", [1, 5, 100])
def test_limit_takes_the_first_examples_of_both_parts(tmp_path, limit):
    write(tmp_path)
    whole, limited = load(tmp_path), load(tmp_path, limit=limit)
    for key in KEYS:
        assert np.array_equal(getattr(limited, key), getattr(whole, key)[:limit])
    assert limited.sha256 == whole.sha256  # of the dataset, whatever part of it is used


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=re.escape(f"`data_dir`: {tmp_path} has no file mnist.npz.") + ".*--data-dir"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["file", "missing folder"])
def test_data_dir_that_is_no_folder(tmp_path, kind):
    folder = tmp_path / "folder"
    if kind == "file":
        folder.write_text("")
    with pytest.raises(DataError, match=re.escape(f"{folder} has no file mnist.npz")):
        load(folder)


def test_unknown_name_is_no_reason_to_learn_from_digits(tmp_path, monkeypatch):
    monkeypatch.delenv("LOOPLAB_DATA_DIR", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "mnsit.npz").touch()  # as if it were fetched: the network is not asked
    with pytest.raises(ValueError, match="mnsit"):
        looplab.Data("mnsit").load()


# Damaged files, and files of something else.


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        np.random.default_rng(0).bytes(1000),
        b"<html><body>404 Not Found</body></html>",
        np.lib.format.magic(1, 0)
        + b"v\0{'descr': '|u1', 'fortran_order': False, 'shape': (2,), }".ljust(120)
        + b"\n12",
    ],
    ids=["empty", "zip header", "random", "html", "npy"],
)
def test_content_that_is_no_npz_is_named(tmp_path, content):
    (tmp_path / "mnist.npz").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"`data_dir`: {tmp_path / 'mnist.npz'} is damaged")):
        load(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_file_is_named(tmp_path, save):
    path = write(tmp_path, save)
    content = path.read_bytes()
    for length in range(1, len(content), 13):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=re.escape(str(path))):
            load(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_damaged_byte_goes_unseen(tmp_path, save):
    path = write(tmp_path, save)
    content = path.read_bytes()
    expected = small_set()
    others = {}
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            arrays = load(tmp_path)
        except DataError:
            pass
        except Exception as error:
            others.setdefault(f"{type(error).__name__}: {error}", position)
        else:  # a date, say
            assert all(np.array_equal(getattr(arrays, key), expected[key]) for key in KEYS)
    assert others == {}


@pytest.mark.parametrize("key", KEYS)
def test_missing_array_is_named(tmp_path, key):
    write(tmp_path, **{key: None})
    with pytest.raises(DataError, match=rf"mnist\.npz is damaged, or lacks some of .*'{key} is not"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"x_train": np.zeros((6, 3, 3), "float32")}, "float32"),
        ({"x_test": np.zeros((4, 3, 3), "int64")}, "int64"),
        ({"x_train": np.zeros((6, 9), "uint8")}, "(6, 9)"),
        ({"x_test": np.zeros((4, 5, 5), "uint8")}, "(4, 5, 5)"),
        ({"y_train": np.zeros(5, "uint8")}, "(5,)"),
        ({"y_test": np.uint8(1)}, "()"),
        ({"x_train": np.zeros((0, 3, 3), "uint8"), "y_train": np.zeros(0, "uint8")}, "(0, 3, 3)"),
        ({"y_train": np.zeros((6, 10), "float32")}, "(6, 10)"),
        ({"y_train": np.array(list("abcdef"))}, "<U1"),
    ],
    ids=["float x", "int64 x", "flat x", "other size", "short y", "one y", "empty", "one-hot y", "string y"],
)
def test_arrays_of_something_else_are_an_error(tmp_path, changed, found):
    write(tmp_path, **changed)
    with pytest.raises(DataError, match=r"mnist\.npz must hold uint8 images") as caught:
        load(tmp_path)
    assert found in str(caught.value)


@pytest.mark.parametrize("whole", [True, False], ids=["pickle file", "object array"])
def test_nothing_is_unpickled(tmp_path, whole):
    made = tmp_path / "made"
    path = tmp_path / "mnist.npz"
    if whole:
        path.write_bytes(pickle.dumps(Trap(made)))
    else:
        write(tmp_path, x_train=np.array([Trap(made)], dtype=object))
    with pytest.raises(DataError, match=re.escape(str(path))):
        load(tmp_path)
    assert not made.exists()
    loaded = np.load(path, allow_pickle=True)
    if not whole:
        loaded["x_train"]
    assert made.exists()  # the trap works


# Shapes, and what is held out.


@pytest.mark.parametrize("shape", [(3, 3), (3, 3, 1), (3, 3, 3), (6, 6), (2, 5, 3)])
def test_images_have_the_requested_shape(tmp_path, shape):
    write(tmp_path)
    arrays = looplab.Data("mnist", str(tmp_path)).load(shape)
    original = small_set()["x_train"]
    assert arrays.x_train.shape == (6, *shape)
    assert arrays.x_train.dtype == "uint8"
    if shape[:2] == (3, 3):  # only repeated over the channels
        assert np.array_equal(
            arrays.x_train,
            np.broadcast_to(original.reshape(6, 3, 3, 1), (6, 3, 3, (*shape, 1)[2])).reshape(arrays.x_train.shape),
        )
    else:
        assert abs(arrays.x_train.mean() - original.mean()) < 20


def test_coloured_images_become_grey_by_their_brightness(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], "uint8")
    images = np.broadcast_to(colours[:, None, None], (4, 3, 3, 3))
    write(tmp_path, x_train=images, y_train=np.zeros(4, "uint8"), x_test=images, y_test=np.zeros(4, "uint8"))
    grey = load(tmp_path).x_train
    assert grey[:, 0, 0].tolist() == [76, 150, 29, 255]  # of ITU-R BT.601
    assert np.ptp(grey, axis=(1, 2)).max() == 0


def test_cifar10_has_its_classes_and_labels_in_one_dimension(tmp_path):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (5, 32, 32, 3), "uint8"), np.arange(5).reshape(5, 1)
    np.savez(tmp_path / "cifar10.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    arrays = looplab.Data("cifar10", str(tmp_path)).load((32, 32, 3))
    assert np.array_equal(arrays.x_train, images)
    assert arrays.y_train.shape == (5,)
    assert [arrays.classes[label] for label in arrays.y_test] == ["airplane", "automobile", "bird", "cat", "deer"]


def test_real_cifar10_has_as_many_images_of_each_class(cifar10_dir):
    arrays = looplab.Data("cifar10", str(cifar10_dir)).load((32, 32, 3))
    assert arrays.x_train.shape == (50000, 32, 32, 3)
    assert np.bincount(arrays.y_train).tolist() == [5000] * 10
    assert np.bincount(arrays.y_test).tolist() == [1000] * 10


def test_the_last_part_of_the_training_images_is_held_out(tmp_path):
    write(tmp_path)
    whole, parted = load(tmp_path), load(tmp_path, validation_split=0.4)
    assert np.array_equal(parted.x_train, whole.x_train[:3])
    assert np.array_equal(parted.x_validation, whole.x_train[3:])
    assert np.array_equal(parted.y_validation, whole.y_train[3:])
    assert np.array_equal(parted.x_test, whole.x_test)
    assert whole.x_validation is whole.x_test


@pytest.mark.parametrize("fraction", [1.0, -0.1, 1.5])
def test_a_split_must_be_a_fraction(fraction):
    with pytest.raises(DataError, match="`validation_split` must be from 0 to below 1"):
        looplab.Data(validation_split=fraction)


def test_a_split_must_leave_something(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match="leaves 0 to train on and 1 to validate on"):
        load(tmp_path, limit=1, validation_split=0.5)


def test_pictures_become_images_of_the_dataset(tmp_path):
    picture = np.zeros((60, 40, 3), "uint8")
    picture[:30] = [255, 0, 0]
    (tmp_path / "a.png").write_bytes(tf.io.encode_png(picture).numpy())
    image = read_picture(tmp_path / "a.png", (28, 28, 3))
    assert image.shape == (28, 28, 3)
    assert image[0, 0].tolist() == [255, 0, 0]
    assert image[-1, 0].tolist() == [0, 0, 0]
    assert read_picture(tmp_path / "a.png", (28, 28))[0, 0] == 76


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(DataError, match=r"a\.png is not a picture that can be read: it must be a PNG or JPEG file"):
        read_picture(tmp_path / "a.png", (28, 28))
    with pytest.raises(DataError, match=r"b\.png cannot be read: No such file"):
        read_picture(tmp_path / "b.png", (28, 28))


# Digits.


@pytest.mark.parametrize("size", [8, 28])
def test_digits(size):
    arrays = looplab.Data("digits").load((size, size))
    assert arrays.x_train.shape == (1500, size, size)
    assert arrays.x_test.shape == (297, size, size)
    assert (arrays.y_train.shape, arrays.y_test.shape) == ((1500,), (297,))
    assert {getattr(arrays, key).dtype for key in KEYS} == {np.dtype("uint8")}
    for x in (arrays.x_train, arrays.x_test):
        assert (x.min(), x.max()) == (0, 255)
    assert set(arrays.y_train) == set(arrays.y_test) == set(range(10))
    assert (arrays.name, arrays.source, arrays.fallback) == ("digits", "embedded", None)


def test_digits_are_the_same_each_time():
    assert looplab.Data("digits").load().sha256 == looplab.Data("digits", limit=3).load().sha256
    # Not scaled, the values rest on no resampling: the same on each machine.
    expected = "4794179a7c207c1ed723b650ecb231bb75c230669ba7db661dbaaff445bfc1ff"
    assert looplab.Data("digits").load((8, 8)).sha256 == expected


def test_scaled_digits_show_what_the_small_ones_show():
    small, large = looplab.Data("digits").load((8, 8)).x_test, looplab.Data("digits").load((32, 32)).x_test
    means = large.reshape(297, 8, 4, 8, 4).mean((2, 4))
    assert np.corrcoef(means.ravel(), small.ravel())[0, 1] > 0.95


def test_limit_of_digits():
    arrays = looplab.Data("digits", limit=300).load()
    assert [len(getattr(arrays, key)) for key in KEYS] == [300, 300, 297, 297]


def test_without_a_network_mnist_becomes_digits_and_says_so(tmp_path):
    alone = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs `unshare` with user namespaces, to run a process without a network")
    script = """if True:
        import pathlib, sys, looplab
        print(*looplab.Data().load()[7:], sep="|")
        cache = pathlib.Path(sys.argv[1])
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_bytes(b"damaged")
        print(*looplab.Data(limit=3).load()[7:], sep="|")
    """
    environment = {name: value for name, value in os.environ.items() if name != "LOOPLAB_DATA_DIR"}
    environment |= {"HOME": str(tmp_path), "KERAS_HOME": str(tmp_path / "keras")}
    command = [*alone, sys.executable, "-c", script, str(tmp_path / "keras" / "datasets" / "mnist.npz")]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    reason = "mnist cannot be downloaded (URL fetch failure on https://storage.googleapis.com/"
    assert lines.pop(0).startswith("Downloading data from https://storage.googleapis.com/")  # by Keras
    match = re.fullmatch(r"looplab: (.+)\. To use a file: --data-dir FOLDER_OF_MNIST_NPZ", lines[0])
    assert match
    fallback = match[1]
    assert fallback.startswith(reason)
    assert fallback.endswith("learning from 1,797 embedded digits instead")
    digits = looplab.Data("digits").load()
    assert lines[1] == f"digits|embedded|{digits.sha256}|{fallback}"
    # A damaged file in Keras's cache is no better than none.
    [line] = [line for line in lines[2:] if line.startswith("looplab: ")]
    assert re.fullmatch(
        r"looplab: mnist cannot be downloaded \(.+\): learning from .* --data-dir FOLDER_OF_MNIST_NPZ", line
    )
    assert lines[-1].startswith(f"digits|embedded|{digits.sha256}|mnist cannot be downloaded (")
