"""The variables, metrics and optimizers of a trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from looplab.compat import all_layers
from looplab.walk import OURS, VARIABLES, Held, marks, methods_of, walk
from looplab.workers import rank_of


class Variables:
    """The stateful objects of a trainer.

    They are found through its attributes and through what the methods of its class use; and while steps are traced,
    through what the steps use.

    Args:
        owner: The trainer.
        roots: What to search in addition, by name.
    """

    def __init__(self, owner: Any, roots: dict[str, Any]):
        self._owner = owner
        self._roots = roots
        self._adopted: dict[str, list[Any]] = {"variables": [], "metrics": [], "optimizers": []}
        self._strays: dict[str, list[tf.Variable]] = {}  # by kind of step
        self._only_read: list[tf.Variable] = []  # by a training step, and nothing leads to them

    def walk(self) -> Iterator[Held]:
        """Each stateful object, once."""
        first = {"optimizer": None, "model": None}  # a compiled model has the same optimizer
        return walk({**first, **self._roots, "adopted": self._adopted} | self._searched())

    def marks(self) -> list[Any]:
        """What shows in little time that `walk` finds the same as before: see `walk.marks`."""
        return marks(self._searched())

    def _searched(self) -> dict[str, Any]:
        """The attributes and methods of the owner, by name."""
        own = {name: value for name, value in vars(self._owner).items() if name != OURS}
        return own | {name: method for name, method in methods_of(self._owner).items() if name not in own}

    def trainable(self) -> list[Any]:
        """The trainable variables of all models, in the order of the attributes."""
        return self._of_models("trainable_variables")

    def not_trainable(self) -> list[Any]:
        """The other variables of the models: seeds, and weights that are frozen or that gradients do not change."""
        trainable = {id(variable) for variable in self.trainable()}
        return [variable for variable in self._of_models("variables") if id(variable) not in trainable]

    def weights(self) -> list[Any]:
        """The weights of all models, without seeds, metrics and optimizers."""
        return self._of_models("weights")

    def metrics(self) -> list[keras.Metric]:
        """The metrics, including those that layers own."""
        found: list[keras.Metric] = []
        for held in self.walk():
            found += [held.thing] if isinstance(held.thing, keras.Metric) else getattr(held.thing, "metrics", [])
        return _once(found)

    def layers(self) -> list[keras.Layer]:
        """All layers, at any depth."""
        held = (held.thing for held in self.walk())
        return _once(layer for thing in held if isinstance(thing, keras.Layer) for layer in all_layers(thing))

    def optimizers(self) -> dict[str, keras.Optimizer]:
        """The optimizers by path."""
        return {held.path: held.thing for held in self.walk() if isinstance(held.thing, keras.Optimizer)}

    def held(self) -> list[Any]:
        """All variables but those of optimizers and strays: weights, seeds, metrics."""
        things = [held.thing for held in self.walk() if not isinstance(held.thing, keras.Optimizer)]
        return _once(variable for thing in [*things, *self._owner.metrics] for variable in _variables_of(thing))

    def changeable(self) -> list[Any]:
        """The variables that a training step may change; with replicas, those of each."""
        whole = self.by_path().values()
        return [part for variable in whole for part in getattr(plain(variable), "values", [variable])]

    def by_path(self) -> dict[str, Any]:
        """All variables, by the path to what holds them and their position there: plain names may collide."""
        found: dict[int, tuple[str, Any]] = {}  # by identity
        for path, thing, *_ in self.walk():
            is_one = isinstance(thing, (keras.random.SeedGenerator, *VARIABLES))
            for index, variable in enumerate(_variables_of(thing)):
                found.setdefault(id(plain(variable)), (path if is_one else f"{path}/{index}", variable))
        for kind, strays in (("stray", self.strays()), ("read", self._only_read)):
            unseen = [variable for variable in strays if id(variable) not in found]
            found |= {id(variable): (f"{kind}/{index}", variable) for index, variable in enumerate(unseen)}
        return {path + suffix: part for path, one in found.values() for suffix, part in of_each_replica(one).items()}

    def adopt(self, kind: str, things: Iterable[Any]) -> None:
        """Holds what a step uses, if nothing leads to it yet.

        Args:
            kind: "variables", "metrics" or "optimizers".
            things: Such things.
        """
        known = {id(plain(one)) for one in (*self.held(), *self._owner.metrics, *self.optimizers().values())}
        self._adopted[kind] += [thing for thing in things if id(plain(thing)) not in known]

    def strays(self) -> list[tf.Variable]:
        """The variables that steps change and nothing leads to, such as those of Keras's own seeds."""
        return _once(variable for strays in self._strays.values() for variable in strays)

    def find_strays(
        self, kind: str, written: Iterable[tf.Variable], used: Iterable[tf.Variable], but: Iterable[Any]
    ) -> None:
        """Finds the strays among the variables that a kind of step changes.

        Those that a training step only reads are saved too, because a callback may change them.

        Args:
            kind: That of the step.
            written, used: The variables that it changes, and all that it uses.
            but: Those that belong to looplab.
        """
        optimized = (variable for optimizer in self.optimizers().values() for variable in optimizer.variables)
        known = {id(plain(variable)) for variable in (*self.held(), *optimized, *but)}
        self._strays[kind] = [variable for variable in written if id(variable) not in known]
        if kind == "train":
            known.update(map(id, self._strays[kind]))
            self._only_read = [variable for variable in used if id(variable) not in known]

    def bare(self) -> dict[int, str]:
        """The paths of the variables that Keras would not train, by identity."""
        return {id(held.thing): held.path for held in self.walk() if held.is_bare}

    def set_weights(self, weights: Sequence[np.ndarray]) -> None:
        """Assigns the values of all weights.

        Raises:
            ValueError: They have other shapes.
        """
        mine = self.weights()
        if [np.shape(value) for value in weights] != [tuple(weight.shape) for weight in mine]:
            raise ValueError(
                f"`weights` must be the {len(mine)} arrays that `get_weights` of the same models returns; got "
                f"{len(weights)}, or other shapes."
            )
        for variable, value in zip(mine, weights, strict=True):
            variable.assign(value)

    def load_weights(self, path: Path) -> None:
        """Assigns the weights in a file.

        Raises:
            ValueError: It has no weights that fit.
        """
        model = self.saveable("load")
        try:
            model.load_weights(path)
        except FileNotFoundError:
            raise
        except Exception as error:  # HDF5, zip and Keras raise a dozen types for other files
            raise ValueError(f"`filepath` {path} has no weights that fit these models: {error}") from error

    def saveable(self, action: str) -> keras.Model:
        """The one Keras model that has all weights, or a model that holds everything that has some.

        Raises:
            ValueError: There are no weights yet.
        """
        held = (held for held in self.walk() if not _is_state(held))
        holders = [h for h in held if getattr(h.thing, "weights", None) or isinstance(h.thing, VARIABLES)]
        if not holders:
            raise ValueError(f"There are no weights to {action} yet: call `build` with the data first.")
        alone = len(holders) == 1 and isinstance(holders[0].thing, keras.Model)
        return holders[0].thing if alone else _Holder(holders)

    def one_model(self, action: str) -> keras.Model:
        """The one Keras model that has all weights.

        Raises:
            ValueError: There is no such model.
        """
        model = self.saveable(action)
        if isinstance(model, _Holder):
            raise ValueError(
                f"`{action}` needs a trainer of one Keras model: `save_weights` saves everything that this one holds."
            )
        return model

    def summarize(self, **options: Any) -> None:
        """Prints the summary of each Keras model."""
        for held in self.walk():
            if isinstance(held.thing, keras.Model) and held.thing.layers:
                _infer_output_shapes(held.thing)
                held.thing.summary(**options)

    def _of_models(self, attribute: str) -> list[Any]:
        """What layers have as "weights" or "trainable_variables", with such variables of no layer."""
        found: list[Any] = []
        for held in self.walk():
            if isinstance(held.thing, keras.Layer):
                found += getattr(held.thing, attribute)
            elif isinstance(held.thing, VARIABLES) and (held.trainable or attribute == "weights"):
                found += [] if _is_state(held) else [held.thing]
        return _once(found)


class _Holder(keras.Model):
    """Layers and variables under the paths that lead to them, so that Keras saves them as one model."""

    def __init__(self, holders: Iterable[Held]):
        super().__init__(name="trainer")
        self._free: dict[str, Any] = {}
        for held in holders:
            name = "held." + held.path.replace("/", ".")  # not an attribute of a Keras model
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


def _infer_output_shapes(model: keras.Model) -> None:
    """Calls a subclassed model's `call` on a symbolic input, so that Keras's summary has its layers' output shapes.

    If `call` needs real tensors, the summary has a "?" instead.
    """
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None or hasattr(model, "inputs"):  # not built, or not subclassed
        return
    with contextlib.suppress(Exception):
        model.call(keras.tree.map_shape_structure(lambda shape: keras.Input(shape[1:]), shapes))


def _is_state(held: Held) -> bool:
    """Whether it is a Keras variable in a layer that is none of its weights, such as a state of a stateful RNN."""
    return held.is_bare and isinstance(held.thing, keras.Variable) and not held.thing.trainable


def of_each_replica(variable: Any) -> dict[str, Any]:
    """The variable of each replica of this process, by suffix of its path, if each may have its own value."""
    inner = whole(variable)
    if not isinstance(inner, tf.distribute.DistributedValues) or inner.trainable:
        return {"": variable}
    strategy, here = inner.distribute_strategy, len(inner.values)
    if (there := strategy.num_replicas_in_sync) == 1:
        return {"": variable}
    first = here * rank_of(strategy.cluster_resolver) if there > here else 0
    return {f"/replica-{first + index}": part for index, part in enumerate(inner.values)}


def whole(variable: Any) -> Any:
    """The TensorFlow variable of a Keras variable, with replicas that of all; or `variable`."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def plain(variable: Any) -> Any:
    """The TensorFlow variable of a Keras variable, and that of the replica if this process has one; or `variable`."""
    inner = whole(variable)
    is_alone = isinstance(inner, tf.distribute.DistributedValues) and len(inner.values) == 1
    return inner.values[0] if is_alone else inner


def path_of(variable: Any) -> str:
    """A variable's name for people: Keras's path, which is unique in a model, or TensorFlow's name."""
    return getattr(variable, "path", variable.name)


def to_numpy(variable: Any) -> np.ndarray:
    """A copy of the value of a Keras or TensorFlow variable."""
    return np.array(tf.convert_to_tensor(variable).numpy())


def _variables_of(thing: Any) -> list[Any]:
    """All variables of a layer, optimizer, metric or seed generator; a variable is its own."""
    if isinstance(thing, keras.random.SeedGenerator):
        return [thing.state]
    if isinstance(thing, VARIABLES):
        return [thing]
    owned = [variable for metric in getattr(thing, "metrics", ()) for variable in metric.variables]
    return [*thing.variables, *owned]


def _once(things: Iterable[Any]) -> list[Any]:
    return list({id(thing): thing for thing in things}.values())
