"""What TensorBoard's own server shows of a run: hyperparameters, embeddings and the graph, asked over HTTP."""

import json
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import looplab

RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.normal(size=(11, 5)).astype("float32")
LABELS = ["one", "tab\there", "line\nbreak\r\n", "", "5", "ü 漢字", " both ends ", "7", "8", "9", "10"]
SHOWN_LABELS = ["one", "tab here", "line break", "-", "5", "ü 漢字", "both ends", "7", "8", "9", "10"]
IMAGES = RANDOM.integers(0, 256, (11, 4, 6, 3), "uint8")
ODD_NAME = "z/../of: epoch 2 & +50% #1"
HPARAMS = {
    "learning_rate": 1e-2,
    "units": np.int64(3),
    "dropout": np.float32(0.5),
    "augment": True,
    "optimizer": "adam",
    "warm_up": None,
    "folder": Path("data/mnist"),
    "sizes": [3, 1],
    "clip": float("inf"),
    "beta": tf.constant(0.25),
    "decay": keras.Variable(0.125),
}


def small_trainer(**options):
    model = keras.Sequential([keras.layers.Dense(3, name="hidden"), keras.layers.Dense(1, name="readout")])
    return looplab.Trainer(model, optimizer="adam", loss="mse", **options)


def fit(trainer, epochs=1):
    x, y = np.ones((20, 4), "float32"), np.ones((20, 1), "float32")
    return trainer.fit(x, y, batch_size=8, validation_data=(x, y), epochs=epochs, verbose=0).history


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Where TensorBoard looks, the name of a trained run there, and its history."""
    logs = tmp_path_factory.mktemp("logs")
    trainer = small_trainer(log_dir=logs / "mine" / "1")
    trainer.log_hparams({"units": 1000, "first": "kept"})
    trainer.log_hparams(HPARAMS)
    history = fit(trainer, epochs=2)
    trainer.log_embeddings("replaced", VECTORS[:4], labels=LABELS[:4])
    trainer.log_embeddings(ODD_NAME, VECTORS, LABELS, IMAGES)
    trainer.log_embeddings("replaced", tf.constant([[1.0, 2.0], [3.0, 1 / 3]]), images=IMAGES[:2, :, :, 0])
    same = small_trainer(log_dir=logs / "mine" / "2")
    same.log_hparams(HPARAMS)
    same.log_embeddings("before fit", [[1, 2]], [7])
    fit(same)
    return logs, "mine/1", history


@pytest.fixture(scope="module")
def server(run, tensorboard):
    """Asks a server of all runs."""
    with tensorboard(run[0]) as ask:
        yield ask


def session_groups(server):
    """The rows of the HPARAMS tab, once both runs' metrics are there."""
    body = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 10,
    }

    def complete(answer):
        groups = json.loads(answer).get("sessionGroups", [])
        names = [[value["name"] for value in group.get("metricValues", [])] for group in groups]
        return len(groups) == 2 and all({"tag": "epoch_loss", "group": "validation"} in of_run for of_run in names)

    groups = json.loads(server("hparams/session_groups", body, complete))["sessionGroups"]
    return {group["name"]: group for group in groups}


def test_hparams_tab_shows_values_as_they_are_and_the_last_of_each_scalar(server, run):
    _, name, history = run
    group = session_groups(server)[name]
    assert group["hparams"] == {
        "learning_rate": 1e-2,
        "units": 3,
        "dropout": 0.5,
        "augment": True,
        "optimizer": "adam",
        "warm_up": "None",
        "folder": "data/mnist",
        "sizes": "[3, 1]",
        "clip": "inf",
        "beta": 0.25,
        "decay": 0.125,
        "first": "kept",
    }
    metrics = {(v["name"]["group"], v["name"]["tag"]): (v["trainingStep"], v["value"]) for v in group["metricValues"]}
    assert metrics["train", "epoch_loss"] == (2, pytest.approx(history["loss"][1], rel=1e-6))
    assert metrics["validation", "epoch_loss"] == (2, pytest.approx(history["val_loss"][1], rel=1e-6))
    assert metrics["train", "batch_learning_rate"] == (6, pytest.approx(1e-3))


def test_runs_of_the_same_hyperparameters_are_rows_of_their_own(server):
    groups = session_groups(server)
    assert {name: len(group["sessions"]) for name, group in groups.items()} == {"mine/1": 1, "mine/2": 1}

    infos = json.loads(server("hparams/experiment", {"experimentName": ""}))["hparamInfos"]
    types = {info["name"]: info["type"] for info in infos}
    assert set(types) == {*HPARAMS, "first"}
    assert types["units"] == types["decay"] == "DATA_TYPE_FLOAT64"
    assert (types["augment"], types["folder"]) == ("DATA_TYPE_BOOL", "DATA_TYPE_STRING")


def test_projector_tab_gets_vectors_labels_and_pictures_back(server, run):
    folder = f"{run[1]}/train"
    runs = json.loads(server("projector/runs", ready=lambda answer: len(json.loads(answer)) == 2))
    assert sorted(runs) == ["mine/1/train", "mine/2/train"]

    infos = {info["tensorName"]: info for info in json.loads(server("projector/info", run=folder))["embeddings"]}
    name = "z/../of: epoch 2 _ _50_ _1"  # without what the page would not quote
    assert set(infos) == {"replaced", name}
    assert infos[name]["tensorShape"] == [11, 5]
    assert infos[name]["sprite"]["singleImageDim"] == [6, 4]

    def tensor(name):
        content = server("projector/tensor", run=folder, name=name, num_rows=100000)
        return np.frombuffer(content, np.float32).reshape(infos[name]["tensorShape"])

    np.testing.assert_array_equal(tensor(name), VECTORS)
    np.testing.assert_array_equal(tensor("replaced"), np.float32([[1, 2], [3, 1 / 3]]))
    labels = server("projector/metadata", run=folder, name=name, num_rows=100000).decode()
    assert labels == "".join(f"{label}\n" for label in SHOWN_LABELS)

    sprite = tf.io.decode_png(server("projector/sprite_image", run=folder, name=name)).numpy()
    assert sprite.shape == (4 * 4, 4 * 6, 3)  # of 4 rows and columns
    cells = [sprite[4 * row : 4 * row + 4, 6 * column : 6 * column + 6] for row in range(4) for column in range(4)]
    np.testing.assert_array_equal(cells[:11], IMAGES)
    assert not np.any(cells[11:])

    assert "metadataPath" not in infos["replaced"]  # what was replaced had labels
    sprite = tf.io.decode_png(server("projector/sprite_image", run=folder, name="replaced")).numpy()
    np.testing.assert_array_equal(sprite[:4, :, 0], np.concatenate([IMAGES[0, :, :, 0], IMAGES[1, :, :, 0]], 1))


def test_embeddings_before_the_first_fit_are_shown(server):
    assert server("projector/metadata", run="mine/2/train", name="before fit") == b"7\n"


def test_graphs_tab_shows_the_step_by_layers(server, run):
    folder = f"{run[1]}/train"
    info = json.loads(server("graphs/info", ready=lambda answer: folder in json.loads(answer)))
    assert info[folder]["run_graph"]
    graph = server("graphs/graph", run=folder, limit_attr_size=1024, large_attrs_key="_too_large_attrs").decode()
    names = re.findall(r'^  name: "(.*)"$', graph, re.MULTILINE)
    for scope in ("hidden", "readout", "gradient_tape", "adam", "compile_loss/mse"):
        assert any(re.search(rf"{scope}(_\d+)?/", name) for name in names), scope  # Keras counts names in a process
    assert "_too_large_attrs" not in graph
    assert "_output_shapes" in graph


def event_files(log_dir):
    return sorted(str(path.relative_to(log_dir).parent) for path in log_dir.rglob("events.out.tfevents.*"))


def graphs_in(folder):
    records = [record for path in folder.glob("events.out.*") for record in tf.data.TFRecordDataset(str(path))]
    return sum(tf.compat.v1.Event.FromString(record.numpy()).HasField("graph_def") for record in records)


def test_a_run_stays_in_its_folder_wherever_the_program_goes(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = looplab.Trainer(keras.Sequential([keras.layers.Dense(1)]), optimizer="sgd", loss="mse", log_dir="run")
    trainer.fit(*line, verbose=0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    trainer.fit(*line, verbose=0)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert trainer.log_dir == tmp_path / "run"


def test_the_graph_is_written_once(tmp_path):
    trainer = small_trainer(log_dir=tmp_path)
    fit(trainer)
    trainer.fit(np.ones((20, 4), "float64"), np.ones((20, 1), "float64"), verbose=0)  # another signature
    assert graphs_in(tmp_path / "train") == 1
    assert graphs_in(tmp_path / "validation") == 0


def test_tensorboard_sees_all_fits_of_a_trainer_though_they_share_their_files(tmp_path, tensorboard):
    trainer = small_trainer(log_dir=tmp_path / "run")
    losses = {"train": [], "validation": []}
    with tensorboard(tmp_path, "--reload_interval", "1") as ask:
        for number in range(1, 4):
            history = fit(trainer)
            losses["train"] += history["loss"]
            losses["validation"] += history["val_loss"]
            for folder, expected in losses.items():
                arguments = {"run": f"run/{folder}", "tag": "epoch_loss"}
                shown = ask("scalars/scalars", ready=lambda answer: len(json.loads(answer)) == number, **arguments)  # noqa: B023
                assert [value for _, _, value in json.loads(shown)] == pytest.approx(expected, rel=1e-6)
    assert event_files(tmp_path) == ["run/time", "run/train", "run/validation"]


def test_an_eager_step_has_no_graph(tmp_path):
    fit(small_trainer(log_dir=tmp_path, run_eagerly=True))
    assert graphs_in(tmp_path / "train") == 0


def test_each_call_replaces_the_file_of_hyperparameters(tmp_path):
    trainer = small_trainer(log_dir=tmp_path)
    trainer.log_hparams({"units": 3})
    trainer.log_hparams({"units": 4})
    assert event_files(tmp_path) == ["."]
    fit(trainer)
    trainer.log_hparams({"units": 5})
    assert event_files(tmp_path) == [".", "time", "train", "validation"]


def test_a_resumed_run_shows_the_hyperparameters_of_its_newest_process(tmp_path):
    for hparams in ({"units": 3, "old": True}, {"units": 4}):
        trainer = small_trainer(log_dir=tmp_path)
        trainer.log_hparams(hparams)
        trainer.fit(np.ones((20, 4)), np.ones((20, 1)), resume=True, verbose=0)
        (path,) = tmp_path.glob("events.out.*")
        (event,) = [event for event in EventFileLoader(str(path)).Load() if event.HasField("summary")]
        data = HParamsPluginData.FromString(event.summary.value[0].metadata.plugin_data.content)
        assert set(data.session_start_info.hparams) == set(hparams)


def test_a_folder_of_another_run_is_refused(tmp_path):
    fit(small_trainer(log_dir=tmp_path))
    before = sorted(tmp_path.rglob("*"))
    other = small_trainer(log_dir=tmp_path)
    other.log_hparams({"units": 3})  # it waits for `fit`
    other.log_embeddings("z", VECTORS)
    with pytest.raises(ValueError, match="holds the run of another trainer"):
        fit(other)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_program_that_never_calls_fit_warns_that_logged_values_are_lost(tmp_path):
    fit(small_trainer(log_dir=tmp_path))
    program = f"import looplab; looplab.Trainer(log_dir={str(tmp_path)!r}).log_hparams({{'units': 3}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert f"What was logged was not written: {tmp_path} holds a run" in done.stderr


def test_without_log_dir_nothing_is_written_and_arguments_are_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = small_trainer()
    trainer.log_hparams(HPARAMS)
    trainer.log_embeddings("z", VECTORS, LABELS, IMAGES)
    with pytest.raises(ValueError, match="`vectors`"):
        trainer.log_embeddings("z", VECTORS[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, VECTORS), r"`name` must be a string that is not empty; got 3"),
        ((" \n", VECTORS), r"`name` must be a string"),
        (
            ("z", IMAGES),
            r"`vectors` must be numbers of shape \(n, d\); got shape \(11, 4, 6, 3\) and dtype uint8.*reshape",
        ),
        (("z", [["a"]]), r"`vectors` .*dtype string"),
        (("z", np.zeros((0, 5))), r"`vectors` .*shape \(0, 5\)"),
        (("z", object()), r"`vectors` must be an array; got object"),
        (("z", VECTORS, ["a", "b"]), r"`labels` must be one for each of the 11 vectors; got shape \(2,\)"),
        (("z", VECTORS, np.zeros((11, 1))), r"`labels` .*shape \(11, 1\)"),
        (
            ("z", VECTORS, None, IMAGES[:5]),
            r"`images` must be uint8, .*11 vectors, .*; got shape \(5, 4, 6, 3\) and dtype uint8",
        ),
        (("z", VECTORS, None, IMAGES / 255), r"`images` must be uint8, .*dtype float64"),
        (("z", VECTORS, None, np.zeros((11, 4, 6, 2), "uint8")), r"`images` .*shape \(11, 4, 6, 2\)"),
        (
            ("z", VECTORS, None, np.zeros((11, 2049, 8), "uint8")),
            r"`images` are 11 of 2049x8 pixels: 8196x32 in one picture.*at most 8192x8192.* 9 of this size fit",
        ),
    ],
)
def test_wrong_embeddings_are_refused_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        small_trainer(log_dir=tmp_path).log_embeddings(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hparams", [[("units", 3)], {3: "units"}, None])
def test_wrong_hparams_are_refused_before_anything_is_written(tmp_path, hparams):
    with pytest.raises(TypeError, match="`hparams` must be a dict of values by name"):
        small_trainer(log_dir=tmp_path).log_hparams(hparams)
    assert not list(tmp_path.iterdir())


def test_embeddings_of_a_running_step_are_refused_as_it_has_no_values(tmp_path):
    class Logs(looplab.Trainer):
        def train_step(self, batch):
            self.log_embeddings("z", batch[0])
            return super().train_step(batch)

    with pytest.raises(TypeError, match=r"`vectors` has no values while a step is traced.*callback"):
        fit(Logs(small_trainer().model, optimizer="adam", loss="mse", log_dir=tmp_path))
