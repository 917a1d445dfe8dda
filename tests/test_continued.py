"""`--resume`, and `resume` of `looplab.run`: a run is resumed with the arguments in its folder."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import looplab
from looplab.cli.recipe import UsageError
from looplab.testing import read_scalars

X = np.random.default_rng(0).normal(size=(20, 2)).astype("float32")

LINE = '''
import time
from pathlib import Path
import keras, numpy as np, looplab

class Slow(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        time.sleep(epoch == 0 and self.params["epochs"] > 9)

def build(width: int = 3, epochs: int = 1, **trainer_options) -> looplab.Recipe:
    """Learns a line."""
    model = keras.Sequential([keras.layers.Dense(width, name="hidden"), keras.layers.Dense(1, name="line")])
    x = np.random.default_rng(0).normal(size=(20, 2)).astype("float32")
    trainer = looplab.Trainer(model, optimizer="adam", loss="mse", **trainer_options)
    return looplab.Recipe(trainer, (x, x[:, :1]), epochs=epochs, batch_size=6, callbacks=[Slow()])
'''


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the one layer.

    Args:
        width: how wide
        depth: how deep
    """

    width: int = 3
    depth: int = 1


@dataclasses.dataclass
class Place:
    path: Path | None = None
    seen: int = dataclasses.field(default=0, init=False)


class EndedError(Exception):
    """Ends a run in the middle."""


class EndAt(keras.callbacks.Callback):
    """Ends a run at a step."""

    stateless = True
    step: int | None = None

    def on_train_batch_end(self, batch, logs=None):
        if self.model.steps == EndAt.step:
            raise EndedError


@pytest.fixture(autouse=True)
def _runs_to_its_end():
    EndAt.step = None


def relu(x):
    return keras.ops.relu(x)


def line(
    width: int = 3,
    epochs: int = 1,
    sizes: Sizes = Sizes(),
    activation=relu,
    scales=(1.0, 2.0),
    by_class={0: 1.0, 1: 2.0},  # noqa: B006
    folder: Path = Path("."),
    source: Path | None = None,
    place: Place | None = None,
    kinds=frozenset({"cat", "dog", "cow", "hen"}),
    share: float = float("nan"),
    pair: tuple[int, int] | None = None,
    more: Sizes | None = None,
    notes=None,
    **trainer_options,
):
    """Learns a line, and checks that its arguments keep the types that they were passed with."""
    assert [type(scales), type(by_class[0]), type(sizes)] == [tuple, float, Sizes]
    assert isinstance(folder / "file", Path)
    for value, kind in ((source, Path), (place and place.path, Path), (pair, tuple), (more, Sizes)):
        assert value is None or isinstance(value, kind)
    assert type(kinds) is frozenset
    inner = [keras.layers.Dense(sizes.width, activation, name=f"layer_{index}") for index in range(sizes.depth)]
    model = keras.Sequential([*inner, keras.layers.Dense(width, name="hidden"), keras.layers.Dense(1, name="line")])
    trainer = looplab.Trainer(model, optimizer="adam", loss="mse", **trainer_options)
    return looplab.Recipe(trainer, (X, X[:, :1]), epochs=epochs, batch_size=6, callbacks=[EndAt()])


def ended_at(step, **arguments):
    """A run that ends at that step."""
    EndAt.step = step
    with pytest.raises(EndedError):
        looplab.run(line, verbose=0, **arguments)
    EndAt.step = None


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def assert_same(one, other):
    """Two runs have the same bits."""
    assert (one / "history.json").read_bytes() == (other / "history.json").read_bytes()
    for tag, (steps, values) in read_scalars(one / "train").items():
        np.testing.assert_array_equal(read_scalars(other / "train")[tag][0], steps)
        np.testing.assert_array_equal(read_scalars(other / "train")[tag][1], values)


def test_a_killed_run_is_resumed_from_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "line_recipe.py").write_text(LINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import line_recipe

    flags = ["--width", "5", "--epochs", "12", "--seed", "3", "--log-dir"]
    command = [sys.executable, "-m", "looplab", "line_recipe:build", *flags, "killed", "--checkpoint-every", "3"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("killed/checkpoints/step-*"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "history.json").exists()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    capsys.readouterr()
    looplab.main(line_recipe.build, ["--resume", "killed"])
    watch, resuming, *_, last = capsys.readouterr().out.splitlines()
    done = int(re.fullmatch(r"looplab: resuming at step (\d+) \(epoch \d+\)", resuming)[1]) - 1
    assert watch.startswith("To watch it: tensorboard --logdir . ")
    assert last.startswith(f"looplab: {48 - done} of 48 steps in ")
    timings = json.loads((tmp_path / "killed" / "timings.json").read_text())
    assert (timings["steps"], timings["total_steps"]) == (48 - done, 48)
    assert timings["total_seconds"] >= timings["seconds"]
    looplab.main(line_recipe.build, [*flags, "whole"])
    assert_same(tmp_path / "killed", tmp_path / "whole")
    del sys.modules["line_recipe"]


def test_an_interrupted_recipe_prints_the_command_that_resumes_it(tmp_path):
    (tmp_path / "line_recipe.py").write_text(LINE)
    command = [sys.executable, "-m", "looplab", "line_recipe:build", "--epochs", "12", "--log-dir", "a run"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        while not list(tmp_path.glob("a run/checkpoints/step-*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = [line for line in errors.splitlines() if "To resume" in line]
    match = re.fullmatch(r"looplab: SIGINT: (\d+) steps are saved in .*/a run\. To resume: (.*)", line)
    assert match[2] == f"python -m looplab line_recipe:build --resume '{tmp_path}/a run'"
    before = json.loads((tmp_path / "a run" / "timings.json").read_text())
    assert (before["steps"], before["finished_epochs"]) == (int(match[1]), 0)
    resumed = [sys.executable, *shlex.split(match[2])[1:], "--epochs", "13"]
    done = subprocess.run(resumed, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert f"resuming at step {int(match[1]) + 1} " in done.stdout
    after = json.loads((tmp_path / "a run" / "timings.json").read_text())
    assert (after["total_steps"], after["finished_epochs"]) == (52, 13)
    assert after["total_seconds"] == pytest.approx(before["seconds"] + after["seconds"])


def test_a_finished_run_is_left_as_it_is_unless_it_gets_more_epochs(tmp_path, capsys):
    looplab.run(line, log_dir=tmp_path / "whole", epochs=3, verbose=0)
    looplab.run(line, log_dir=tmp_path / "parts", epochs=1, verbose=0)
    before = files(tmp_path / "parts")
    done = looplab.run(line, resume=tmp_path / "parts", verbose=0)
    assert f"{tmp_path / 'parts'} already has 1 of 1 epochs: left as it is" in capsys.readouterr().out
    assert files(tmp_path / "parts") == before
    saved = looplab.run(line, resume=tmp_path / "parts", epochs=3, verbose=0)
    assert saved.trainer.steps == 12
    assert_same(tmp_path / "parts", tmp_path / "whole")
    assert done.trainer.predict(X, verbose=0).shape == (20, 1)


def test_a_finished_run_that_is_killed_while_it_gets_more_epochs_is_not_finished(tmp_path):
    looplab.run(line, log_dir=tmp_path / "whole", epochs=3, verbose=0)
    looplab.run(line, log_dir=tmp_path / "parts", epochs=1, verbose=0)
    ended_at(6, resume=tmp_path / "parts", epochs=3)
    looplab.run(line, resume=tmp_path / "parts", verbose=0)
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_a_run_that_saved_nothing_starts_again_from_its_weights(tmp_path):
    looplab.run(line, log_dir=tmp_path / "first", seed=7, verbose=0)
    weights = tmp_path / "first" / "model.weights.h5"
    looplab.run(line, log_dir=tmp_path / "whole", weights=weights, verbose=0)
    ended_at(2, log_dir=tmp_path / "parts", weights=weights)
    moved = weights.rename(weights.with_name("moved.weights.h5"))
    with pytest.raises(UsageError, match=r"`weights` must be an existing file .*; got .*model.weights.h5"):
        looplab.run(line, resume=tmp_path / "parts", verbose=0)
    moved.rename(weights)
    looplab.run(line, resume=tmp_path / "parts", verbose=0)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    weights.unlink()  # with a checkpoint, nobody needs it
    looplab.run(line, resume=tmp_path / "parts", epochs=2, verbose=0)


def test_arguments_have_the_types_that_they_had(tmp_path):
    given = {"width": 5, "sizes": Sizes(5, 2), "scales": (3.0,), "folder": tmp_path, "epochs": np.int64(1)}
    given |= {"source": tmp_path / "data", "pair": (1, 2), "share": float("nan"), "by_class": {0: 3.0}}
    given |= {"checkpoint": looplab.Checkpoint(every="2 epochs", monitor="loss")}
    looplab.run(line, log_dir=tmp_path / "run", verbose=0, **given)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["sizes"] == {"width": 5, "depth": 2}
    assert config["epochs"] == 1
    assert config["activation"] == "test_continued:relu"
    assert config["kinds"] == ["cat", "cow", "dog", "hen"]
    assert config["asked"]["pair"] == ["1", "2"]
    assert config["asked"]["sizes.width"] == ["5"]
    saved = looplab.run(line, resume=tmp_path / "run", epochs=2, verbose=0)
    assert saved.trainer.checkpoint == given["checkpoint"]
    assert [layer.name for layer in saved.trainer.model.layers] == ["layer_0", "layer_1", "hidden", "line"]


def small(width: int = 3, layers: tuple[int, ...] = (64, 32), epochs: int = 1, **options):
    """Learns a line."""
    assert isinstance(layers, tuple)
    return line(width=width + len(layers), epochs=epochs, **options)


def test_flags_and_python_resume_each_other(tmp_path):
    def flags(*words):
        looplab.main(small, [*map(str, words), "--verbose", "0"])

    words = "--layers 5 6 7 --width=4 --jit-compile --checkpoint-every 2 --profile-steps 1 2"
    flags("--log-dir", tmp_path / "run", *words.split())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["asked"] == {
        "layers": ["5", "6", "7"],
        "width": ["4"],
        "jit_compile": ["True"],
        "checkpoint.every": ["2"],
        "profile_steps": ["1", "2"],
    }
    assert len(list((tmp_path / "run" / "train" / "plugins" / "profile").glob("*/*.xplane.pb"))) == 1
    assert (config["width"], config["layers"], config["jit_compile"]) == (4, [5, 6, 7], True)
    saved = looplab.run(small, resume=tmp_path / "run", epochs=2, verbose=0)
    assert "profile_steps" not in json.loads((tmp_path / "run" / "config.json").read_text())["asked"]
    assert saved.trainer.steps == 8
    assert saved.trainer.jit_compile
    assert saved.trainer.checkpoint.every == 2
    flags("--resume", tmp_path / "run", "--epochs", 3)
    looplab.run(small, log_dir=tmp_path / "python", width=4, layers=(5, 6, 7), epochs=2, seed=3, verbose=0)
    flags("--resume", tmp_path / "python", "--epochs", 3, "--layers", 5, 6, 7)
    config = json.loads((tmp_path / "python" / "config.json").read_text())
    assert (config["seed"], config["width"], config["epochs"]) == (3, 4, 3)


def test_a_flag_that_the_recipe_no_longer_has_is_named(tmp_path):
    looplab.run(small, log_dir=tmp_path / "run", width=4, verbose=0)
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"asked": {', '"asked": {"size": ["3"],'))
    with pytest.raises(TypeError, match="`Trainer` has no argument `size`"):
        looplab.run(small, resume=tmp_path / "run", epochs=2, verbose=0)


def test_a_set_is_the_same_in_another_process(tmp_path):
    program = "import sys, looplab, test_continued; looplab.run(test_continued.line, **eval(sys.argv[1]), verbose=0)"
    for seed, arguments in (("1", {"log_dir": "run"}), ("2", {"resume": "run", "epochs": 2})):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", program, repr(arguments)]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())["loss"]) == 2


def test_epochs_that_a_recipe_computes_do_not_grow(tmp_path, capsys):
    def warmed(epochs=1, **options):
        return line(epochs=epochs + 1, **options)

    looplab.run(warmed, log_dir=tmp_path / "run", verbose=0)
    assert looplab.run(warmed, resume=tmp_path / "run", verbose=0).epochs == 2
    assert "already has 2 of 2 epochs: left as it is" in capsys.readouterr().out
    assert looplab.run(warmed, resume=tmp_path / "run", epochs=2, verbose=0).trainer.epochs == 3


def test_a_recipe_may_take_the_seed_itself(tmp_path):
    def seeded(seed: int = 0, epochs: int = 1, **options):
        assert seed == 3
        return line(seed=seed, epochs=epochs, **options)

    looplab.main(seeded, ["--seed", "3", "--log-dir", str(tmp_path / "run"), "--verbose", "0"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 3


def test_objects_that_no_flag_can_express_must_be_passed_again(tmp_path):
    def others():  # another process has other objects
        return {
            "activation": lambda x: x,
            "by_class": {0: 3.0, None: 1.0},
            "notes": ((5, 6),),
            "more": Sizes(depth=9),
            "place": Place(tmp_path / "place"),
        }

    looplab.run(line, log_dir=tmp_path / "run", verbose=0, **others())
    for name in others():
        given = {other: value for other, value in others().items() if other != name}
        with pytest.raises(UsageError, match=rf"`{name}` was an object that config.json cannot hold. .* {name}=...\)"):
            looplab.run(line, resume=tmp_path / "run", epochs=2, verbose=0, **given)
    assert looplab.run(line, resume=tmp_path / "run", epochs=2, verbose=0, **others()).trainer.epochs == 2


def test_another_default_that_config_json_cannot_hold_is_refused(tmp_path):
    looplab.run(line, log_dir=tmp_path / "run", verbose=0)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["activation"] = "elsewhere:tanh"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"`activation` is .*:relu, but the run in .* has elsewhere:tanh"):
        looplab.run(line, resume=tmp_path / "run", epochs=2, verbose=0)


def test_what_fit_refuses_leaves_a_finished_run_finished(tmp_path, capsys):
    looplab.run(line, log_dir=tmp_path / "run", verbose=0)
    for path in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        path.write_text("{}")
    before = files(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole"):
        looplab.run(line, resume=tmp_path / "run", epochs=2, verbose=0)
    assert files(tmp_path / "run") == before
    looplab.run(line, resume=tmp_path / "run", log_dir=tmp_path / "run", verbose=0)
    assert "left as it is" in capsys.readouterr().out


def test_a_finished_run_needs_neither_weights_nor_checkpoints(tmp_path, capsys):
    looplab.run(line, log_dir=tmp_path / "first", verbose=0)
    weights = tmp_path / "first" / "model.weights.h5"
    looplab.run(line, log_dir=tmp_path / "run", weights=weights, checkpoint=None, verbose=0)
    weights.unlink()
    looplab.run(line, resume=tmp_path / "run", checkpoint=None, verbose=0)
    assert "left as it is" in capsys.readouterr().out


def test_an_argument_must_not_have_a_name_that_config_json_has_for_itself(tmp_path):
    def named(environment="none", **options):
        return line(**options)

    with pytest.raises(UsageError, match="recipe `named`: `environment` is a reserved argument name; rename it"):
        looplab.run(named, log_dir=tmp_path / "run", verbose=0)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"seed": 5}, "`seed` is 5, but the run in .* has 0"),
        ({"width": 4}, "`width` is 4, but the run in .* has 3"),
        ({"precision": "mixed_bfloat16"}, "`precision` is mixed_bfloat16, but the run in .* has float32"),
        ({"sizes": Sizes(4)}, "`width` is 4, but the run in .* has 3"),
        ({"epochs": 1}, "`epochs` is 1, but the run in .* has 2"),
        ({"jit_compile": True}, "`jit_compile` is True, but the run in .* has None"),
        ({"weights": "some.weights.h5"}, "`weights` is some.weights.h5, but the run in .* has None"),
        ({"log_dir": "elsewhere"}, "`log_dir` elsewhere differs from `resume`"),
    ],
    ids=str,
)
def test_what_contradicts_the_run_is_refused(given, text, tmp_path):
    looplab.run(line, log_dir=tmp_path / "run", epochs=2, verbose=0)
    before = files(tmp_path / "run")
    with pytest.raises(UsageError, match=text):
        looplab.run(line, resume=tmp_path / "run", verbose=0, **given)
    assert files(tmp_path / "run") == before


def test_resuming_without_a_run_of_this_recipe_is_an_error(tmp_path):
    def other(**options):
        return line(**options)

    with pytest.raises(UsageError, match=r"has no run: no config\.json"):
        looplab.run(line, resume=tmp_path / "none", verbose=0)
    looplab.run(line, log_dir=tmp_path / "run", verbose=0)
    with pytest.raises(UsageError, match=r"has a run of .*:line; got the recipe .*:other"):
        looplab.run(other, resume=tmp_path / "run", verbose=0)
