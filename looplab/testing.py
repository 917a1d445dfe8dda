"""For tests: whether a training resumes to the same bits, and a reader of event files."""

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
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from looplab import checks
from looplab.checkpoint import Checkpoint, Checkpoints
from looplab.paths import local_path
from looplab.recipe import Recipe
from looplab.tree import flatten

_EACH_STEP = Checkpoint(every=1, keep=10**9)


def assert_resume_exact(build: Callable[..., Recipe], steps: int) -> None:
    """Checks that a training that ends after any of its first `steps` steps goes on to the same bits.

    It is trained once as a whole, and once more from each of these steps; so let it be a short one.

    Args:
        build: Makes the training anew, as a recipe function does: it takes `seed`, `log_dir` and `checkpoint`, for its
            trainer, and returns a `looplab.Recipe`.
        steps: How many.

    Raises:
        AssertionError: After one of them, a variable, a value of the history, the state of a callback, or a point in
            the event files came out otherwise; it tells which.
        ValueError: The training has fewer steps.
    """
    checks.positive(steps=steps)
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        _train(build, whole, resume=False)
        expected = _outcome(whole)
        checkpoints = {int(path.name.split("-")[1]): path for path in _checkpoints(whole).paths()}
        for step in range(1, steps + 1):
            if step not in checkpoints:
                raise ValueError(f"`steps` is {steps}, and the training has {max(checkpoints)}.")
            resumed = Path(temporary) / f"resumed-{step}"
            shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("step-*"))
            shutil.copytree(checkpoints[step], resumed / "checkpoints" / checkpoints[step].name)
            _train(build, resumed, resume=True)
            outcome = _outcome(resumed)
            for what in [*expected, *outcome]:
                if not _equal(expected.get(what), outcome.get(what)):
                    raise AssertionError(f"Resumed after step {step}, {what} came out otherwise.")
            shutil.rmtree(resumed)


def read_scalars(folder: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The scalars in the event files of one folder, such as `log_dir/train`, in the order of writing.

    Returns:
        By tag, (steps, values): int64 and float32, of the same shape (points,).
    """
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for step, tag, tensor in _values(folder, "scalars"):
        points[tag].append((step, float(tf.make_ndarray(tensor))))
    return {
        tag: (np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], np.float32))
        for tag, pairs in points.items()
    }


def read_images(folder: str | Path) -> dict[str, list[tuple[int, list[bytes]]]]:
    """The images likewise: by tag, (step, PNG files) in the order of writing."""
    points: dict[str, list[tuple[int, list[bytes]]]] = defaultdict(list)
    for step, tag, tensor in _values(folder, "images"):
        points[tag].append((step, list(tensor.string_val[2:])))  # after width and height
    return dict(points)


def _values(folder, plugin):
    plugins: dict[str, str] = {}  # TensorBoard asks for metadata with the first point of a tag alone
    for path in sorted(local_path("folder", folder).glob("events.out.tfevents.*")):
        for event in EventFileLoader(os.fsencode(path)).Load():
            for value in event.summary.value:
                plugins.setdefault(value.tag, value.metadata.plugin_data.plugin_name)
                if plugins[value.tag] == plugin:
                    yield event.step, value.tag, value.tensor


def _train(build: Callable[..., Recipe], folder: Path, resume: bool) -> None:
    keras.utils.clear_session(free_memory=False)  # layers without a name are counted through a process
    keras.utils.set_random_seed(0)
    recipe = build(seed=0, log_dir=folder, checkpoint=_EACH_STEP)
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"`build` must return a `looplab.Recipe`: a trainer and its data; {type(recipe).__name__} came."
        )
    recipe.fit(verbose=0, resume=resume)


def _checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", _EACH_STEP)


def _outcome(folder: Path) -> dict[str, Any]:
    """Numbers by what they are, of all that a training comes to."""
    saved, _ = _checkpoints(folder).newest()
    assert saved is not None
    state = saved.load(2**40)
    del state["events"]  # how long the files are, of which there are more
    variables = state.pop("variables")
    told = {f"variable {value['name']} ({path})": value["value"] for path, value in variables.items()}
    told |= {f"the state's {name}": value for name, value in _leaves(state)}
    for part in ("train", "validation"):
        for tag, points in read_scalars(folder / part).items():
            told[f"a step of {tag} in {part}"], told[f"a value of {tag} in {part}"] = points
    return told


def _leaves(state: Any) -> Iterator[tuple[str, Any]]:
    tree, arrays = flatten(state)
    yield "numbers", tree
    yield from arrays.items()


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return repr(one) == repr(other)  # NaN is equal to itself so
