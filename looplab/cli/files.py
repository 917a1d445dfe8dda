"""The files of a run, apart from those of its trainer: how they are written, read, and compared with a resumed run."""

from __future__ import annotations

import inspect
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import msgspec
import numpy as np
import tensorflow as tf

import looplab
from looplab.checkpoint.files import sync
from looplab.cli.flags import IN_CONFIG, PROCESS, Words
from looplab.cli.recipe import Recipe, UsageError, full_name
from looplab.data.named import Arrays
from looplab.warn import say

CONFIG, HISTORY, TIMINGS, WEIGHTS = "config.json", "history.json", "timings.json", "model.weights.h5"
RUN_FILES = (CONFIG, HISTORY, TIMINGS, WEIGHTS, "report.txt", "report.json")
_NOT_ARGUMENTS = (*IN_CONFIG, "log_dir")
_CHANGES_NO_RESULT = ("steps_per_execution", "run_eagerly", "checkpoint", "data_dir", "profile_steps")


class _Config(msgspec.Struct):
    """What `config.json` must have, so that a run can be resumed."""

    recipe: str
    asked: Words
    environment: dict[str, Any]
    data_source: dict[str, Any] | None


def read_config(recipe: Callable[..., Recipe], folder: Path, may_start: bool) -> dict[str, Any] | None:
    """The `config.json` of a run to resume; None if there is no run, and it may start.

    Raises:
        UsageError: There is none, or it is of another recipe.
    """
    if may_start and not (folder / CONFIG).exists():
        return None
    config = read_json(folder / CONFIG)
    try:
        msgspec.convert(config, _Config)
    except msgspec.ValidationError as error:
        raise UsageError(f"`resume` {folder} has no run: no config.json, or a damaged one ({error}).") from error
    if config["recipe"] != full_name(recipe):
        raise UsageError(f"`resume` {folder} has a run of {config['recipe']}; got the recipe {full_name(recipe)}.")
    config["asked"] = {name: words for name, words in config["asked"].items() if name not in PROCESS}
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The values in a JSON file; empty if there is none that can be read."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes values to a JSON file, whole or not at all; floats read back to the same bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(f"{json.dumps({name: _readable(value) for name, value in values.items()}, indent=1)}\n")
    sync(unfinished)
    unfinished.rename(path)


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> None:
    """Checks that a run is resumed with the arguments and data that it had; prints a line if versions differ.

    Args:
        before: What `config.json` says.
        now: What it will say.
        given: The arguments that are not the recipe's defaults.
        folder: That of the run.

    Raises:
        UsageError: Something differs. Only `epochs` may be larger, and some arguments change no result.
    """
    objects = [name for name, words in before["asked"].items() if words is None]  # `before` has only a text of each
    for name, value in now.items():
        if (name in before or name in given) and name not in (*_NOT_ARGUMENTS, *objects):
            _check_same(name, _readable(value), before.get(name), folder)
    old, new = (config["data_source"] or {} for config in (before, now))
    if old.get("sha256") != new.get("sha256"):
        raise UsageError(
            f"`resume`: the run in {folder} has data of SHA-256 {old.get('sha256')}; got {new.get('sha256')} "
            f"({new.get('source')}). Pass the data that it had."
        )
    if (old := before["environment"].get("versions")) != now["environment"]["versions"]:
        say(f"looplab: {folder} ran with {old}: resumed with other versions, its bits will differ.")


def _check_same(name: str, now: Any, before: Any, folder: Path) -> None:
    is_larger = name == "epochs" and isinstance(before, int) and isinstance(now, int) and now >= before
    is_same = now == before or repr(now) == repr(before)  # NaN equals itself only as text
    if is_same or is_larger or name in _CHANGES_NO_RESULT:
        return
    if not (isinstance(now, dict) and isinstance(before, dict)):
        raise UsageError(
            f"`{name}` is {now}, but the run in {folder} has {before}. To resume it, pass {before}; to start a "
            f"new run from its weights, pass `weights` and another `log_dir`."
        )
    for key in now:
        _check_same(key, now[key], before.get(key), folder)


def _readable(value: Any) -> Any:
    """A value as it reads back from JSON; what JSON does not have becomes text that is the same in another process."""
    try:
        return json.loads(json.dumps(msgspec.to_builtins(value, str_keys=True, order="deterministic", enc_hook=_text)))
    except (TypeError, ValueError):  # such as keys of a dict that cannot become text
        return _text(value)


def _text(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "__qualname__"):  # a class or a function
        return f"{value.__module__}:{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def environment(recipe: Callable) -> dict[str, Any]:
    """What decides a run's bits apart from its arguments and data: versions, code, devices, threads."""
    versions = {package.__name__: package.__version__ for package in (looplab, tf, keras, np)}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "git_revision": _revision(Path(inspect.getfile(recipe))),
        "devices": [device.name for device in tf.config.list_physical_devices()],
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
    }


def _revision(file: Path) -> str | None:
    """The commit of the checkout that has a file; None if there is none, such as for an installed file."""
    command = ["git", "-C", str(file.parent), "rev-parse", "HEAD", f"HEAD:./{file.name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # there is no git, or the commit does not have the file
        return None
    return done.stdout.split()[0]


def source_of(data: Arrays | None) -> dict[str, Any] | None:
    """Where a dataset is from, its checksum and its size."""
    if data is None:
        return None
    parts = {"training": data.x_train, "validation": data.x_validation, "test": data.x_test}
    sizes = {f"{part}_examples": len(images) for part, images in parts.items()}
    return {name: getattr(data, name) for name in ("name", "source", "sha256", "fallback")} | sizes
