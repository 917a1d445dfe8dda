"""The names of a `keras.Model` that a trainer answers to, although they are not its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from looplab.keras_models import is_keras

_INSTEAD = {
    "compile": "pass optimizer, loss and metrics to its constructor",
    "add_loss": "call it in a layer, or add the value to the loss of the step",
    "add_metric": "assign the metric to an attribute, and update it in the step",
    "get_config": "create the trainer again in code; `trainer.model` may have a configuration",
    "compiled": "a trainer is always ready",
    "built": "call `build` with the data; `weights` are those that exist",
    "make_train_function": "the step is traced by `fit` or `build`",
}


def find(trainer: Any, engine: Any, name: str) -> Any:
    """What a name of Keras means for a trainer: a substitute of looplab's, or the attribute of its model.

    Raises:
        AttributeError: There is none; says what to use instead.
    """
    if name in _SUBSTITUTES:
        return _SUBSTITUTES[name](trainer, engine)
    if is_keras(trainer.model) and not name.startswith("_") and name not in _INSTEAD and hasattr(trainer.model, name):
        return getattr(trainer.model, name)
    advice = f": {_INSTEAD[name]}." if name in _INSTEAD else ", and neither has its model."
    raise AttributeError(f"A trainer has no `{name}`{advice}")


def _loss(trainer: Any, engine: Any) -> Callable[..., Any]:
    """What `compile` got, as in Keras, if it is a function or a `keras.Loss`."""
    given = engine.runner.objective.loss
    return given if callable(given) else _compiled_loss(trainer, engine)


def _compiled_loss(trainer: Any, engine: Any) -> Callable[..., Any]:
    return lambda y, y_pred, sample_weight=None, **_: trainer.compute_loss(None, y, y_pred, sample_weight)


def _layers(trainer: Any, engine: Any) -> list[keras.Layer]:
    if is_keras(trainer.model):
        return trainer.model.layers
    held = [held.thing for held in engine.runner.variables.walk() if isinstance(held.thing, keras.Layer)]
    return [layer for layer in held if layer is not engine.runner.objective.compiled]


def _get_layer(trainer: Any, engine: Any) -> Callable[..., keras.Layer]:
    def get_layer(name: str | None = None, index: int | None = None) -> keras.Layer:
        layers = _layers(trainer, engine)
        for position, layer in enumerate(layers):
            if layer.name == name or position == index:
                return layer
        raise ValueError(f"`get_layer` got name={name!r}, index={index}; there are {[layer.name for layer in layers]}.")

    return get_layer


def _get_metrics_result(trainer: Any, engine: Any) -> Callable[[], dict[str, Any]]:
    def get_metrics_result() -> dict[str, Any]:
        results = [(metric.name, metric.result()) for metric in trainer.metrics]
        return {key: value for name, result in results for key, value in _by_name(name, result).items()}

    return get_metrics_result


def _by_name(name: str, result: Any) -> dict[str, Any]:
    return result if isinstance(result, dict) else {name: result}


_SUBSTITUTES: dict[str, Callable[[Any, Any], Any]] = {
    "trainable_weights": lambda trainer, engine: trainer.trainable_variables,
    "non_trainable_variables": lambda trainer, engine: engine.runner.variables.not_trainable(),
    "loss": _loss,
    "compiled_loss": _compiled_loss,
    "compiled_metrics": lambda trainer, engine: engine.runner.objective.compiled_metrics,
    "get_metrics_result": _get_metrics_result,
    "layers": _layers,
    "get_layer": _get_layer,
}
