"""The types of a recipe's arguments: from flags, from config.json, or refused by name when the parser is built."""

from __future__ import annotations

import dataclasses
import datetime
import enum
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

import keras
import numpy as np
import pytest

import looplab

if TYPE_CHECKING:
    from nowhere import Recipe

MISSING = object()


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the layers.

    Args:
        depths: how many
    """

    depths: tuple[int, ...] = (1, 2)
    shades: dict[Colour, float] = dataclasses.field(default_factory=dict)


class Own:
    """No flag can give one."""


class Received(Exception):  # noqa: N818
    """What a recipe is called with."""


def received(annotation, default, words):
    """What `x`, annotated and with a default unless they are MISSING, is called with."""

    def recipe(x, **options):
        raise Received(x)

    recipe.__annotations__ = {} if annotation is MISSING else {"x": annotation}
    recipe.__defaults__ = () if default is MISSING else (default,)
    with pytest.raises(Received) as caught:
        looplab.main(recipe, words)
    return caught.value.args[0]


@pytest.mark.parametrize(
    ("annotation", "default", "words", "expected"),
    [
        (list[int], [], "--x 1 2", [1, 2]),
        (list[str], ["a"], "--x", []),
        (tuple[int, ...], (64, 32), "--x 128", (128,)),
        (tuple[int, float], (1, 2.0), "--x 3 4", (3, 4.0)),
        (tuple[str, ...], (), "--x a b", ("a", "b")),
        (set[int], set(), "--x 3 3", {3}),
        (dict[str, float], {}, "--x a 1 b 2.5", {"a": 1.0, "b": 2.5}),
        (dict[str, float], {}, "--x a=1 b=2.5", {"a": 1.0, "b": 2.5}),
        (Sequence[int], (1,), "--x 2 3", (2, 3)),
        (Mapping[str, int], {}, "--x a=2", {"a": 2}),
        (list[Colour], [], "--x RED BLUE", [Colour.RED, Colour.BLUE]),
        (list[int | str], [], "--x 3 same", [3, "same"]),
        (Optional[int], None, "--x 3", 3),  # noqa: UP045
        (int | None, 5, "--x None", None),
        ("int | None", 5, "--x 4", 4),
        (float | str, "auto", "", "auto"),
        (float | str, "auto", "--x 1e-3", 1e-3),
        (float | str, 0.5, "--x auto", "auto"),
        (bool | str, "x", "--x True", True),
        (bool | str, True, "--x soft", "soft"),
        (bool | None, None, "--no-x", False),
        (int | list[int], 3, "--x 4", 4),
        (int | list[int], 3, "--x 4 5", [4, 5]),
        (list[int] | tuple[str, ...], [], "--x 4 a", ("4", "a")),
        (Literal["auto", 1, 2.5, None, True], "auto", "--x 2.5", 2.5),
        (Literal["auto", 1, 2.5, None, True], "auto", "--x None", None),
        (Literal["auto", 1, 2.5, None, True], 1, "--x True", True),
        (Path, Path("a"), "--x b", Path("b")),
        (Colour, Colour.RED, "--x BLUE", Colour.BLUE),
        (datetime.date, datetime.date(2026, 1, 1), "--x 2026-02-03", datetime.date(2026, 2, 3)),
        (Any, (1,), "--x 2", (2,)),
        (tuple, (64, 32), "--x 16", (16,)),
        (tuple | None, (64, 32), "--x 16", (16,)),
        (Sequence[int] | None, (64, 32), "--x None", None),
        (MISSING, (64, 32), "--x 16", (16,)),
        (MISSING, (3, "same"), "--x 5 valid", (5, "valid")),
        (MISSING, ((3, 64), (3, 32)), "--x 1 2", ((1, 2),)),
        (MISSING, {"a": 1}, "--x b=2", {"b": 2}),
        (MISSING, frozenset({1.5}), "--x 2", frozenset({2.0})),
        (MISSING, Colour.RED, "--x BLUE", Colour.BLUE),
        (MISSING, np.float32(0.5), "--x 2", 2.0),
        (MISSING, None, "--x 5", "5"),
        (MISSING, MISSING, "--x 5", "5"),
        (float, 1.0, "--x -1e-3", -1e-3),
        (float, 1.0, "--x -inf", float("-inf")),
        (list[float], [], "--x -.5 -2E+4", [-0.5, -2e4]),
        (dict[str, float], {}, "--x a -1e-3", {"a": -1e-3}),
    ],
)
def test_a_flag_gives_a_value_of_the_type(annotation, default, words, expected):
    value = received(annotation, default, words.split())
    assert (value, type(value)) == (expected, type(expected))
    if isinstance(value, list | tuple | set | frozenset):
        assert [type(part) for part in value] == [type(part) for part in expected]


@pytest.mark.parametrize(
    ("annotation", "default", "name"),
    [
        (Callable, keras.ops.relu, "Callable"),
        (MISSING, keras.ops.relu, "function"),
        (Own, None, "test_arguments.Own"),
        (Own | int, 3, "Own | int"),
        (list[Own], [], "list[test_arguments.Own]"),
        (np.ndarray, None, "numpy.ndarray"),
        (list[list[int]], [], "list[list[int]]"),
        (dict[str, list[int]], {}, "dict[str, list[int]]"),
        ("Unknown", None, "'Unknown', which is not defined at run time"),
        ("list[Unknown]", [], "'list[Unknown]', which is not defined at run time"),
        (list["Unknown"], [], "list['Unknown']"),  # noqa: F821
    ],
)
@pytest.mark.parametrize("words", [[], ["--help"]])
def test_a_type_that_no_flag_can_give_is_refused_by_name(annotation, default, name, words, capsys):
    def recipe(width: int = 1, x=default, **options):
        raise AssertionError("the recipe is not called")

    recipe.__annotations__ |= {} if annotation is MISSING else {"x": annotation}
    with pytest.raises(SystemExit) as caught:
        looplab.main(recipe, words)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert "error: no flag can give `x` a value of type " in error
    assert f"{name}. Annotate it as" in error


@pytest.mark.parametrize(
    ("annotation", "default", "words", "text"),
    [
        (list[int], [], "--x 1 two", "invalid int value: '1 two' (separate values by spaces)"),
        (list[bool], [], "--x yes", "invalid {true,false} value: 'yes'"),
        (dict[str, float], {}, "--x a", "invalid str float value: 'a'"),
        (tuple[int, float], (1, 2.0), "--x 1", "expected 2 arguments"),
        (Literal["auto", 1], 1, "--x 2", "invalid choice: '2' (choose from auto, 1)"),
        (Colour, Colour.RED, "--x r", "invalid choice: 'r' (choose from RED, BLUE)"),
        (float | None, None, "--x none", "invalid float value: 'none'"),
    ],
)
def test_a_value_of_another_type_is_refused(annotation, default, words, text, capsys):
    def recipe(x=default, **options):
        raise AssertionError("the recipe is not called")

    recipe.__annotations__ = {"x": annotation}
    with pytest.raises(SystemExit) as caught:
        looplab.main(recipe, words.split())
    assert caught.value.code == 2
    assert f"error: argument --x: {text}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["_x", "x_", "__x", "größe"])
def test_a_flag_belongs_to_the_argument_whose_name_it_has(name):
    scope: dict[str, Any] = {"Received": Received, "__name__": __name__}
    exec(f"def recipe({name}: int = 1, **options): raise Received({name})", scope)
    with pytest.raises(Received, match="3"):
        looplab.main(scope["recipe"], [f"--{name.replace('_', '-')}", "3"])


@pytest.mark.parametrize(("words", "expected"), [("", 7), ("--seed 0", 0), ("--seed 5", 5)])
def test_the_seed_and_folder_of_a_recipe_are_its_defaults(words, expected, tmp_path, monkeypatch):
    def recipe(seed: int = 7, log_dir: str = "mine/first", **options):
        raise Received(seed, str(log_dir))

    monkeypatch.chdir(tmp_path)
    with pytest.raises(Received) as caught:
        looplab.main(recipe, words.split())
    assert caught.value.args == (expected, "mine/first")


def test_two_flags_of_one_name_are_refused(capsys):
    def recipe(depths: int = 3, sizes: Sizes = Sizes(), **options):
        raise AssertionError("the recipe is not called")

    with pytest.raises(SystemExit):
        looplab.main(recipe, [])
    assert "argument --depths: conflicting option string" in capsys.readouterr().err


def test_a_required_flag_is_named(capsys):
    def recipe(layer_width: int, **options):
        raise AssertionError("the recipe is not called")

    with pytest.raises(SystemExit):
        looplab.main(recipe, [])
    assert "error: the following arguments are required: --layer-width" in capsys.readouterr().err


SEEN: list[dict[str, Any]] = []


def typed(
    width: int,
    layers: tuple[int, ...] = (64, 32),
    bare=(64, 32),
    name=None,
    rate: float | str = "auto",
    kinds: set[int] = frozenset(),  # type: ignore[assignment]
    colour: Colour = Colour.RED,
    level: Level = Level.LOW,
    table: dict[int, float] = {},  # noqa: B006
    pair: tuple[int, float] = (1, 2.0),
    mode: Literal["auto", 1, 2.5, None, True] = "auto",
    limit: int | None = 5,
    since: datetime.date = datetime.date(2026, 1, 1),
    either: list[int] | tuple[str, ...] = (),
    sizes: Sizes = Sizes(),
    epochs: int = 1,
    **options,
) -> Recipe:
    """Learns a line."""
    SEEN.append({name: value for name, value in locals().items() if name not in ("options", "epochs")})
    x = np.ones((6, 2), "float32")
    model = keras.Sequential([keras.layers.Dense(1, name="line")])
    trainer = looplab.Trainer(model, optimizer="sgd", loss="mse", **options)
    return looplab.Recipe(trainer, (x, x[:, :1]), epochs=epochs)


FLAGS = """--width 3 --layers 16 --bare 5 6 --name 5 --rate 0.5 --kinds 3 1 --colour BLUE --level HIGH
--table 1=2 --pair 4 5 --mode True --limit None --since 2026-02-03 --either a b --depths 7 8 --shades RED=0.5"""


@pytest.mark.parametrize("flags", ["--width 3", FLAGS], ids=["defaults", "all"])
def test_a_resumed_run_has_the_values_that_it_had(flags, tmp_path):
    SEEN.clear()
    looplab.main(typed, [*flags.split(), "--verbose", "0", "--log-dir", str(tmp_path / "run")])
    looplab.main(typed, ["--resume", str(tmp_path / "run"), "--verbose", "0", "--epochs", "2"])
    first, resumed = SEEN
    assert repr(resumed) == repr(first)
    assert first["sizes"] == (Sizes((7, 8), {Colour.RED: 0.5}) if flags == FLAGS else Sizes())


def test_flags_that_contradict_a_resumed_run_are_refused(tmp_path, capsys):
    looplab.main(typed, ["--width", "3", "--verbose", "0", "--log-dir", str(tmp_path / "run")])
    looplab.main(typed, ["--resume", str(tmp_path / "run"), "--verbose", "0", "--layers", "64", "32"])
    with pytest.raises(SystemExit):
        looplab.main(typed, ["--resume", str(tmp_path / "run"), "--layers", "64"])
    assert "`layers` is [64], but the run in" in capsys.readouterr().err
