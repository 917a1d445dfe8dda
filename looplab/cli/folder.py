"""The folder of a run: all that a run leaves there beside its event files."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab.callbacks import write_png
from looplab.cli import report
from looplab.data.named import Arrays

NOT_ARGUMENTS = (  # in `config.json`
    *("recipe", "optimizers", "log_dir", "data_source", "environment", "not_json", "total_epochs"),
)
_LAST = "timings.json"  # that a run writes
RUN_FILES = ("config.json", "history.json", _LAST, "model.weights.h5", "report.txt", "report.json")


class RunFolder:
    """Writes what a run was asked for, what it did and how that looks.

    Args:
        path: The folder; by default a new one, `logs/<name>/<time>`.
        name: That of the recipe's module.
    """

    def __init__(self, path: str | Path | None, name: str):
        self.path = Path(path) if path is not None else _new_folder(Path("logs") / name)

    def write_config(self, config: dict[str, Any], recipe: Callable, data: Arrays | None) -> None:
        """`config.json`: all arguments, the data, and what else decides a run's bits. The run is unfinished then."""
        (self.path / _LAST).unlink(missing_ok=True)
        told = config | {"log_dir": self.path, "data_source": _described(data), "environment": environment(recipe)}
        _write_json(self.path / "config.json", told)

    def write_history(self, history: dict[str, list[float]], began: float, steps: int) -> float:
        """`history.json`, what the training alone decides, and `timings.json`, what the clock does; the seconds."""
        seconds = time.time() - began
        _write_json(self.path / "history.json", history)
        timings = {"began": datetime.fromtimestamp(began), "seconds": seconds, "steps": steps}
        _write_json(self.path / _LAST, timings)
        return seconds

    @property
    def is_finished(self) -> bool:
        """Whether the run has left all that it leaves."""
        return (self.path / _LAST).exists()

    def write_report(self, labels: np.ndarray, probabilities: np.ndarray, classes: tuple[str, ...]) -> report.Report:
        """`report.txt` and `report.json`: how well the classes of test images were told."""
        made = report.classification(labels, probabilities, classes)
        (self.path / "report.txt").write_text(made.text + "\n", "utf-8")
        _write_json(self.path / "report.json", made.figures)
        return made

    def write_picture(self, name: str, picture: np.ndarray) -> np.ndarray:
        """A uint8 picture as `<name>.png`, and returns it."""
        write_png(self.path / f"{name}.png", picture)
        return picture


def read_config(beside: Path) -> dict[str, Any]:
    """The `config.json` in the same folder as this file, or an empty one where there is none."""
    try:
        config = json.loads((beside.parent / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _new_folder(parent: Path) -> Path:
    name = time.strftime("%Y%m%d-%H%M%S")
    names = [name, *(f"{name}-{number}" for number in range(2, 100))]
    return next(parent / name for name in names if not (parent / name).exists())


def environment(recipe: Callable) -> dict[str, Any]:
    """What else decides a run's bits: versions, code, devices, threads."""
    folder = Path(inspect.getfile(recipe)).parent
    try:
        command = ["git", "-C", str(folder), "rev-parse", "--verify", "HEAD"]
        revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        revision = None
    versions = {"python": platform.python_version(), "tensorflow": tf.__version__, "keras": keras.__version__}
    try:
        versions["looplab"] = metadata.version("looplab")
    except metadata.PackageNotFoundError:  # it runs from a folder, not installed
        versions["looplab"] = "not installed"
    return {
        "versions": versions | {"numpy": np.__version__},
        "git_revision": revision,
        "devices": [device.name for device in tf.config.list_physical_devices()],
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
    }


def _described(data: Arrays | None) -> dict[str, Any] | None:
    if data is None:
        return None
    parts = {"training": data.x_train, "validation": data.x_validation, "test": data.x_test}
    sizes = {f"{part}_examples": len(images) for part, images in parts.items()}
    return {name: getattr(data, name) for name in ("name", "source", "sha256", "fallback")} | sizes


def as_json(value: Any) -> Any:
    """A value as it comes back from a JSON file."""
    return json.loads(json.dumps(_plain(value)))


def _write_json(path: Path, value: Any) -> None:
    """Floats are written so that they read back to the same bits; whoever looks finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.unfinished")
    with open(written, "w") as file:
        file.write(json.dumps(_plain(value), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(written, path)


def _plain(value: Any) -> Any:
    """A value in the types that JSON has, in words that are the same in another process."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(_plain(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(str(_plain(part)) for part in value)
    if hasattr(value, "__qualname__"):  # a class or a function
        return f"{value.__module__}:{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
