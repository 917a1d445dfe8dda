"""For tests: checks that a training resumes to the same bits, and reads event files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab import checks
from looplab.checkpoint.policy import Checkpoint
from looplab.checkpoint.store import Store
from looplab.checkpoint.tree import flatten, same
from looplab.cli.recipe import Recipe
from looplab.paths import local_path

_EACH_STEP = Checkpoint(every=1, keep=10**9)


def assert_resume_exact(build: Callable[..., Recipe], steps: int) -> None:
    """Checks that a training that is interrupted after any of its first `steps` steps resumes to the same bits.

    The training runs once as a whole, and once more from each of these steps, so it should be short.

    Args:
        build: Creates the training, as a recipe function does: it takes `seed`, `log_dir` and `checkpoint` for its
            trainer, and returns a `looplab.Recipe`.
        steps: How many steps to check.

    Raises:
        AssertionError: After one of them, a variable, a value of the history, the state of a callback, or a point in
            the event files differs; the message says which.
        ValueError: The training has fewer steps.
    """
    checks.positive(steps=steps)
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        _train(build, whole, resume=False)
        expected = _outcome(whole)
        checkpoints = {int(path.name.split("-")[1]): path for path in _store(whole).paths()}
        if steps > max(checkpoints):
            raise ValueError(f"`steps` must be at most {max(checkpoints)}, the steps of the training; got {steps}.")
        for step in range(1, steps + 1):
            resumed = Path(temporary) / f"resumed-{step}"
            shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("step-*"))
            shutil.copytree(checkpoints[step], resumed / "checkpoints" / checkpoints[step].name)
            _train(build, resumed, resume=True)
            outcome = _outcome(resumed)
            for name in expected | outcome:
                if not same(expected.get(name), outcome.get(name)):
                    raise AssertionError(f"Resumed after step {step}, {name} differs.")
            shutil.rmtree(resumed)


def read_scalars(folder: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The scalars in the event files of one folder, such as `log_dir/train`, in the order in which they were written.

    Returns:
        By tag, (steps, values): int64 and float32, of the same shape (points,).
    """
    points: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for step, tag, tensor in _values(folder, "scalars"):
        steps, values = points[tag]
        steps.append(step)
        values.append(float(tf.make_ndarray(tensor)))
    return {tag: (np.array(steps), np.array(values, np.float32)) for tag, (steps, values) in points.items()}


def read_images(folder: str | Path) -> dict[str, list[tuple[int, list[bytes]]]]:
    """The images in the event files of one folder: by tag, (step, PNG files) in the order of writing."""
    points: dict[str, list[tuple[int, list[bytes]]]] = defaultdict(list)
    for step, tag, tensor in _values(folder, "images"):
        points[tag].append((step, list(tensor.string_val[2:])))  # after width and height
    return dict(points)


def _values(folder: str | Path, plugin: str) -> Iterator[tuple[int, str, Any]]:
    """(step, tag, tensor) of each point that a plugin shows."""
    # Here, because programs that read no event files would wait for it.
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    plugins: dict[str, str] = {}  # only the first point of a tag must have metadata
    for path in sorted(local_path("folder", folder).glob("events.out.tfevents.*")):
        for event in EventFileLoader(os.fsencode(path)).Load():
            for value in event.summary.value:
                plugins.setdefault(value.tag, value.metadata.plugin_data.plugin_name)
                if plugins[value.tag] == plugin:
                    yield event.step, value.tag, value.tensor


def _train(build: Callable[..., Recipe], folder: Path, resume: bool) -> None:
    keras.utils.clear_session(free_memory=False)  # Keras numbers the layers without a name in a process
    keras.utils.set_random_seed(0)
    recipe = build(seed=0, log_dir=folder, checkpoint=_EACH_STEP)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"`build` must return a `looplab.Recipe`: a trainer and its data; got {type(recipe).__name__}.")
    recipe.fit(verbose=0, resume=resume)


def _store(folder: Path) -> Store:
    return Store(folder / "checkpoints", _EACH_STEP)


def _outcome(folder: Path) -> dict[str, Any]:
    """The result of a training: its variables, its state and its points on TensorBoard, by name."""
    saved = _store(folder).newest()
    assert saved is not None
    snapshot = saved.snapshot
    variables, snapshot.variables, snapshot.files = snapshot.variables, {}, {}  # a resumed run has more files
    outcome = {f"variable {value.name} ({path})": value.value for path, value in variables.items()}
    tree, arrays = flatten(snapshot)
    outcome |= {"the state": tree, **{f"the state's {path}": value for path, value in arrays.items()}}
    for part in ("train", "validation"):
        for tag, (steps, values) in read_scalars(folder / part).items():
            outcome |= {f"a step of {tag} in {part}": steps, f"a value of {tag} in {part}": values}
    return outcome
