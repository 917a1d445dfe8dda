"""`--resume`, and `resume` of `looplab.run`: a run goes on by what its folder tells."""

import dataclasses
import json
import os
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
        time.sleep(self.params["epochs"] > 9)

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
    """What ends a run in the midst of it."""


class EndAt(keras.callbacks.Callback):
    """Ends a run at a step."""

    stateless = True
    step: int | None = None

    def on_train_batch_end(self, batch, logs=None):
        if self.model.steps == EndAt.step:
            raise EndedError


@pytest.fixture(autouse=True)
def _goes_to_its_end():
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
    """Learns a line, and holds that its arguments have the types that they were given with."""
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
    """Two runs came to the same bits."""
    assert (one / "history.json").read_bytes() == (other / "history.json").read_bytes()
    for tag, (steps, values) in read_scalars(one / "train").items():
        np.testing.assert_array_equal(read_scalars(other / "train")[tag][0], steps)
        np.testing.assert_array_equal(read_scalars(other / "train")[tag][1], values)


def test_a_killed_run_goes_on_from_the_command_line(tmp_path, monkeypatch):
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
    looplab.main(line_recipe.build, ["--resume", "killed"])
    looplab.main(line_recipe.build, [*flags, "whole"])
    assert_same(tmp_path / "killed", tmp_path / "whole")
    del sys.modules["line_recipe"]


def test_a_finished_run_is_left_as_it_is_and_more_epochs_go_on(tmp_path, capsys):
    looplab.run(line, log_dir=tmp_path / "whole", epochs=3, verbose=0)
    looplab.run(line, log_dir=tmp_path / "parts", epochs=1, verbose=0)
    before = files(tmp_path / "parts")
    done = looplab.run(line, resume=tmp_path / "parts", verbose=0)
    assert f"the 1 epochs of {tmp_path / 'parts'} are done: it is left as it is" in capsys.readouterr().out
    assert files(tmp_path / "parts") == before
    saved = looplab.run(line, resume=tmp_path / "parts", epochs=3, verbose=0)
    assert saved.trainer.steps == 12
    assert_same(tmp_path / "parts", tmp_path / "whole")
    assert done.trainer.predict(X, verbose=0).shape == (20, 1)


def test_a_finished_run_that_was_ended_while_it_went_on_is_not_finished(tmp_path):
    looplab.run(line, log_dir=tmp_path / "whole", epochs=3, verbose=0)
    looplab.run(line, log_dir=tmp_path / "parts", epochs=1, verbose=0)
    ended_at(6, resume=tmp_path / "parts", epochs=3)
    looplab.run(line, resume=tmp_path / "parts", verbose=0)
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_a_run_that_saved_nothing_begins_again_from_its_weights(tmp_path):
    looplab.run(line, log_dir=tmp_path / "first", seed=7, verbose=0)
    weights = tmp_path / "first" / "model.weights.h5"
    looplab.run(line, log_dir=tmp_path / "whole", weights=weights, verbose=0)
    ended_at(2, log_dir=tmp_path / "parts", weights=weights)
    moved = weights.rename(weights.with_name("moved.weights.h5"))
    with pytest.raises(UsageError, match=r"`weights` .*model.weights.h5 is none"):
        looplab.run(line, resume=tmp_path / "parts", verbose=0)
    moved.rename(weights)
    looplab.run(line, resume=tmp_path / "parts", verbose=0)
    assert_same(tmp_path / "parts", tmp_path / "whole")
    weights.unlink()  # with a checkpoint, nobody needs it
    looplab.run(line, resume=tmp_path / "parts", epochs=2, verbose=0)


def test_arguments_come_back_with_the_types_that_they_had(tmp_path):
    given = {"sizes": Sizes(5, 2), "scales": (3.0,), "folder": tmp_path, "epochs": np.int64(1)}
    given |= {"source": tmp_path / "data", "pair": (1, 2), "more": Sizes(depth=9)}
    given |= {"place": Place(tmp_path / "place"), "share": float("nan"), "by_class": {0: 3.0}}
    looplab.run(line, log_dir=tmp_path / "run", verbose=0, **given)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["sizes"] == {"width": 5, "depth": 2}
    assert config["epochs"] == 1
    saved = looplab.run(line, resume=tmp_path / "run", epochs=2, verbose=0)
    assert [layer.name for layer in saved.trainer.model.layers] == ["layer_0", "layer_1", "hidden", "line"]


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
    assert "the 2 epochs of" in capsys.readouterr().out
    assert looplab.run(warmed, resume=tmp_path / "run", epochs=2, verbose=0).trainer.epochs == 3


def test_a_recipe_may_take_the_seed_itself(tmp_path):
    def seeded(seed: int = 0, epochs: int = 1, **options):
        assert seed == 3
        return line(seed=seed, epochs=epochs, **options)

    looplab.main(seeded, ["--seed", "3", "--log-dir", str(tmp_path / "run"), "--verbose", "0"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 3


def test_what_config_json_cannot_hold_is_asked_for(tmp_path):
    def others():  # another process has other objects
        return {"activation": lambda x: x, "by_class": {0: 3.0, None: 1.0}, "notes": ((5, 6),)}

    looplab.run(line, log_dir=tmp_path / "run", verbose=0, **others())
    for name in others():
        given = {other: value for other, value in others().items() if other != name}
        with pytest.raises(UsageError, match=f"`{name}` was an object, which config.json cannot hold. Pass it again"):
            looplab.run(line, resume=tmp_path / "run", epochs=2, verbose=0, **given)
    assert looplab.run(line, resume=tmp_path / "run", epochs=2, verbose=0, **others()).trainer.epochs == 2


def test_another_default_that_config_json_cannot_hold_is_refused(tmp_path):
    looplab.run(line, log_dir=tmp_path / "run", verbose=0)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["activation"] = "elsewhere:tanh"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"`activation` is .*:relu, and the run in .* has elsewhere:tanh"):
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
    assert "it is left as it is" in capsys.readouterr().out


def test_a_finished_run_needs_neither_weights_nor_checkpoints(tmp_path, capsys):
    looplab.run(line, log_dir=tmp_path / "first", verbose=0)
    weights = tmp_path / "first" / "model.weights.h5"
    looplab.run(line, log_dir=tmp_path / "run", weights=weights, checkpoint=None, verbose=0)
    weights.unlink()
    looplab.run(line, resume=tmp_path / "run", verbose=0)
    assert "it is left as it is" in capsys.readouterr().out


def test_an_argument_must_not_have_a_name_that_config_json_has_for_itself(tmp_path):
    def named(environment="none", **options):
        return line(**options)

    with pytest.raises(UsageError, match="recipe `named`: call its argument `environment` otherwise"):
        looplab.run(named, log_dir=tmp_path / "run", verbose=0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"seed": 5}, "`seed` is 5, and the run in .* has 0"),
        ({"width": 4}, "`width` is 4, and the run in .* has 3"),
        ({"precision": "mixed_bfloat16"}, "`precision` is mixed_bfloat16, and the run in .* has float32"),
        ({"sizes": Sizes(4)}, "`width` is 4, and the run in .* has 3"),
        ({"epochs": 1}, "`epochs` is 1, and the run in .* has 2"),
        ({"jit_compile": True}, "`jit_compile` is True, and the run in .* has None"),
        ({"weights": "some.weights.h5"}, "`weights` starts a run afresh, and `resume` goes on with one"),
        ({"log_dir": "elsewhere"}, "`log_dir` elsewhere came with `resume`"),
    ],
    ids=str,
)
def test_what_contradicts_the_run_is_refused(given, told, tmp_path):
    looplab.run(line, log_dir=tmp_path / "run", epochs=2, verbose=0)
    before = files(tmp_path / "run")
    with pytest.raises(UsageError, match=told):
        looplab.run(line, resume=tmp_path / "run", verbose=0, **given)
    assert files(tmp_path / "run") == before


def test_where_there_is_no_run_of_this_recipe_it_is_told(tmp_path):
    def other(**options):
        return line(**options)

    with pytest.raises(UsageError, match=r"has no run: there is no config\.json"):
        looplab.run(line, resume=tmp_path / "none", verbose=0)
    looplab.run(line, log_dir=tmp_path / "run", verbose=0)
    with pytest.raises(UsageError, match=r"has a run of .*:line; .*:other cannot go on with it"):
        looplab.run(other, resume=tmp_path / "run", verbose=0)
