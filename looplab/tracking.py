"""What an object holds through its attributes: models, optimizers, metrics and variables, each by its path."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

_VARIABLES = (keras.Variable, tf.Variable)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.ndarray, np.generic, tf.Tensor, types.ModuleType, type)
_LIBRARIES = ("tensorflow", "keras", "numpy", "tensorboard", "tqdm")
_MOST = 10_000  # members of a container that is searched: what is longer is data
_LEAVES = (keras.Layer, keras.Optimizer, keras.Metric, keras.random.SeedGenerator, *_VARIABLES)


class Held(NamedTuple):
    """A thing with state that an object holds."""

    path: str
    """The attributes that lead to it, and positions in lists, joined by "/"."""
    thing: Any
    """A Keras layer, optimizer, metric, variable or seed generator, or a `tf.Variable`."""
    trainable: bool
    """For a variable: whether gradients may change it, and no layer that holds it is frozen."""
    is_bare: bool = False
    """For a `tf.Variable`: whether it is the trainer's or a Keras layer's own, which Keras would not train."""


def is_trainable(variable: Any) -> bool:
    """Whether gradients may change it: those of whole numbers, as counters are, they cannot."""
    dtype = tf.as_dtype(variable.dtype)
    return bool(variable.trainable) and (dtype.is_floating or dtype.is_complex)


def walk(attributes: dict[str, Any]) -> Iterator[Held]:
    """Each thing with state below `attributes`, once, in the order of the attributes.

    Goes into lists, tuples, dicts, `tf.Module`s, objects of users' classes, and functions (what they close over, and
    the globals that they name). A Keras layer or model is one thing, and Keras knows its inside. Variables among a
    layer's attributes that Keras does not track are found beside it: each `tf.Variable`, and the states of a stateful
    RNN.
    """
    seen: set[int] = set()
    tracked: set[int] = set()  # the variables that Keras sees

    def visit(path: str, value: Any, is_own: bool) -> Iterator[Held]:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, _LEAVES):
            is_variable = isinstance(value, _VARIABLES)
            is_bare = is_own and is_variable and not isinstance(value, keras.Variable)
            yield Held(path, value, is_variable and is_trainable(value), is_bare)
            if isinstance(value, keras.Layer):
                tracked.update(map(id, value.variables))
                for index, layer in enumerate(value._flatten_layers()):
                    yield from unseen_by_keras(f"{path}/{index}", layer, layer)
            return
        is_own = is_own and isinstance(value, (dict, list, tuple))
        for name, inner in _members(value):
            yield from visit(f"{path}/{name}", inner, is_own)

    def unseen_by_keras(path: str, layer: keras.Layer, value: Any) -> Iterator[Held]:
        for name, inner in vars(value).items() if value is layer else _members(value):
            is_container = isinstance(inner, (dict, list, tuple)) and not name.startswith("_self_")
            if id(inner) in seen or id(inner) in tracked or not (is_container or isinstance(inner, _VARIABLES)):
                continue
            seen.add(id(inner))
            if is_container:
                yield from unseen_by_keras(f"{path}/{name}", layer, inner)
            else:
                yield Held(f"{path}/{name}", inner, is_trainable(inner) and layer.trainable, True)

    for name, value in attributes.items():
        yield from visit(name, value, True)


def _members(value: Any) -> list[tuple[str, Any]]:
    """What a container, module, function or object holds, by name; without what can hold nothing."""
    if isinstance(value, (dict, list, tuple)) and len(value) > _MOST:
        return []
    if isinstance(value, dict):
        members = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, (list, tuple)):
        members = [(str(index), inner) for index, inner in enumerate(value)]
    elif isinstance(value, tf.Module):
        members = [(name, inner) for name, inner in vars(value).items() if not name.startswith("_tf_")]
    elif isinstance(value, functools.partial):
        members = [("function", value.func), *_members(value.args), *_members(value.keywords)]
    elif isinstance(value, tf.types.experimental.PolymorphicFunction):
        members = [("function", value.python_function)]
    elif inspect.ismethod(value):
        members = [*_attributes(value.__self__), ("function", value.__func__)]
    elif inspect.isfunction(value):
        members = [] if _is_library(value) else _used(value)
    else:
        members = _attributes(value)
    return [(name, inner) for name, inner in members if not isinstance(inner, _PLAIN)]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """The attributes of an object of a user's class."""
    if isinstance(value, (type, types.ModuleType, Tracked)) or not hasattr(value, "__dict__"):
        return []
    return list(vars(value).items()) if is_users(type(value)) else []


def _used(function: Any) -> list[tuple[str, Any]]:
    """What a function closes over, and the globals that it names."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closed = []
    for name, cell in cells:
        with contextlib.suppress(ValueError):  # it is empty as yet
            closed.append((name, cell.cell_contents))
    used = [(n, function.__globals__[n]) for n in _global_names(function.__code__) if n in function.__globals__]
    return closed + used


@functools.cache
def _global_names(code: types.CodeType) -> list[str]:
    """By the instructions, because `co_names` has the names of attributes too; of inner functions as well."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return sorted(names.union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))))


def is_users(kind: type) -> bool:
    """Whether the objects of a class may hold what is the user's."""
    return kind is types.SimpleNamespace or not _is_library(kind)


def _is_library(value: Any) -> bool:
    """Whether a function or class is of a library that holds no model of the user's."""
    module = getattr(value, "__module__", None) or ""
    root = module.partition(".")[0]
    return root in sys.stdlib_module_names or root in _LIBRARIES or module.rpartition(".")[0] == "looplab"


class Tracked:
    """An object that finds what its attributes hold: it has what a Keras model has, over all its models."""

    @property
    def trainable_variables(self) -> list[Any]:
        """The trainable variables of all models, in the order of the attributes that lead to them."""
        return self._variables(lambda layer: layer.trainable_variables, trainable_alone=True)

    @property
    def weights(self) -> list[Any]:
        """The weights of all models, as `keras.Model.weights`: without seeds, metrics and optimizers."""
        return self._variables(lambda layer: layer.weights)

    @property
    def metrics(self) -> list[keras.Metric]:
        """The metrics among the attributes, and those that layers own."""
        metrics: list[keras.Metric] = []
        for held in self._walk():
            metrics.extend([held.thing] if isinstance(held.thing, keras.Metric) else getattr(held.thing, "metrics", []))
        return _once(metrics)

    @property
    def optimizers(self) -> dict[str, keras.Optimizer]:
        """The optimizers by the path of attributes to them."""
        return {held.path: held.thing for held in self._walk() if isinstance(held.thing, keras.Optimizer)}

    def get_weights(self) -> list[np.ndarray]:
        """The values of `weights`."""
        return [to_numpy(weight) for weight in self.weights]

    def set_weights(self, weights: Sequence[np.ndarray]) -> None:
        """Assigns what `get_weights` returned."""
        if [np.shape(value) for value in weights] != [tuple(weight.shape) for weight in self.weights]:
            raise ValueError(
                f"`weights` must be the {len(self.weights)} arrays that `get_weights` of the same models returns; "
                f"{len(weights)} came, or other shapes."
            )
        for variable, value in zip(self.weights, weights, strict=True):
            variable.assign(value)

    def save_weights(self, filepath: str | Path, overwrite: bool = True) -> None:
        """Writes `weights` to a file whose name ends in `.weights.h5`.

        If they are all those of one Keras model, the file is the one that the model itself would write and load.
        """
        self._saveable("save").save_weights(os.path.expanduser(filepath), overwrite=overwrite)

    def save(self, filepath: str | Path, overwrite: bool = True) -> None:
        """Writes the one Keras model that has all weights to a `.keras` file, as the model itself does."""
        self._one_model("save").save(os.path.expanduser(filepath), overwrite=overwrite)

    def load_weights(self, filepath: str | Path) -> None:
        """Assigns the weights that `save_weights` wrote, of the same models, which must be built."""
        model = self._saveable("load")
        try:
            model.load_weights(os.path.expanduser(filepath))
        except FileNotFoundError:
            raise
        except Exception as error:  # HDF5, zip and Keras raise a dozen kinds for files that are something else
            raise ValueError(f"`filepath` {filepath} has no weights that fit these models: {error}") from error

    def export(self, filepath: str | Path, **options: Any) -> None:
        """Writes the one Keras model that has all weights as a SavedModel for inference, as `keras.Model.export`."""
        self._one_model("export").export(os.path.expanduser(filepath), **options)

    def summary(self, **options: Any) -> None:
        """Prints `keras.Model.summary` of each Keras model: with output shapes of subclassed ones too, once built."""
        for held in self._walk():
            if isinstance(held.thing, keras.Model) and held.thing.layers:
                _tell_output_shapes(held.thing)
                held.thing.summary(**options)

    def _walk(self) -> Iterator[Held]:
        """What the attributes lead to, and what the methods of subclasses use."""
        methods: dict[str, Any] = {}
        for kind in type(self).__mro__:
            if not _is_library(kind):
                own = {n: getattr(m, "python_function", m) for n, m in vars(kind).items()}
                methods = {n: m for n, m in own.items() if inspect.isfunction(m)} | methods
        return walk(vars(self) | {name: method for name, method in methods.items() if name not in vars(self)})

    def _all_state(self) -> dict[str, Any]:
        """All variables, by the path to what holds them and their position there: plain names may collide."""
        by_path: dict[str, Any] = {}
        for held in self._walk():
            if isinstance(held.thing, keras.random.SeedGenerator):
                by_path[held.path] = held.thing.state
            elif isinstance(held.thing, _VARIABLES):
                by_path[held.path] = held.thing
            else:
                owned = [metric.variables for metric in getattr(held.thing, "metrics", ())]
                variables = itertools.chain(held.thing.variables, *owned)
                by_path |= {f"{held.path}/{index}": variable for index, variable in enumerate(variables)}
        seen = {id(v.value if isinstance(v, keras.Variable) else v) for v in by_path.values()}
        for kind, found in (("stray", self._strays()), ("read", self._only_read())):
            unseen = (variable for variable in found if id(variable) not in seen)
            by_path |= {f"{kind}/{index}": variable for index, variable in enumerate(unseen)}
        first = {id(variable): path for path, variable in reversed(by_path.items())}
        once = {path: variable for path, variable in by_path.items() if first[id(variable)] == path}
        return {
            path + suffix: part for path, variable in once.items() for suffix, part in of_each_replica(variable).items()
        }

    def _strays(self) -> list[tf.Variable]:
        """Variables with state that no attribute leads to."""
        return []

    def _only_read(self) -> list[tf.Variable]:
        """Variables that no attribute leads to and no step changes, but a callback may."""
        return []

    def _state(self) -> list[Any]:
        """All variables but those of optimizers: weights, seeds, metrics, and strays."""
        return _once(self._held_state() + self._strays())

    def _held_state(self) -> list[Any]:
        """Those of them that attributes lead to."""
        variables = self._variables(lambda layer: layer.variables)
        variables += [held.thing.state for held in self._walk() if isinstance(held.thing, keras.random.SeedGenerator)]
        variables += [variable for metric in self.metrics for variable in metric.variables]
        return variables

    def _variables(self, of_layer: Callable[[keras.Layer], list], trainable_alone: bool = False) -> list[Any]:
        variables = []
        for held in self._walk():
            if isinstance(held.thing, keras.Layer):
                variables.extend(of_layer(held.thing))
            elif isinstance(held.thing, _VARIABLES) and (held.trainable or not trainable_alone):
                variables.append(held.thing)
        return _once(variables)

    def _one_model(self, action: str) -> keras.Model:
        model = self._saveable(action)
        if isinstance(model, _Holder):
            raise ValueError(
                f"`{action}` is for a trainer of one Keras model: `save_weights` saves all that this one holds."
            )
        return model

    def _saveable(self, action: str) -> keras.Model:
        """The one Keras model that has all weights, or a model that holds all that have some."""
        holders = [h for h in self._walk() if getattr(h.thing, "weights", None) or isinstance(h.thing, _VARIABLES)]
        if not holders:
            raise ValueError(f"There are no weights to {action} yet: call `build` with the data first.")
        alone = len(holders) == 1 and isinstance(holders[0].thing, keras.Model)
        return holders[0].thing if alone else _Holder(holders)


class _Holder(keras.Model):
    """Layers and variables under the paths that lead to them, so that Keras saves them as one model."""

    def __init__(self, holders: Iterable[Held]):
        super().__init__(name="trainer")
        self._free: dict[str, Any] = {}
        for held in holders:
            name = "held." + held.path.replace("/", ".")  # apart from what a Keras model itself has
            if isinstance(held.thing, keras.Layer):
                setattr(self, name, held.thing)
            else:
                self._free[name] = held.thing
        self.built = True

    def save_own_variables(self, store):
        for path, variable in self._free.items():
            store[path] = to_numpy(variable)

    def load_own_variables(self, store):
        for path, variable in self._free.items():
            variable.assign(store[path])


def of_each_replica(variable: Any) -> dict[str, Any]:
    """The variables of all replicas, where each may have its own value: the mean of moving means is none of them."""
    inner = variable.value if isinstance(variable, keras.Variable) else variable
    if not isinstance(inner, tf.distribute.DistributedValues) or inner.trainable:
        return {"": variable}
    return {f"/replica-{index}": part for index, part in enumerate(inner.values)}


def _tell_output_shapes(model: keras.Model) -> None:
    """Calls a subclassed model's `call` on a symbolic input, from which Keras's summary knows its layers' outputs.

    Where `call` does what only real tensors can, the summary has a "?" instead.
    """
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None or hasattr(model, "inputs"):  # not built, or not subclassed
        return
    with contextlib.suppress(Exception):
        model.call(keras.tree.map_shape_structure(lambda shape: keras.Input(shape[1:]), shapes))


def plain(variable: Any) -> Any:
    """The TensorFlow variable that a Keras variable is; anything else as it is."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def rate_of(optimizer: keras.Optimizer) -> Any:
    """The learning rate of an optimizer as it holds it: a variable, a schedule, or a function."""
    return getattr(optimizer, "inner_optimizer", optimizer)._learning_rate


def trained_by(optimizer: keras.Optimizer) -> list[Any]:
    """The variables that an optimizer was built for."""
    return optimizer._trainable_variables


def path_of(variable: Any) -> str:
    """What people call a variable: Keras's path, which is unique in a model, or TensorFlow's name."""
    return getattr(variable, "path", variable.name)


def to_numpy(variable: Any) -> np.ndarray:
    """A copy of the value of a Keras or TensorFlow variable."""
    return np.array(tf.convert_to_tensor(variable).numpy())


def _once(things: Iterable[Any]) -> list[Any]:
    return list({id(thing): thing for thing in things}.values())
