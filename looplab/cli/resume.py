"""Going on with a run that ended, by the `config.json` that it left."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from looplab.checkpoint.policy import Checkpoint
from looplab.checkpoint.store import Store
from looplab.cli.arguments import arguments, class_of, from_json, spec_of
from looplab.cli.folder import NOT_ARGUMENTS, RunFolder, as_json, environment, read_config
from looplab.cli.recipe import Recipe, UsageError, defaults, module_name
from looplab.warn import say

_FREE = ("verbose", "plot", "steps_per_execution", "run_eagerly", "checkpoint")  # they change no result


def as_before(recipe: Callable[..., Recipe], folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the run in `folder`, with those of `given` that may be others now.

    Raises:
        UsageError: There is no such run, or `given` contradicts it.
    """
    config = read_config(folder / "config.json")
    name = f"{module_name(recipe)}:{recipe.__name__}"
    whole = type(config.get("epochs")), type(config.get("total_epochs", 0))
    if not config or type(config.get("not_json")) is not list or whole != (int, int):
        raise UsageError(f"`resume` {folder} has no run: there is no config.json that can be read.")
    if config.get("recipe") != name:
        raise UsageError(f"`resume` {folder} has a run of {config.get('recipe')}; {name} cannot go on with it.")
    before = {name: value for name, value in config.items() if name not in NOT_ARGUMENTS}
    own, kinds = defaults(recipe), _kinds(recipe)
    unheld = [  # defaults that stay as they are in the recipe; other values of their type may come back
        name for name in not_json(recipe, own) if as_json(own[name]) == before.get(name) or spec_of(kinds[name]) is None
    ]
    for name, value in [*given.items(), *((name, own[name]) for name in unheld if name not in given)]:
        if name not in config["not_json"]:  # else all there is of it is a text
            _check_as_before(name, as_json(value), before.get(name), folder)
    for name in config["not_json"]:
        if name not in given:
            raise UsageError(f"`resume`: `{name}` was an object, which config.json cannot hold. Pass it again.")
    versions = config["environment"].get("versions") if type(config.get("environment")) is dict else None
    if versions != environment(recipe)["versions"]:
        say(f"looplab: {folder} ran with {versions}: resumed with other versions, its bits will differ.")
    known = inspect.signature(recipe).parameters
    for name in ("epochs", "batch_size"):  # which `run` wrote, where the recipe chose them by itself
        if name not in known:
            before.pop(name, None)
    for name, value in before.items():
        if name in unheld:
            before[name] = own[name]
        if name in unheld or name in config["not_json"]:  # which `given` has
            continue
        kind = kinds.get(name, Any)
        chosen = given.pop(name) if dataclasses.is_dataclass(kind) and isinstance(given.get(name), dict) else {}
        try:
            before[name] = from_json(kind, value | chosen if chosen else value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"`resume`: the config.json in {folder} has a `{name}` of {value}.") from error
    return before | given


def not_json(recipe: Callable[..., Recipe], given: dict[str, Any]) -> list[str]:
    """The names of those arguments that would not come back from `config.json` as they are."""
    kinds = _kinds(recipe)
    return [name for name, value in given.items() if not _comes_back(value, kinds.get(name, Any))]


def _comes_back(value: Any, kind: Any) -> bool:
    class_ = class_of(kind)
    if dataclasses.is_dataclass(value) and type(value) is class_:
        kinds = {field.name: field.type for field in arguments(class_)}
        return all(_comes_back(getattr(value, name), kind) for name, kind in kinds.items())
    if isinstance(value, PurePath) and class_ is str:
        return True  # it was meant as its text
    if isinstance(value, np.generic):
        value = value.item()
    try:
        again = from_json(kind, as_json(value))
    except (TypeError, ValueError):
        return False
    return type(again) is type(value) and _written(again) == _written(value)


def _written(value: Any) -> Any:
    """What two values share that are the same, their types and NaN included."""
    return sorted(map(repr, value)) if isinstance(value, set | frozenset) else repr(value)


def _kinds(recipe: Callable[..., Recipe]) -> dict[str, Any]:
    """The type of each argument."""
    return {argument.name: argument.type for argument in arguments(recipe)} | {"checkpoint": Checkpoint}


def _check_as_before(name: str, now: Any, before: Any, folder: Path) -> None:
    """An argument does not contradict that of the run."""
    if name in _FREE or (name == "log_dir" and Path(now).resolve() == folder.resolve()):
        return
    if name == "log_dir":
        raise UsageError(f"`log_dir` {now} came with `resume` {folder}, which is where the run goes on. Leave it out.")
    if name == "weights":
        raise UsageError("`weights` starts a run afresh, and `resume` goes on with one: give one of them.")
    if name == "epochs" and now >= before:
        return
    if isinstance(now, dict) and isinstance(before, dict):
        for key in now:
            if key != "data_dir":
                _check_as_before(key, now[key], before.get(key), folder)
    elif now != before and repr(now) != repr(before):  # NaN is itself
        raise UsageError(
            f"`{name}` is {now}, and the run in {folder} has {before}. Leave it out to go on; to start afresh from its "
            f"weights, give `weights` and another `log_dir`."
        )


def has_checkpoint(folder: Path) -> bool:
    """Whether the run has any state to go on from."""
    return bool(Store(folder / "checkpoints", Checkpoint()).paths())


def is_finished(ready: Recipe, folder: RunFolder) -> bool:
    """Whether the run did all epochs, and left all that it leaves."""
    before = read_config(folder.path / "config.json")
    source = before["data_source"].get("sha256") if type(before.get("data_source")) is dict else None
    if ready.data is not None and ready.data.sha256 != source:
        raise UsageError(
            f"`resume`: the run in {folder.path} learned from data of SHA-256 {source}, and now it has "
            f"{ready.data.sha256} ({ready.data.source}). Pass the data that it had."
        )
    return ready.epochs <= before.get("total_epochs", before["epochs"]) and folder.is_finished
