import dataclasses
import inspect
import json
import os
import re
import runpy
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import looplab
from looplab.cli.files import environment
from looplab.data import batches as data
from looplab.recipes.vae import vae
from looplab.testing import read_scalars

DIGITS = looplab.Data("digits", limit=128)  # two steps of 64 an epoch
COMMON_FLAGS = {"help", "seed", "log_dir", "weights", "precision", "plot", "summary", "predict", "verbose"}
COMMON_FLAGS |= {"steps_per_execution", "run_eagerly", "jit_compile", "fused_updates", "profile_steps"}
COMMON_FLAGS |= {"resume", "strategy", "checkpoint_every"}
TENSORBOARD = "tensorboard --logdir {} --samples_per_plugin scalars=999999999"

SMALL = '''
from __future__ import annotations

from typing import Literal

import keras
import numpy as np

import looplab

seen = []


def build(
    width: int = 3,
    rate: float | None = None,
    bias: bool = True,
    kind: Literal["sgd", "adam"] = "sgd",
    level: Literal[1, 2] = 1,
    epochs: int = 1,
    **trainer_options,
) -> looplab.Recipe:
    """Learns a line.

    Args:
        width: of the one layer, at 100% of
            what is needed
        rate: of learning
        kind: which optimizer
    """
    seen.append({"width": width, "rate": rate, "bias": bias, "kind": kind, "level": level, "epochs": epochs})
    layers = [keras.layers.Dense(width, use_bias=bias, activity_regularizer="l2"), keras.layers.Dense(1)]
    x = np.arange(12, dtype="float32").reshape(6, 2)
    trainer = looplab.Trainer(keras.Sequential(layers), optimizer=kind, loss="mse", **trainer_options)
    return looplab.Recipe(trainer, (x, x[:, :1]), epochs=epochs)
'''


def history_of(folder):
    return (folder / "history.json").read_bytes()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two commands, run side by side: by name, (folder that each ran in, exit status, stdout, stderr)."""
    commands = {
        "help": ["--help"],
        "run": ["--dataset", "digits", "--limit", "128", "--epochs", "2", "--log-dir", "runs/first"],
    }
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    environment["COLUMNS"] = "200"  # one line for each flag
    levels = {"help": {}, "run": {"TF_CPP_MIN_LOG_LEVEL": "0"}}
    processes = {}
    for name, flags in commands.items():
        folder = tmp_path_factory.mktemp("cwd")
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "looplab.recipes.vae", *flags]
        processes[name] = folder, subprocess.Popen(command, cwd=folder, env=environment | levels[name], **pipes)
    outcomes = {}
    for name, (folder, process) in processes.items():
        stdout, stderr = process.communicate(timeout=120)
        outcomes[name] = folder, process.returncode, stdout, stderr
    return outcomes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs on some digits: (the folder, the recipe that was run)."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, looplab.run(vae, data=DIGITS, epochs=2, log_dir=folder)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The module of a small recipe."""
    (tmp_path / "small_recipe.py").write_text(SMALL)
    monkeypatch.syspath_prepend(tmp_path)
    import small_recipe

    yield small_recipe
    del sys.modules["small_recipe"]


def looplab_m(monkeypatch, *arguments):
    """`python -m looplab ...` in this process."""
    monkeypatch.setattr(sys, "argv", ["looplab", *arguments])
    runpy.run_module("looplab", run_name="__main__", alter_sys=True)


# The command line of the VAE, in processes of its own.


def test_help_shows_each_flag_and_nothing_else(finished):
    folder, status, stdout, stderr = finished["help"]
    assert (status, stderr) == (0, "")
    assert stdout.startswith("usage: python -m looplab.recipes.vae ")
    own = set(inspect.signature(vae).parameters) - {"data", "trainer_options"}
    names = own | {field.name for field in dataclasses.fields(looplab.Data)} | COMMON_FLAGS
    shown = re.findall(r"^  (?:-h, )?(--[a-z-]+)", stdout, re.MULTILINE)
    assert sorted(shown) == sorted(f"--{name.replace('_', '-')}" for name in names)
    text = " ".join(stdout.split())
    assert "--latent-dim INT dimensions of the latent space (default: 32)" in text
    assert re.search(r"--dataset \{mnist,cifar10,digits\} its name; [^-]+ \(default: mnist\)", text)
    assert list(folder.iterdir()) == []


def test_wrong_flag_names_the_nearest_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        looplab.main(vae, ["--epoch", "3"])
    stdout, stderr = capsys.readouterr()
    assert (caught.value.code, stdout) == (2, "")
    assert stderr.startswith("usage: ")
    assert stderr.endswith("error: unknown argument --epoch: did you mean --epochs?\n")
    assert len(re.findall("^[^ ]", stderr, re.MULTILINE)) == 2  # the usage and the error
    assert list(tmp_path.iterdir()) == []


def test_run_leaves_all_files_and_is_quiet(finished):
    folder, status, stdout, stderr = finished["run"]
    assert (status, stderr) == (0, "")  # no terminal, no bar
    watch, last = stdout.splitlines()
    assert watch == f"To watch it: {TENSORBOARD.format('runs')}"
    values = {name: values[-1] for name, values in json.loads(history_of(folder / "runs" / "first")).items()}
    text = ", ".join(f"{name}={values[name]:.4g}" for name in ("loss", "val_loss"))
    assert re.fullmatch(rf"looplab: 4 steps in \d+ s, all files in runs/first: {re.escape(text)}", last)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    events = {path for path in left if "tfevents" in path}
    folders = {"runs/first", *(f"runs/first/{name}" for name in ("train", "validation", "time"))}  # the first: hparams
    assert {path.rpartition("/")[0] for path in events} == folders
    files = {"config.json", "history.json", "timings.json", "fits.jsonl", "model.weights.h5", "curves.png"}
    pictures = {f"pictures/{name}-00{epoch}.png" for name in ("reconstructions", "prior") for epoch in (1, 2)}
    embeddings = {path for path in left if "/train/embeddings/" in path or path.endswith("projector_config.pbtxt")}
    assert len(embeddings) == 4  # vectors, labels, pictures, and the list of them
    checkpoints = {path for path in left if "/checkpoints/" in path}
    assert {path.split("/")[3] for path in checkpoints} == {"step-2-epoch-1", "step-4-epoch-2"}
    assert left - events - embeddings - checkpoints == {f"runs/first/{name}" for name in files | pictures | {".lock"}}


def test_run_writes_each_step(finished):
    folder = finished["run"][0] / "runs" / "first"
    for part in ("train", "validation"):
        steps, losses = read_scalars(folder / part)["batch_loss"]
        assert steps.tolist() == [1, 2, 3, 4]
        assert len(set(losses.tolist())) == 4


def test_run_says_what_it_was(finished):
    config = config_of(finished["run"][0] / "runs" / "first")
    expected = {
        "recipe": "looplab.recipes.vae:vae",
        "seed": 0,
        "weights": None,
        "data": {"dataset": "digits", "data_dir": None, "limit": 128, "validation_split": 0.0},
        "hidden": 64,
        "latent_dim": 32,
        "learning_rate": 1e-3,
        "epochs": 2,
        "batch_size": 64,
        "log_dir": "runs/first",
    }
    assert {key: config[key] for key in expected} == expected
    arrays = looplab.Data("digits").load()
    assert (config["data_source"]["name"], config["data_source"]["sha256"]) == ("digits", arrays.sha256)
    assert config["environment"]["versions"]["tensorflow"] == tf.__version__


def test_command_line_and_python_give_the_same_bits(finished, trained):
    assert history_of(finished["run"][0] / "runs" / "first") == history_of(trained[0])


# Bits.


def test_history_reads_back_to_the_same_floats(trained):
    folder, recipe = trained
    history = json.loads(history_of(folder))
    assert history == recipe.trainer.history.history
    assert all(len(values) == 2 for values in history.values())
    assert {"loss", "val_loss"} <= set(history)


def test_run_again_gives_the_same_bits(trained, tmp_path):
    keras.utils.set_random_seed(99)  # nothing from before matters
    again = looplab.run(vae, data=DIGITS, epochs=2, log_dir=tmp_path / "again")
    assert history_of(tmp_path / "again") == history_of(trained[0])
    for one, other in zip(again.trainer.get_weights(), trained[1].trainer.get_weights(), strict=True):
        assert np.array_equal(one, other)


def test_other_seed_gives_another_history(trained, tmp_path):
    looplab.main(vae, f"--dataset digits --limit 128 --epochs 2 --seed 1 --log-dir {tmp_path / 'other'}".split())
    assert config_of(tmp_path / "other")["seed"] == 1
    assert history_of(tmp_path / "other") != history_of(trained[0])


def test_weights_are_where_a_run_starts(trained, tmp_path):
    file = trained[0] / "model.weights.h5"
    flags = f"--dataset digits --limit 128 --epochs 1 --seed 5 --log-dir {tmp_path / 'run'} --weights {file}"
    looplab.main(vae, flags.split())

    def first_loss(weights):
        """By hand, with the weights, the noise and the first batch that the run starts with."""
        keras.utils.set_random_seed(5)
        recipe = vae(data=DIGITS, seed=5)
        model = recipe.trainer.model
        options = {"batch_size": 64, "shuffle": True, "seed": 5, "strategy": tf.distribute.get_strategy()}
        x, y = next(iter(data.from_arguments("x", *recipe.train, **options).start(0)))
        recipe.trainer.build(*recipe.train)
        if weights:
            model.load_weights(weights)
        return float(tf.reduce_mean(tf.square(model(x, training=True) - y)) + sum(model.losses))

    loss = read_scalars(tmp_path / "run" / "train")["batch_loss"][1][0]
    assert loss == pytest.approx(first_loss(file), rel=1e-5)
    assert loss != pytest.approx(first_loss(None), rel=0.1)
    assert config_of(tmp_path / "run")["weights"] == str(file)


# What a user can get wrong.


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--epochs 0", "argument --epochs: must be at least 1; got 0"),
        ("--epochs 1.5", "argument --epochs: "),
        ("--batch-size x", "argument --batch-size: "),
        ("--batch-size -1", "argument --batch-size: must be at least 1; got -1"),
        ("--limit 0", "argument --limit: must be at least 1; got 0"),
        ("--hidden many", "argument --hidden: "),
        ("--learning-rate fast", "argument --learning-rate: "),
        ("--dataset foo", "argument --dataset: "),
        ("--seed 1e3", "argument --seed: "),
        ("--verbose 3", "argument --verbose: invalid choice: '3' (choose from auto, 0, 1, 2)"),
        ("--steps-per-execution 0", "argument --steps-per-execution: must be at least 1; got 0"),
        ("--latent 3", "unknown argument --latent"),
        ("--latent_dim=3", "unknown argument --latent_dim=3: did you mean --latent-dim?"),
        ("--data-dir empty", "`data_dir`: empty has no file mnist.npz"),
        ("--dataset digits --weights no.weights.h5", ""),
    ],
)
def test_wrong_value_is_one_clear_line_and_leaves_nothing(flags, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        looplab.main(vae, [*flags.split(), "--log-dir", "run"])
    stdout, stderr = capsys.readouterr()
    assert (caught.value.code, stdout) == (2, "")
    error = stderr.splitlines()[-1]
    assert error.startswith(f"python -m looplab.recipes.vae: error: {text}")
    name, value = re.split("[ =]", flags)[-2:]
    assert name.strip("-").replace("-", "_") in error.replace("-", "_")
    assert value in error or text.startswith("unknown")
    assert " _" not in error  # no name from within
    assert list(tmp_path.iterdir()) == []


def test_folder_with_a_run_is_refused(trained):
    folder = trained[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ValueError, match=f"`log_dir` {re.escape(str(folder))} holds the run"):
        looplab.run(vae, data=DIGITS, log_dir=folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_folder_with_a_run_is_refused_on_the_command_line(trained, capsys):
    with pytest.raises(SystemExit) as caught:
        looplab.main(vae, ["--dataset", "digits", "--log-dir", str(trained[0])])
    assert caught.value.code == 2
    assert f"{trained[0]} holds the run" in capsys.readouterr().err


# Any recipe function.


def test_mistakes_of_a_recipe_are_one_sentence(tmp_path):
    def returns_none(**options):
        looplab.Trainer(lambda x: x, **options)

    def returns_its_trainer(**options):
        return looplab.Trainer(lambda x: x, **options)

    def takes_no_options():
        raise AssertionError

    def takes_plot(plot=True, **options):
        raise AssertionError

    for recipe, text in {
        returns_none: "recipe `returns_none` must return a `looplab.Recipe`; got NoneType",
        returns_its_trainer: "recipe `returns_its_trainer` must return a `looplab.Recipe`; got Trainer",
        takes_no_options: r"recipe `takes_no_options`: .* It must take its own arguments, and \*\*options",
        takes_plot: "recipe `takes_plot`: `plot` is a reserved argument name; rename it",
    }.items():
        with pytest.raises(ValueError, match=text):
            looplab.run(recipe, log_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_nearest_argument_of_a_recipe_is_suggested(small, tmp_path):
    with pytest.raises(ValueError, match=r"recipe `build` has no argument `epoch`: did you mean `epochs`\?"):
        looplab.run(small.build, epoch=2, log_dir=tmp_path / "run")
    with pytest.raises(TypeError, match=r"`Trainer` has no argument `metric`: did you mean `metrics`\?"):
        looplab.run(small.build, metric=[], log_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_git_revision_is_that_of_the_checkout_with_the_recipe(small, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    assert environment(small.build)["git_revision"] is None
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert environment(small.build)["git_revision"] is None  # as of a package in a virtual environment in a checkout
    subprocess.run([*git, "add", "small_recipe.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "second"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert environment(small.build)["git_revision"] == head


def test_flags_of_a_recipe_function_keep_their_types(small, tmp_path, monkeypatch):
    flags = f"--width 5 --rate 0.5 --no-bias --kind adam --level 2 --epochs 3 --log-dir {tmp_path / 'run'}"
    looplab_m(monkeypatch, "small_recipe:build", *flags.split())
    expected = {"width": 5, "rate": 0.5, "bias": False, "kind": "adam", "level": 2, "epochs": 3}
    assert small.seen == [expected]
    assert [type(value) for value in small.seen[0].values()] == [type(value) for value in expected.values()]
    config = config_of(tmp_path / "run")
    assert {key: config[key] for key in expected} == expected
    assert config["recipe"] == "small_recipe:build"
    assert len(json.loads(history_of(tmp_path / "run"))["loss"]) == 3


def test_without_flags_the_defaults_hold_and_each_run_has_its_folder(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        looplab_m(monkeypatch, "small_recipe:build")
    assert small.seen == 2 * [{"width": 3, "rate": None, "bias": True, "kind": "sgd", "level": 1, "epochs": 1}]
    folders = sorted((tmp_path / "logs" / "small_recipe").iterdir())
    assert len(folders) == 2
    assert all(re.fullmatch(r"\d{8}-\d{6}(-2)?", folder.name) for folder in folders)
    assert capsys.readouterr().out.count(TENSORBOARD.format(os.path.join("logs", "small_recipe"))) == 2


def test_help_of_a_recipe_function_shows_types_defaults_and_docstring_lines(small, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        looplab_m(monkeypatch, "small_recipe:build", "--help")
    assert not caught.value.code
    stdout = capsys.readouterr().out
    assert "\nLearns a line.\n" in stdout
    expected = [
        "--width INT of the one layer, at 100% of what is needed (default: 3)",
        "--rate FLOAT of learning --bias",  # None is no default to show
        "--bias, --no-bias (default: True)",
        "--kind {sgd,adam} which optimizer (default: sgd)",
        "--level {1,2} (default: 1)",
        "--epochs INT (default: 1)",
    ]
    text = " ".join(stdout.split())
    assert [line for line in expected if line not in text] == []


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--kind rmsprop", "argument --kind: invalid choice: 'rmsprop'"),
        ("--level 3", "argument --level: invalid choice: '3'"),
        ("--rate none", "argument --rate: invalid float value: 'none'"),
        ("--bias yes", "unknown argument yes"),
        ("--widht 3", "unknown argument --widht: did you mean --width?"),
    ],
)
def test_wrong_flag_of_a_recipe_function_is_refused(flags, text, small, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        looplab_m(monkeypatch, "small_recipe:build", *flags.split())
    assert caught.value.code == 2
    assert f"error: {text}" in capsys.readouterr().err
    assert small.seen == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "MODULE:FUNCTION"),
        (["no_such:build"], "No module named 'no_such'"),
        (["small_recipe:no"], "no attribute 'no'"),
        (["small_recipe"], "no attribute 'small_recipe'"),
    ],
)
def test_an_argument_that_names_no_recipe_is_an_error_with_the_usage(arguments, text, small, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        looplab_m(monkeypatch, *arguments)
    assert text in str(caught.value.code)
    assert "usage: python -m looplab MODULE:FUNCTION" in str(caught.value.code)
