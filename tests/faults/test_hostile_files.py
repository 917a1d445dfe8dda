"""Files made to harm whoever opens them: none runs code, writes elsewhere, fills the memory or takes long.

Each row of `HOSTILE` spoils the newest checkpoint of a run which has an older good one, with checksums that fit where
the harm lies deeper. `fit(resume=True)` must then end in one clear `ValueError` with nothing changed, or resume from
the older one with a warning, to the weights of an undisturbed run.
"""

import contextlib
import functools
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import stat
import struct
import warnings
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import looplab
from looplab.checkpoint.store import Store

ARRAYS, STATE, MANIFEST = FILES = ("arrays.safetensors", "state.json", "manifest.json")
OLDER, NEWEST = "step-4-epoch-1", "step-6-epoch-2"
SECONDS = 8
MOST_MEMORY = 2**30
X = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
LABELS = np.arange(12) % 3


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TooLongError(BaseException):
    """Nothing catches it by mistake."""


@contextlib.contextmanager
def bounded(folder=None):
    """Within it, what waits or computes too long is interrupted, and what fills the memory fails.

    Args:
        folder: Threads that wait for a writer of a FIFO in it are let go then.
    """

    def too_long(*_):
        for path in folder.rglob("*") if folder is not None else ():
            if path.is_fifo():
                os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        raise TooLongError

    def memory(what):
        return int(Path("/proc/self/status").read_text().partition(f"{what}:")[2].split()[0]) * 1024

    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 6 * 2**30, limits[1]))
    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    resident = memory("VmHWM")
    try:
        yield
    except TooLongError:
        pytest.fail(f"It took more than {SECONDS} s.")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    grown = memory("VmHWM") - resident
    assert grown < MOST_MEMORY, f"The memory grew by {grown / 2**20:.0f} MiB."


def make_trainer(run):
    inputs = layers.Input((4,))
    model = keras.Model(inputs, layers.Dense(3)(inputs))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return looplab.Trainer(
        model,
        optimizer=keras.optimizers.SGD(0.1),
        loss=loss,
        log_dir=run,
        checkpoint=looplab.Checkpoint(every=4, keep=3) if run else None,
    )


def fit_again(trainer, callbacks=(), epochs=2):
    trainer.fit(X, LABELS, batch_size=4, epochs=epochs, callbacks=list(callbacks), resume=True, verbose=0)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A run, and its weights in the end."""
    keras.utils.set_random_seed(0)
    run = tmp_path_factory.mktemp("saved") / "run"
    trainer = make_trainer(run)
    fit_again(trainer)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [OLDER, NEWEST]
    return run, trainer.get_weights()


class Place:
    """A copy of the run, and beside it what must stay as it is; `marker` is what hostile code would make."""

    def __init__(self, folder, run):
        self._original, self.run = run, folder / "parent" / "run"
        self.reset()
        self.newest = self.run / "checkpoints" / NEWEST
        self.outside = folder / "outside"
        self.marker = self.outside / "marker"
        self.outside.mkdir()
        self.victim = self.outside / "victim"
        self.victim.write_bytes(b"precious")
        self.fifo = folder / "fifo"
        os.mkfifo(self.fifo)
        self.writer: int | None = None
        self._folder = folder
        self._etc = Path("/etc/passwd").read_bytes()

    def reset(self):
        """The run as it was."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self._original, self.run)

    def elsewhere(self):
        """All files beside the run, with what they hold."""
        return {
            path: path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else oct(path.lstat().st_mode)
            for path in sorted(self._folder.rglob("*"))
            if self.run not in (path, *path.parents)
        }

    def state(self):
        return json.loads((self.newest / STATE).read_text())

    def write(self, name, content):
        """Writes a file of the newest checkpoint, and a manifest that fits."""
        (self.newest / name).write_bytes(content)
        manifest = json.loads((self.newest / MANIFEST).read_text())
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (self.newest / MANIFEST).write_text(json.dumps(manifest))

    def write_state(self, **values):
        self.write(STATE, json.dumps(self.state() | values).encode())

    def header(self):
        content = (self.newest / ARRAYS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        return json.loads(content[8 : 8 + length]), content[8 + length :]

    def write_header(self, header, data=b""):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        self.write(ARRAYS, struct.pack("<Q", len(text)) + text + data)

    def write_first_entry(self, **values):
        """Changes the header's entry of the first array."""
        header, data = self.header()
        header[next(iter(header))] |= values
        self.write_header(header, data)

    def replace(self, name, make):
        """Makes something else in place of a file."""
        (self.newest / name).unlink()
        make(self.newest / name)

    def checks_out(self):
        if self.writer is not None:
            os.close(self.writer)
            self.writer = None
        assert not self.marker.exists()
        assert Path("/etc/passwd").read_bytes() == self._etc


# Each spoils the newest checkpoint.


def pickled(place, name):
    content = pickle.dumps(Trap(place.marker))
    if name == MANIFEST:
        (place.newest / name).write_bytes(content)
    else:
        place.write(name, content)


def named_outside(place, name):
    manifest = json.loads((place.newest / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 8, "sha256": hashlib.sha256(b"precious").hexdigest()}
    (place.newest / MANIFEST).write_text(json.dumps(manifest))


def named_outside_alone(place, name):
    manifest = json.loads((place.newest / MANIFEST).read_text())
    manifest["files"]["../../../../outside/victim"] = manifest["files"].pop(name)
    (place.newest / MANIFEST).write_text(json.dumps(manifest))


def array_outside(place):
    header, data = place.header()
    place.write_header({f"../../../../outside/{name}": entry for name, entry in header.items()}, data)


def event_file(place):
    [file] = (place.run / "train").glob("events.out.tfevents.*")
    return file


def event_file_outside(place):
    """Truncating it to the length in the checkpoint would truncate the file that the link leads to."""
    name = str(event_file(place).relative_to(place.run))
    event_file(place).unlink()
    (place.run / name).symlink_to(place.victim)
    for checkpoint in (place.run / "checkpoints").iterdir():
        place.newest = checkpoint
        place.write_state(files={name: 0})
    place.newest = place.run / "checkpoints" / NEWEST


def event_folder_outside(place):
    """Of another run, whose points are not among those of this one."""
    shutil.rmtree(place.run / "train")
    (place.run / "train").symlink_to(place.outside)
    (place.outside / "events.out.tfevents.1.other.1.1.v2").write_bytes(b"of another run")


def lock_outside(place):
    (place.run / ".lock").unlink(missing_ok=True)
    (place.run / ".lock").symlink_to(place.victim)


def lock_is_fifo(place):
    (place.run / ".lock").unlink(missing_ok=True)
    os.mkfifo(place.run / ".lock")


def unfinished_outside(place):
    (place.run / "checkpoints" / ".unfinished-step-8-epoch-2").symlink_to(place.outside)


def folder_outside(place, target):
    shutil.rmtree(place.newest)
    place.newest.symlink_to(target)


def whole_folder_outside(place):
    """Whole, but whoever owns the place that it leads to may change it at any time."""
    place.newest.rename(place.outside / NEWEST)
    place.newest.symlink_to(place.outside / NEWEST)


def fifo_with_writer(place, name):
    """One that stays open and has nothing to read yet."""
    place.replace(name, os.mkfifo)
    place.writer = os.open(place.newest / name, os.O_RDWR)


def device(place, name):
    try:
        place.replace(name, lambda path: os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5)))
        (place.newest / name).open("rb").close()
    except OSError:
        pytest.skip("needs the right to make a device")


def sparse(place, name):
    """One that the manifest has with another size, or it would take as long as its checksum."""
    try:
        os.truncate(place.newest / name, 2**40)
    except OSError:
        pytest.skip("needs a file system with files of a terabyte")


def sparse_with_header(place):
    """More than the trainer can have written, with a header and a checksum that fit."""
    place.write_header({"hole": {"dtype": "U8", "shape": [2**30], "data_offsets": [0, 2**30]}})
    path = place.newest / ARRAYS
    os.truncate(path, path.stat().st_size + 2**30)
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    manifest = json.loads((place.newest / MANIFEST).read_text())
    manifest["files"][ARRAYS] = {"bytes": path.stat().st_size, "sha256": checksum}
    (place.newest / MANIFEST).write_text(json.dumps(manifest))


def overlapping(place):
    """A thousand arrays of the same megabyte."""
    entry = {"dtype": "F32", "shape": [2**18], "data_offsets": [0, 2**20]}
    place.write_header({str(number): entry for number in range(1000)}, bytes(2**20))


def length(place, value):
    header, data = place.header()
    text = json.dumps(header).encode()
    place.write(ARRAYS, struct.pack("<Q", value) + text + data)


def shape(place, sizes, itemsize=4):
    count = 1
    for size in sizes:
        count *= int(size) if size == size and abs(size) != float("inf") else 1
    place.write_first_entry(shape=sizes, data_offsets=[0, count * itemsize])


def manifest_bytes(place, text):
    content = (place.newest / MANIFEST).read_text()
    size = (place.newest / ARRAYS).stat().st_size
    assert content.count(f'"bytes": {size}') == 1
    (place.newest / MANIFEST).write_text(content.replace(f'"bytes": {size}', f'"bytes": {text}'))


def monitored(place, value):
    manifest = json.loads((place.newest / MANIFEST).read_text())
    (place.newest / MANIFEST).write_text(json.dumps(replaced(manifest, "monitored", value)))


def nested(depth, opened="[", closed="]"):
    return (opened * depth + closed * depth).encode()


def many(item, size):
    return b"[" + b",".join([item] * (size // (len(item) + 1))) + b"]"


def first_array(place, reference):
    """Another reference where the first variable's value was."""
    variables = place.state()["variables"]
    variables[next(iter(variables))]["value"] = reference
    place.write_state(variables=variables)


HOSTILE = {
    **{f"pickle as {name}": functools.partial(pickled, name=name) for name in FILES},
    # Names.
    **{
        f"manifest with {name} too": functools.partial(named_outside, name=name)
        for name in ("../../../../outside/victim", "/etc/passwd", "")
    },
    **{
        f"manifest with ../ instead of {name}": functools.partial(named_outside_alone, name=name)
        for name in (ARRAYS, STATE)
    },
    "arrays named ../": array_outside,
    "value of an array named ../": lambda place: first_array(place, {"$array": "../../../../outside/victim"}),
    "event files named ../": lambda place: place.write_state(files={"../../outside/victim": 0, "/etc/passwd": 0}),
    "event file that is a link": event_file_outside,
    "folder of event files that is a link": event_folder_outside,
    "lock that is a link": lock_outside,
    "lock that is a FIFO": lock_is_fifo,
    "unfinished folder that is a link": unfinished_outside,
    # Things that are no files.
    **{
        f"link to {target} as {name}": lambda place, name=name, target=target: place.replace(
            name, lambda path: path.symlink_to(target)
        )
        for name in FILES
        for target in ("/etc/passwd", "/dev/zero")
    },
    "link to a FIFO as state": lambda place: place.replace(STATE, lambda path: path.symlink_to(place.fifo)),
    "link to nothing as state": lambda place: place.replace(STATE, lambda path: path.symlink_to(place.outside / "no")),
    "link to itself as state": lambda place: place.replace(STATE, lambda path: path.symlink_to(path)),
    "link to /etc as folder": lambda place: folder_outside(place, "/etc"),
    "link to nothing as folder": lambda place: folder_outside(place, place.outside / "no"),
    "link to itself as folder": lambda place: folder_outside(place, place.newest),
    "link to a checkpoint elsewhere as folder": whole_folder_outside,
    **{f"FIFO as {name}": lambda place, name=name: place.replace(name, os.mkfifo) for name in FILES},
    **{f"FIFO that is open as {name}": functools.partial(fifo_with_writer, name=name) for name in FILES},
    **{f"folder as {name}": lambda place, name=name: place.replace(name, Path.mkdir) for name in FILES},
    **{f"device as {name}": functools.partial(device, name=name) for name in FILES},
    "file as folder": lambda place: (shutil.rmtree(place.newest), place.newest.write_text("")),
    "FIFO as folder": lambda place: (shutil.rmtree(place.newest), os.mkfifo(place.newest)),
    # Sizes.
    **{f"terabyte of holes as {name}": functools.partial(sparse, name=name) for name in FILES},
    "gigabyte of holes with a header": sparse_with_header,
    **{
        f"header of {value} bytes": functools.partial(length, value=value)
        for value in (0, 1, 2**24, 2**24 + 1, 2**31, 2**63, 2**64 - 1)
    },
    "arrays of 3 bytes": lambda place: place.write(ARRAYS, b"abc"),
    **{
        f"shape {sizes}": functools.partial(shape, sizes=sizes)
        for sizes in (
            [2**40],
            [2**32, 2**32],
            [2**31, 2**31, 4],
            [2**63, 2],
            [2**70, 0],
            [2**62, 4, 0],
            [-1],
            [-3, -4],
            [-1, 0],
            [1] * 100 + [12],
            [float("inf")],
            [float("nan")],
            [3.5, 4],
            [True, 12],
            [],
        )
    },
    "shape that is text": lambda place: place.write_first_entry(shape="12"),
    "shape that is null": lambda place: place.write_first_entry(shape=None),
    "shape of lists": lambda place: place.write_first_entry(shape=[[4, 3]]),
    "dtype that is an object": lambda place: place.write_first_entry(dtype="O"),
    **{
        f"dtype {dtype}": lambda place, dtype=dtype: place.write_first_entry(dtype=dtype)
        for dtype in ("F4", "F8_E5M2", "F64", "C64")
    },
    "dtype that is a list": lambda place: place.write_first_entry(dtype=["F32"]),
    "offsets below 0": lambda place: place.write_first_entry(data_offsets=[-8, 40]),
    "offsets beyond the end": lambda place: place.write_first_entry(data_offsets=[2**40, 2**40 + 48]),
    "arrays that overlap": overlapping,
    "arrays that lack their data": lambda place: place.write_header(place.header()[0]),
    # JSON.
    "header that is no JSON": lambda place: place.write_header(b"{'a': 1}"),
    "header that is no text": lambda place: place.write_header(b"\xff\xfe" * 50),
    **{
        f"header {text!r}": lambda place, text=text: place.write_header(text)
        for text in (b"[]", b"null", b"3", b'"a"', b'{"a": 3}', b'{"a": {}}', b'{"a": [1, 2]}', b'{"__metadata__": {}}')
    },
    **{
        f"{name} nested deeply by {opened}": lambda place, name=name, opened=opened, closed=closed: (
            (place.newest / name).write_bytes(nested(30_000, opened, closed))
            if name == MANIFEST
            else place.write(name, nested(1_000_000, opened, closed))
        )
        for name in (MANIFEST, STATE)
        for opened, closed in (("[", "]"), ('{"a":', "}"))
    },
    "header nested deeply": lambda place: place.write_header(nested(1_000_000)),
    "value nested as deeply as can be read": lambda place: place.write(
        STATE, json.dumps(place.state() | {"note": "HERE"}).encode().replace(b'"HERE"', nested(900))
    ),
    "manifest of a megabyte": lambda place: (place.newest / MANIFEST).write_bytes(many(b"1", 2**20)),
    "state of 60 MiB of dicts": lambda place: place.write(STATE, many(b"{}", 60 * 2**20)),
    "state of 30 MiB of dicts": lambda place: place.write(STATE, many(b"{}", 30 * 2**20)),
    "state of 80 MiB": lambda place: place.write(STATE, bytes(80 * 2**20)),
    "header of 15 MiB of dicts": lambda place: place.write_header(b'{"a":' + many(b"{}", 15 * 2**20) + b"}"),
    **{
        f"header of {size} MiB of one shape": lambda place, size=size: place.write_header(
            b'{"a":{"dtype":"U8","data_offsets":[0,1],"shape":' + many(b"1", size * 2**20) + b"}}", b"a"
        )
        for size in (15, 90)
    },
    "number of 60,000 digits in the manifest": functools.partial(manifest_bytes, text="9" * 60_000),
    **{
        f"{text} bytes in the manifest": functools.partial(manifest_bytes, text=text)
        for text in ("Infinity", "-Infinity", "NaN", "1e999", "-1", "null", '"many"', "[]", "true")
    },
    **{
        f"manifest {text}": lambda place, text=text: (place.newest / MANIFEST).write_text(text)
        for text in (
            "null",
            "[]",
            '"a"',
            "{}",
            '{"format": 1}',
            '{"format": 1, "files": []}',
            '{"format": 1, "files": {}}',
            '{"format": 1, "files": {"state.json": 3, "arrays.safetensors": 4}}',
            '{"format": [1], "files": {}}',
            '{"format": -1, "files": {}}',
            '{"format": Infinity, "files": {}}',
        )
    },
    **{
        f"manifest with {value!r} as monitored value": functools.partial(monitored, value=value)
        for value in ("missing", "1", [], {}, True)
    },
    # References in the state.
    "value that is no array": lambda place: first_array(place, 3.5),
    "value that is text": lambda place: first_array(place, "array"),
    "value that is not there": lambda place: first_array(place, {"$array": "/variables/nowhere"}),
    **{
        f"value of dtype {dtype}": lambda place, dtype=dtype: first_array(
            place, {"$array": next(iter(place.header()[0])), "dtype": dtype, "scalar": 1}
        )
        for dtype in ("float8_e5m2", "object", [1], None)
    },
    "value named by a list": lambda place: first_array(place, {"$array": [1]}),
    "value that is a tuple of nothing": lambda place: first_array(place, {"$tuple": 5}),
    "value of items that are no pairs": lambda place: first_array(place, {"$items": [[1, 2, 3]]}),
    "value under a key that is a list": lambda place: first_array(place, {"$items": [[[1], 2]]}),
    "state that is a reference": lambda place: place.write(STATE, b'{"$array": "/variables"}'),
    "state that is a tuple": lambda place: place.write(STATE, b'{"$tuple": [1, 2]}'),
    **{
        f"state {text!r}": lambda place, text=text: place.write(STATE, text)
        for text in (b"null", b"[]", b'"a"', b"{}", b"NaN", b"\xff\xfe\x00")
    },
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_checkpoint_is_an_error_or_skipped_and_harms_nothing(spoil, saved_run, tmp_path):
    run, expected = saved_run
    place = Place(tmp_path, run)
    spoil(place)
    elsewhere = place.elsewhere()
    trainer = make_trainer(place.run)
    first = trainer.get_weights()
    error = None
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        try:
            with bounded(place.run):
                fit_again(trainer)
        except Exception as caught:
            error = caught
    place.checks_out()
    assert place.elsewhere() == elsewhere
    assert error is None or isinstance(error, ValueError), f"{type(error).__name__}: {error}"
    if error is not None:
        assert str(place.run) in str(error)
        same_weights(trainer, first)
        assert trainer.steps == 0
    elif not any("Skipped: checkpoint" in str(warning.message) for warning in caught_warnings):
        same_weights(trainer, expected)  # it means nothing
        assert trainer.steps == 6
    else:
        assert NEWEST in " ".join(str(warning.message) for warning in caught_warnings)
        same_weights(trainer, expected)
        assert trainer.steps == 6


def same_weights(trainer, expected):
    for weight, value in zip(trainer.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(weight, value)


@pytest.mark.parametrize(
    "name",
    [
        "pickle as state.json",
        "FIFO as manifest.json",
        "link to /dev/zero as arrays.safetensors",
        "link to /etc as folder",
    ],
)
def test_where_nothing_good_is_left_it_is_an_error(name, saved_run, tmp_path):
    place = Place(tmp_path, saved_run[0])
    shutil.rmtree(place.run / "checkpoints" / OLDER)
    HOSTILE[name](place)
    elsewhere = place.elsewhere()
    trainer = make_trainer(place.run)
    first = trainer.get_weights()
    with bounded(), pytest.raises(ValueError, match=f"no checkpoint in {place.newest.parent} is whole"):
        fit_again(trainer)
    place.checks_out()
    assert place.elsewhere() == elsewhere
    same_weights(trainer, first)


OF_THE_STATE = {
    "state/steps": ["6", None, -1, 1.5, float("nan"), float("inf"), [6]],
    "state/epochs": ["2", None, -1, float("nan"), {}],
    "state/test_steps": ["0", None, -1, float("inf")],
    "state/skipped_steps": ["0", None, [0]],
    "state/seed": ["missing", "1", None, float("nan"), [1]],
    "state/fits": ["0", None, -1, float("nan"), []],
    "state/epoch": ["2", None, -1, 10**30, float("nan"), float("inf")],
    "state/in_epoch": ["yes", None],
    "state/progress/batches": ["0", None, -1, 10**30, float("inf")],
    "state/progress/ended": ["yes", None, []],
    "state/progress/means": [None, 3, [], {"sums": 3, "weight": 0}, {"sums": {"loss": "a"}, "weight": "b"}],
    "state/logs": [None, 3, "loss", [1]],
    "asked/epochs": ["missing", "2", None, -1, float("inf")],
    "asked/data": ["missing", None, 3, [], "x"],
    "asked/made_with": ["missing", None, {"optimizer": 3}],
    "asked/callbacks": ["missing", None, [], {"History": 3}],
    "stopped_by": ["missing", True, None, ["EarlyStopping"]],
    "starts": ["missing", None, 3, [], [1], [1, -1], [None, 0.5], [1, 1, 1]],
    "files": ["missing", None, 3, [], "train", {"train": "long"}, {"train": None}],
    "appended": ["missing", None, 3, [], {"CSVLogger.csv_file": "0"}, {"CSVLogger.csv_file": -1}],
    "callbacks": ["missing", None, 3, [], "History", {"History": 3}, {"History": ["a"]}],
    "variables": ["missing", None, 3, [], {}, "all", {"a": 3}, {"a": {"name": "b"}}],
}


def replaced(tree, path, value):
    """A tree with another value at a path, or with none."""
    name, _, rest = path.partition("/")
    assert name in tree
    if value == "missing" and not rest:
        return {key: inner for key, inner in tree.items() if key != name}
    return tree | {name: replaced(tree[name], rest, value) if rest else value}


@pytest.mark.parametrize("key", OF_THE_STATE)
def test_a_state_that_lacks_something_or_has_it_of_another_type_changes_nothing(key, saved_run, tmp_path):
    place = Place(tmp_path, saved_run[0])
    good = place.state()
    fresh, first, problems = None, None, {}
    for value in OF_THE_STATE[key]:
        place.reset()
        shutil.rmtree(place.run / "checkpoints" / OLDER)
        place.write(STATE, json.dumps(replaced(good, key, value)).encode())
        if fresh is None:
            fresh = make_trainer(place.run)
            first = fresh.get_weights()
        try:
            with bounded(place.run), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fit_again(fresh)
            outcome = "trained on without a word"
        except ValueError as error:
            outcome = None if str(place.newest) in str(error) else f"ValueError without the checkpoint: {error}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        if not all(np.array_equal(*pair) for pair in zip(fresh.get_weights(), first, strict=True)) or fresh.steps:
            outcome = f"{outcome}, and the trainer was changed"
            fresh = None
        if outcome is not None:
            problems[repr(value)] = outcome
    assert problems == {}


def test_a_state_whose_epoch_is_far_off_does_not_take_forever(saved_run, tmp_path):
    """Of a data set, an iterator is made for each epoch that is passed over."""
    place = Place(tmp_path, saved_run[0])
    shutil.rmtree(place.run)
    trainer = make_trainer(place.run)
    data = tf.data.Dataset.from_tensor_slices((X, LABELS)).batch(4)
    trainer.fit(data, epochs=2, verbose=0)
    place.write_state(state=place.state()["state"] | {"epoch": 10**9})
    trainer = make_trainer(place.run)
    with bounded(), pytest.warns(UserWarning, match=f"Skipped: checkpoint {place.newest} is damaged.*epoch"):
        trainer.fit(data, epochs=2, resume=True, verbose=0)  # from the one before
    assert (trainer.steps, trainer.epochs) == (6, 2)


# Callbacks, whose attributes a checkpoint restores.


CALLBACKS = {
    "ModelCheckpoint": lambda folder: keras.callbacks.ModelCheckpoint(
        folder / "{epoch}.weights.h5", save_weights_only=True
    ),
    "CSVLogger": lambda folder: keras.callbacks.CSVLogger(folder / "log.csv"),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_checkpoint_does_not_decide_where_a_callback_writes(name, saved_run, tmp_path):
    place = Place(tmp_path, saved_run[0])
    shutil.rmtree(place.run)
    place.run.mkdir()
    fit_again(make_trainer(place.run), [CALLBACKS[name](place.run)])
    state = place.state()["callbacks"]
    for attribute in ("filepath", "filename", "_filepath"):
        state[name][attribute] = str(place.outside / "victim.weights.h5")
    place.write_state(callbacks=state)
    elsewhere = place.elsewhere()
    with bounded(), warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")
        fit_again(make_trainer(place.run), [CALLBACKS[name](place.run)], epochs=3)
    assert place.elsewhere() == elsewhere


def test_a_checkpoint_does_not_replace_the_methods_of_a_callback(saved_run, tmp_path):
    class Counting(keras.callbacks.Callback):
        count = 0

        def on_epoch_end(self, epoch, logs=None):
            self.count += 1

    place = Place(tmp_path, saved_run[0])
    shutil.rmtree(place.run)
    fit_again(make_trainer(place.run), [Counting()])
    state = place.state()["callbacks"]
    state["Counting"] |= {"on_epoch_end": "text", "set_model": 3, "_model": None, "params": 4}
    place.write_state(callbacks=state)
    counting, error = Counting(), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit_again(make_trainer(place.run), [counting], epochs=3)
    except Exception as caught:
        error = caught
    assert error is None or (isinstance(error, ValueError) and str(place.newest) in str(error)), repr(error)
    assert counting.count == 3 or error


# What lies among the checkpoints when a run saves.


IN_THE_WAY = {
    "link to a folder elsewhere": lambda path, place: path.symlink_to(place.outside),
    "link to nothing": lambda path, place: path.symlink_to(place.outside / "no"),
    "file": lambda path, place: path.write_text(""),
    "FIFO": lambda path, place: os.mkfifo(path),
    "empty folder": lambda path, place: path.mkdir(),
}


@pytest.mark.parametrize("thing", IN_THE_WAY)
@pytest.mark.parametrize("where", ["where it is saved next", "before", "unfinished"])
def test_what_has_the_name_of_a_checkpoint_does_not_stop_a_run(thing, where, saved_run, tmp_path):
    place = Place(tmp_path, saved_run[0])
    name = {
        "where it is saved next": "step-8-epoch-2",
        "before": "step-1-epoch-0",
        "unfinished": ".unfinished-step-8-epoch-2",
    }
    IN_THE_WAY[thing](place.newest.with_name(name[where]), place)
    elsewhere = place.elsewhere()
    trainer = make_trainer(place.run)
    with bounded(place.run), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_again(trainer, epochs=3)
    assert trainer.steps == 9
    assert place.elsewhere() == elsewhere
    assert Store(place.run / "checkpoints", looplab.Checkpoint()).newest().path.name == "step-9-epoch-3"


@pytest.mark.parametrize("thing", IN_THE_WAY)
def test_histories_are_not_written_through_what_has_the_name_of_their_file(thing, saved_run, tmp_path):
    place = Place(tmp_path, saved_run[0])
    (place.run / "fits.jsonl").unlink()
    IN_THE_WAY[thing](place.run / "fits.jsonl", place)
    elsewhere = place.elsewhere()
    trainer = make_trainer(place.run)
    with bounded(place.run), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(OSError, match=r"fits\.jsonl") if thing == "empty folder" else contextlib.nullcontext():
            fit_again(trainer)
            assert len((place.run / "fits.jsonl").read_text().splitlines()) == 1
    assert place.elsewhere() == elsewhere


# Models and weights.


def lambda_model(place):
    """A `.keras` file that makes the marker when it is loaded without Keras's safe mode, or called."""
    code = f"__import__('pathlib').Path({str(place.marker)!r}).touch() or x"
    model = keras.Sequential(
        [layers.Input((4,)), layers.Lambda(eval(f"lambda x: {code}"), output_shape=(4,)), layers.Dense(3)]
    )
    place.marker.unlink(missing_ok=True)  # it may have been called here
    path = place.outside / "model.keras"
    model.save(path)
    assert not place.marker.exists()
    return path


def test_a_lambda_layer_in_a_keras_file_is_not_run(saved_run, tmp_path):
    place = Place(tmp_path, saved_run[0])
    path = lambda_model(place)
    with bounded(), pytest.raises(ValueError, match=r"(?i)lambda.*unsafe|safe_mode"):
        keras.saving.load_model(path)
    place.checks_out()
    trainer = make_trainer(None)
    first = trainer.get_weights()
    error = None
    try:
        with bounded():
            trainer.load_weights(path)
    except Exception as caught:
        error = caught
    place.checks_out()
    assert error is None or isinstance(error, ValueError), repr(error)
    if error is not None:
        same_weights(trainer, first)


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.parametrize("kind", ["pickle", "text", "zip with ../"])
def test_files_that_are_no_weights_are_an_error(kind, suffix, saved_run, tmp_path):
    place = Place(tmp_path, saved_run[0])
    path = place.outside / f"hostile{suffix}"
    if kind == "zip with ../":
        with zipfile.ZipFile(path, "w") as file:
            for name in ("config.json", "metadata.json", "../../marker", "model.weights.h5"):
                file.writestr(name, "{}")
    else:
        path.write_bytes(pickle.dumps(Trap(place.marker)) if kind == "pickle" else b"hello")
    elsewhere = place.elsewhere()
    trainer = make_trainer(None)
    first = trainer.get_weights()
    with bounded(), pytest.raises((ValueError, OSError)) as caught:
        trainer.load_weights(path)
    assert path.name in str(caught.value)
    place.checks_out()
    assert place.elsewhere() == elsewhere
    same_weights(trainer, first)


# Data.


def npy(shape, dtype="|u1"):
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n"


DATA = {
    "pickle": lambda place, path: path.write_bytes(pickle.dumps(Trap(place.marker))),
    "array of objects": lambda place, path: np.savez(
        *(path,), **{key: np.array([Trap(place.marker)], object) for key in ("x_train", "y_train", "x_test", "y_test")}
    ),
    "shape of a petabyte": lambda place, path: _zip(path, npy((2**50, 2, 2))),
    "shape that overflows": lambda place, path: _zip(path, npy((2**40, 2**40))),
    "shape below 0": lambda place, path: _zip(path, npy((-1, 2))),
    "header that is code": lambda place, path: _zip(
        *(path,),
        b"\x93NUMPY\x01\x00"
        + struct.pack("<H", 60)
        + f"__import__('os').mkdir({str(place.marker)!r})".encode()[:60].ljust(60),
    ),
    "names with ../": lambda place, path: _zip(path, npy((1, 2, 2)) + b"abcd", "../../../marker"),
    "link to /dev/zero": lambda place, path: path.symlink_to("/dev/zero"),
    "FIFO": lambda place, path: os.mkfifo(path),
}


def _zip(path, content, *more):
    with zipfile.ZipFile(path, "w") as file:
        for name in ("x_train.npy", "y_train.npy", "x_test.npy", "y_test.npy", *more):
            file.writestr(name, content)


@pytest.mark.parametrize("make", DATA.values(), ids=DATA)
def test_a_hostile_data_file_is_an_error(make, saved_run, tmp_path):
    place = Place(tmp_path, saved_run[0])
    folder = tmp_path / "data"
    folder.mkdir()
    make(place, folder / "mnist.npz")
    elsewhere = place.elsewhere()
    with bounded(), pytest.raises(ValueError, match=str(folder)):
        looplab.Data("mnist", data_dir=str(folder)).load()
    place.checks_out()
    assert place.elsewhere() == elsewhere


# The configuration of a recipe's run.


def recipe(epochs: int = 2, batch_size: int = 4, seed: int = 0, **options):
    inputs = layers.Input((4,))
    model = keras.Model(inputs, layers.Dense(3)(inputs))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainer = looplab.Trainer(model, optimizer="sgd", loss=loss, seed=seed, **options)
    return looplab.Recipe(trainer, (X, LABELS), epochs=epochs, batch_size=batch_size)


CONFIGS = {
    "pickle": lambda config, place: pickle.dumps(Trap(place.marker)),
    "list": lambda config, place: b"[1, 2]",
    "text": lambda config, place: b'"a"',
    "nested": lambda config, place: nested(1_000_000),
    "no text": lambda config, place: b"\xff\xfe",
    "epochs of text": lambda config, place: config | {"epochs": "many"},
    "epochs of NaN": lambda config, place: config | {"epochs": float("nan")},
    "seed of text": lambda config, place: config | {"seed": "zero"},
    "seed below 0": lambda config, place: config | {"seed": -1},
    "weights elsewhere": lambda config, place: config | {"weights": str(place.victim)},
    "unknown argument": lambda config, place: config | {"plan": "b"},
    "log_dir elsewhere": lambda config, place: config | {"log_dir": str(place.outside / "log")},
    "plot elsewhere": lambda config, place: config | {"plot": str(place.outside / "plot.png")},
    "another recipe": lambda config, place: config | {"recipe": "os:system"},
    "precision": lambda config, place: config | {"precision": ["float32"]},
    "checkpoint": lambda config, place: config | {"checkpoint": {"every": 0}},
    "checkpoint of text": lambda config, place: config | {"checkpoint": "epoch"},
    "asked": lambda config, place: config | {"asked": 3},
    "words of numbers": lambda config, place: config | {"asked": {"epochs": [1]}},
    "words of no number": lambda config, place: config | {"asked": {"epochs": ["many"]}},
    "text for a number": lambda config, place: config | {"asked": {"seed": "zero"}},
    "unknown flags": lambda config, place: config | {"asked": {"plan": ["b"], "epochs.x": ["1"]}},
    "asked weights elsewhere": lambda config, place: config | {"asked": {"weights": [str(place.victim)]}},
    "asked plot elsewhere": lambda config, place: config | {"asked": {"plot": [str(place.outside / "plot.png")]}},
    "an object": lambda config, place: config | {"asked": {"batch_size": None}},
    "environment": lambda config, place: config | {"environment": "none"},
    "data_source": lambda config, place: config | {"data_source": "none"},
}


@pytest.fixture(scope="module")
def recipe_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("recipe") / "run"
    looplab.run(recipe, log_dir=run, verbose=0, epochs=1)
    return run


@pytest.mark.parametrize("spoil", CONFIGS.values(), ids=CONFIGS)
def test_a_hostile_configuration_is_an_error_or_means_nothing(spoil, recipe_run, tmp_path):
    place = Place(tmp_path, recipe_run)
    config = spoil(json.loads((place.run / "config.json").read_text()), place)
    (place.run / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    elsewhere = place.elsewhere()
    error = None
    try:
        with bounded(place.run), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            looplab.run(recipe, resume=place.run, epochs=2, verbose=0)
    except Exception as caught:
        error = caught
    place.checks_out()
    assert place.elsewhere() == elsewhere
    is_clear = isinstance(error, ValueError) or "has no argument `" in str(error)
    assert error is None or is_clear, f"{type(error).__name__}: {error}"
