"""The private names of TensorFlow, Keras and Python that looplab uses: a new release can break this file alone."""

from __future__ import annotations

import argparse
import contextlib
import re
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from keras.src import losses, metrics
from keras.src.backend.common import global_state
from keras.src.random import seed_generator
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters import data_adapter_utils
from tensorflow.python.autograph.core import config as autograph
from tensorflow.python.autograph.core.ag_ctx import ControlStatusCtx, Status
from tensorflow.python.autograph.core.config import Convert, DoNotConvert
from tensorflow.python.autograph.utils import ag_logging

# Keras

NAMES = {
    "loss": [*losses.ALL_OBJECTS_DICT, "crossentropy", "ce"],
    "metrics": [*metrics.ALL_OBJECTS_DICT, "accuracy", "acc"],
}
"""The names that Keras's `compile` takes, by argument; `dir(keras.losses)` lacks the short ones, such as "mse"."""


KERAS_TRAINER = next(kind for kind in keras.Model.__mro__ if "compile" in vars(kind))
"""The class of all that Keras can compile and fit; `keras.Model` is a subclass, and layers may be."""

APPLYING = next(kind for kind in keras.Optimizer.__mro__ if "apply" in vars(kind))
"""The class of all optimizers that has the method `apply`; a subclass may override it."""

LOSSES, REDUCE_VALUES = losses.loss, "reduce_weighted_values"
"""The module of Keras's losses, and its function that reduces the values of a loss."""

REPLICA_SCALES = ("scale_loss_for_distribution", "unscale_loss_for_distribution")  # functions of that module

REDUCE = "_all_reduce_sum_gradients"
"""The method of optimizers that adds up the gradients of the replicas."""


def compile_arguments(model: Any) -> dict[str, Any]:
    """What a model was compiled with; `get_compile_config` has only what can be serialized."""
    loss, metrics, optimizer = model._compile_loss, model._compile_metrics, getattr(model, "optimizer", None)
    return {
        "optimizer": optimizer,
        "loss": None if loss is None else loss._user_loss,
        "loss_weights": None if loss is None else loss._user_loss_weights,
        "metrics": None if metrics is None else metrics._user_metrics,
        "weighted_metrics": None if metrics is None else metrics._user_weighted_metrics,
        "run_eagerly": model.run_eagerly,
        "steps_per_execution": model.steps_per_execution,
        "jit_compile": model.jit_compile,
        # Where it matters, which is under the policy "mixed_float16"; Keras does not keep the argument.
        "auto_scale_loss": optimizer is None or isinstance(optimizer, keras.optimizers.LossScaleOptimizer),
    }


def compile_parts(model: Any) -> tuple[Any, Any, Any]:
    """The loss of a compiled model's targets, its metrics, and its mean of the loss; None for what it does not have."""
    return model._compile_loss, model._compile_metrics, model._loss_tracker


def loss_weights(compiled_loss: Any) -> list[float]:
    """The weights of the losses of all outputs, in the order of Keras's means; known once it was called."""
    return [1.0 if one.loss_weights is None else one.loss_weights for one in compiled_loss._flat_losses]


def is_jit_by_default(model: Any) -> bool:
    """Whether `jit_compile="auto"` turns XLA on for a model."""
    return model._resolve_auto_jit_compile()


def all_layers(layer: keras.Layer) -> list[keras.Layer]:
    """The layer and all layers inside it; `Model.layers` has only those directly inside."""
    return list(layer._flatten_layers())


def direction(metric: keras.Metric) -> str | None:
    """Whether "up" or "down" is better; the public API has it only inside `ModelCheckpoint` and `EarlyStopping`."""
    return getattr(metric, "_direction", None)


def trained_by(optimizer: keras.Optimizer) -> list[Any]:
    """The variables that an optimizer was built for; `optimizer.variables` has only its own."""
    return optimizer._trainable_variables


def learning_rate(optimizer: keras.Optimizer) -> Any:
    """The learning rate as it was given, which may be a schedule; `optimizer.learning_rate` is its current value."""
    return getattr(optimizer, "inner_optimizer", optimizer)._learning_rate


def adam_slots(optimizer: keras.Optimizer, variable: tf.Variable) -> tuple[tf.Variable, tf.Variable]:
    """The averages of the gradient of a variable and of its square."""
    index = optimizer._get_variable_index(variable)
    return optimizer._momentums[index].value, optimizer._velocities[index].value


def takes_logits(loss: Any) -> bool:
    """Whether a Keras loss has from_logits=True; only `get_config`, which may fail, has it in public."""
    return bool(getattr(loss, "_fn_kwargs", {}).get("from_logits", False))


def is_structure_error(error: Exception) -> bool:
    """Whether Keras raised an error while it matched losses or metrics with outputs, and not inside one of them."""
    files = [Path(frame.f_code.co_filename).stem for frame, _ in traceback.walk_tb(error.__traceback__)]
    _, found, deeper = "/".join(files).rpartition("compile_utils")
    return bool(found) and {*deeper.split("/")} <= {"", "tree_api", "optree_impl", "dmtree_impl", "ops"}


class IteratorAdapter(data_adapters.GeneratorDataAdapter):
    """Keras's dataset of the batches of iterators, whose signature is that of the first two batches.

    Keras itself offers it only inside `fit`.

    Args:
        make: Returns an iterator over 1-tuples of batches.
        restarts: Whether each iteration over the dataset has an iterator of its own; otherwise all share the first.
    """

    def __init__(self, make: Callable[[], Iterator[Any]], restarts: bool):
        super().__init__(make())
        if restarts:
            self.generator = make


PyDatasetAdapter = data_adapters.PyDatasetAdapter
"""Keras's dataset of the batches of a `keras.utils.PyDataset`, with its workers; Keras offers it only inside `fit`."""


def is_loader(x: Any) -> bool:
    """Whether `x` is a `DataLoader` of PyTorch's or data of Grain's, without importing them."""
    return data_adapters.is_torch_dataloader(x) or data_adapters.is_grain_dataset(x)


def sparse_tensor(value: Any) -> tf.SparseTensor | None:
    """A sparse matrix of TensorFlow, SciPy or JAX as a `tf.SparseTensor`; None for anything else."""
    if isinstance(value, tf.SparseTensor):
        return value
    if data_adapter_utils.is_scipy_sparse(value):
        return data_adapter_utils.scipy_sparse_to_tf_sparse(value.tocsr())  # which adds up what is there twice
    return data_adapter_utils.jax_sparse_to_tf_sparse(value) if data_adapter_utils.is_jax_sparse(value) else None


@contextlib.contextmanager
def drawing_from(seeds: keras.random.SeedGenerator | None) -> Iterator[None]:
    """Inside it, in this thread, `keras.random` functions without a seed draw from `seeds`; None changes nothing.

    Keras has a generator for each thread, and TensorFlow starts threads for the replicas of each step.
    """
    if seeds is None:
        yield
        return
    name = seed_generator.GLOBAL_SEED_GENERATOR
    before = global_state.get_global_attribute(name)
    global_state.set_global_attribute(name, seeds)
    try:
        yield
    finally:
        global_state.set_global_attribute(name, before)


CALLBACK_OWN = ("params", "_model")
"""The attributes that a `CallbackList` sets on each callback."""

# Python


def accept_negative_numbers(parser: argparse.ArgumentParser) -> None:
    """Lets words such as -1e-3 and -inf be values; argparse takes all but plain decimals for flags."""
    parser._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")


# TensorFlow


@contextlib.contextmanager
def converting_users_code() -> Iterator[None]:
    """Inside it, AutoGraph does not convert the code of looplab, for which it would take seconds."""
    rules = autograph.CONVERSION_RULES
    autograph.CONVERSION_RULES = (Convert("looplab.recipes"), DoNotConvert("looplab"), *rules)
    try:
        yield
    finally:
        autograph.CONVERSION_RULES = rules


def converted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that may be a user's, to be called in a graph: its conditions and loops may depend on tensors."""
    if tf.executing_eagerly():
        return function
    return tf.__internal__.autograph.tf_convert(function, ControlStatusCtx(Status.ENABLED))


AUTOGRAPH_LOG, NOT_CONVERTED = ag_logging, "AutoGraph could not transform"
"""The module whose function `warning` AutoGraph calls, and how a warning of a function that it runs as it is starts."""


def temporary_graph() -> Any:
    """A graph for a `with` block, in which a replica's step can be traced and forgotten."""
    return tf.__internal__.FuncGraph("temporary")


def is_function_graph(graph: Any) -> bool:
    """Whether a graph is that of a `tf.function`; those of branches and loops are of subclasses."""
    return type(graph).__name__ == "FuncGraph"


def of_one_replica(spec: Any) -> Any:
    """The signature of what the first replica gets of a distributed value."""
    return spec._value_specs[0] if hasattr(spec, "_value_specs") else spec


def of_all_replicas(variable: tf.Variable) -> Any:
    """The variable that this variable of one replica belongs to; any other variable itself."""
    if isinstance(variable, tf.distribute.DistributedValues):
        return variable
    found = (getattr(one, "_distributed_container", None) for one in (variable, variable.handle))
    return next((container() for container in found if container is not None), variable)


def parents(dataset: tf.data.Dataset) -> list[tf.data.Dataset]:
    """The datasets that a dataset reads."""
    return list(dataset._inputs())


def dataset_seeds(dataset: tf.data.Dataset) -> tuple[Any, Any]:
    """The two seeds of a dataset that shuffles or draws, both 0 if it has none; None for any other."""
    return getattr(dataset, "_seed", None), getattr(dataset, "_seed2", None)


def dataset_function(dataset: tf.data.Dataset) -> Any:
    """The traced function of `map` and its relatives; None for any other dataset."""
    return getattr(getattr(dataset, "_map_func", None), "function", None)


def nodes(definition: tf.compat.v1.GraphDef) -> list[Any]:
    """All operations of a graph, with those of the functions that it calls."""
    return [*definition.node, *(node for function in definition.library.function for node in function.node_def)]


def operation_types(graph: tf.Graph) -> set[str]:
    """The types of all operations of a graph, with those of the functions that it calls."""
    return {node.op for node in nodes(graph.as_graph_def())}


def is_ordered(dataset: tf.data.Dataset) -> bool:
    """Whether this dataset itself keeps its order, though threads compute it; `interleave` does not say."""
    return getattr(dataset, "_deterministic", None) != "false"


def draws_anew(dataset: tf.data.Dataset) -> bool:
    """Whether this dataset itself gives another order in each iteration."""
    return any(getattr(dataset, name, None) for name in ("_reshuffle_each_iteration", "_rerandomize"))


def read_only_inputs(operation: tf.Operation) -> Collection[int]:
    """Which resources an operation with branches or a body only reads, as TensorFlow's own control flow records it."""
    try:
        return operation.get_attr("_read_only_resource_inputs")
    except ValueError:
        return ()


EAGER_VARIABLE = {"experimental_enable_variable_lifting": False}
"""Lets a variable be created outside the graph while a function is traced."""


def first_reads(*variables: Any) -> list[tuple[tf.Variable, tf.Tensor]]:
    """Those that are Keras variables as TensorFlow's, each with its value."""
    kept = [variable.value for variable in variables if isinstance(variable, keras.Variable)]
    return [(variable, variable.value()) for variable in kept]


def updates_plainly(optimizer: keras.Optimizer) -> bool:
    """Whether Keras's own methods update the variables, which change neither the counter nor the rate meanwhile."""
    names = ("apply", "_backend_apply_gradients", "_backend_update_step", "update_step")
    return all(getattr(type(optimizer), name).__module__.startswith("keras.src.") for name in names)


@contextlib.contextmanager
def read_as(values: list[tuple[tf.Variable, tf.Tensor]]) -> Iterator[None]:
    """Inside it, reading one of these variables gives this value, without an operation."""
    for variable, value in values:
        variable._cached_value = value
    try:
        yield
    finally:
        for variable, _ in values:
            variable._cached_value = None
