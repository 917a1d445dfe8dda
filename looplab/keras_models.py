"""What a Keras model brings along: its own steps, and what it was compiled with."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from looplab import compat

METHODS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")
"""The methods of a Keras model that are used if its class overrides them."""


def is_keras(model: Any) -> bool:
    """Whether a model has Keras's `compile` and `fit`."""
    return isinstance(model, compat.KERAS_TRAINER)


def overrides(model: Any, name: str) -> bool:
    """Whether the class of a Keras model overrides a method of `keras.Model`."""
    return is_keras(model) and getattr(type(model), name) is not getattr(keras.Model, name)


def own_method(model: Any, name: str) -> Callable[..., Any] | None:
    """The model's own method, if its class overrides that of `keras.Model`; of a `tf.function`, what it decorates."""
    if not overrides(model, name):
        return None
    method = getattr(type(model), name)
    is_traced = isinstance(method, tf.types.experimental.PolymorphicFunction)
    return types.MethodType(method.python_function, model) if is_traced else getattr(model, name)


def compiled_with(model: Any) -> dict[str, Any]:
    """The arguments of `compile` that a Keras model was given; {} if it was not compiled."""
    return compat.compile_arguments(model) if is_keras(model) and model.compiled else {}


def compiled_model(model: Any, given: dict[str, Any]) -> Any:
    """The Keras model that knows how losses and metrics match the outputs of `model`.

    It is `model` itself if that is compiled and nothing is given, or if it has steps of its own, which use what it is
    compiled with; otherwise a model without layers, which leaves `model` as it is.

    Args:
        model: Any model, or None.
        given: The arguments of `compile` that were passed to the trainer; they take precedence.

    Raises:
        ValueError: Some are given, but the model's own steps use its own `compile`.
    """
    arguments = {"optimizer": None, **compiled_with(model), **given}
    if compiled_with(model) and not given:
        return model
    if any(overrides(model, name) for name in METHODS):
        if not overrides(model, "compile"):
            model.compile(**arguments)
            return model
        if given:
            raise ValueError(
                f"`{next(iter(given))}` is given, but the steps of `{type(model).__name__}` use its own `compile`: "
                f"pass it to `model.compile`."
            )
    compiled = keras.Model(name="compiled", dtype=getattr(model, "dtype_policy", None))
    if is_keras(model) and hasattr(model, "output_names"):
        compiled.output_names = model.output_names
    compiled.compile(**arguments)
    return compiled


class AsCompiled:
    """A setting of a trainer: what was assigned, or if that is the default, what its model is compiled with now.

    Keras's own defaults count as looplab's. Its "auto" of `jit_compile` is True on most GPUs, where only True for a
    model with another default shows that it was passed.

    Args:
        default: Stands for the setting of the model.
        checked: Returns what was assigned, or raises an error.
    """

    def __init__(self, default: str | None, checked: Callable[[Any], Any]):
        self.default = default
        self.checked = checked

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, trainer: Any, value: Any) -> None:
        vars(trainer)[self._name] = self.checked(value)

    def __get__(self, trainer: Any, owner: type) -> Any:
        if trainer is None:
            return self
        value, model = vars(trainer).get(self._name, self.default), trainer.model
        if value != self.default:
            return value
        compiled = getattr(model, self._name) if is_keras(model) and model.compiled else None
        if self._name == "steps_per_execution":
            return compiled if compiled and compiled > 1 else self.default
        return bool(compiled) and not (self._name == "jit_compile" and compat.is_jit_by_default(model))


def with_rates(optimizers: dict[str, keras.Optimizer]) -> dict[str, keras.Optimizer]:
    """The optimizers that have a learning rate, by path: instead of a `MultiOptimizer` those inside it."""
    found: dict[str, keras.Optimizer] = {}
    for path, optimizer in optimizers.items():
        inner = getattr(optimizer, "optimizers", None)
        found |= {path: optimizer} if inner is None else {f"{path}/{index}": one for index, one in enumerate(inner)}
    return found
