"""The files of a checkpoint: what they hold exactly, and what they refuse."""

import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file

from looplab.checkpoint.files import ARRAYS, monitored_in, read, write
from looplab.checkpoint.tree import flatten, is_plain, same

DTYPES = ["bool", "int8", "int64", "uint16", "uint64", "float16", "float32", "float64", "complex64"]
DTYPES += ["bfloat16", "float8_e4m3fn", "float8_e5m2"]


def restored(state, folder):
    write(folder, *flatten(state), monitored=None)
    return read(folder)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_each_dtype_and_layout_keep_their_bits(dtype, tmp_path):
    dtype = tf.as_dtype(dtype).as_numpy_dtype
    values = np.arange(6).astype(dtype).reshape(2, 3)
    state = {
        **{"matrix": values, "transposed": values.T, "strided": values[:, ::2], "empty": values[:0]},
        **{"0-dimensional": np.array(1, dtype), "scalar": dtype(1)},
    }
    found = restored(state, tmp_path)
    assert same(found, state)
    assert [type(value) for value in found.values()] == [type(value) for value in state.values()]
    assert all(value.dtype == dtype for value in found.values())


def test_nan_keeps_its_bits_and_big_endian_arrays_their_numbers(tmp_path):
    nans = np.array([0x7FC00001, 0xFFC00000], np.uint32).view(np.float32)
    found = restored({"nans": nans, "big": np.array([1, 2], ">f4")}, tmp_path)
    np.testing.assert_array_equal(found["nans"].view(np.uint32), nans.view(np.uint32))
    np.testing.assert_array_equal(found["big"], [1, 2])


def test_what_numpy_or_safetensors_cannot_restore_is_not_plain():
    assert not any(map(is_plain, [np.array("text"), np.array([object()]), np.zeros(1, "complex128"), {1.5: 1}, {1, 2}]))


def test_others_read_the_arrays(tmp_path):
    restored({"weights": np.ones((2, 3), tf.bfloat16.as_numpy_dtype)}, tmp_path)
    assert load_file(tmp_path / ARRAYS)["/weights"].tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("value", [None, 0.1, 1e-300, float("inf")])
def test_the_monitored_value_is_read_alone(value, tmp_path):
    write(tmp_path, {}, {}, value)
    (tmp_path / ARRAYS).unlink()
    assert monitored_in(tmp_path) == value


def test_more_arrays_than_can_be_read_again_are_not_written(tmp_path):
    arrays = {f"{number}{'a' * 2**20}": np.zeros(0) for number in range(33)}
    with pytest.raises(ValueError, match=r"the header of arrays\.safetensors would have 34\d+ bytes"):
        write(tmp_path, {}, arrays, None)
