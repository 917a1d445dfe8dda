"""What is random in a dataset or a graph, and whether a resumed run can restore it."""

from __future__ import annotations

import tensorflow as tf

from looplab.compat import dataset_function, dataset_seeds, draws_anew, is_ordered, nodes, operation_types, parents

# Kernels that keep a counter of their own; stateless kernels and those of `tf.random.Generator` do not.
_UNSAVED_RANDOM = {
    *("RandomStandardNormal", "RandomUniform", "RandomUniformInt", "TruncatedNormal", "ParameterizedTruncatedNormal"),
    *("RandomShuffle", "RandomGamma", "RandomPoisson", "RandomPoissonV2", "Multinomial"),
    *("SampleDistortedBoundingBox", "SampleDistortedBoundingBoxV2", "RandomCrop"),
}
# Inside a dataset, no checkpoint holds the state of a generator.
_COUNTING = {"RngReadAndSkip", "RngSkip", "AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp"}


def find_unseeded(dataset: tf.data.Dataset) -> str:
    """What differs in a dataset from run to run; "" if nothing does."""
    return "options with `deterministic=False`" if dataset.options().deterministic is False else _found(dataset)


def _found(dataset: tf.data.Dataset) -> str:
    """What differs from run to run in a dataset and those that it reads, whatever its options."""
    for parent in parents(dataset):
        if found := _found(parent):
            return found
    kind = type(dataset).__name__.strip("_").removesuffix("Dataset").removeprefix("Parallel").lower()
    if not is_ordered(dataset) or _has_unordered(dataset):
        return f"`{kind}` with `deterministic=False`"
    if all(seed is not None and int(seed) == 0 for seed in dataset_seeds(dataset)):
        return f"`{kind}` without a `seed`"
    function = dataset_function(dataset)
    if function is None:
        return ""
    operations = function.graph.get_operations()
    shuffles = [operation for operation in operations if operation.type.startswith("ShuffleDataset")]
    if any(tf.get_static_value(seed) == 0 for shuffle in shuffles for seed in shuffle.inputs[2:3]):
        return f"`shuffle` without a `seed` in `{kind}`"
    counting = [operation.type for operation in operations if operation.type in _COUNTING]
    return next((f"{found} in `{kind}`" for found in [*random_operations(function.graph), *counting]), "")


def _has_unordered(dataset: tf.data.Dataset) -> bool:
    """Whether the function of a dataset creates one in no order; or if it is a parallel `interleave`, it itself."""
    function = dataset_function(dataset)
    if type(dataset).__name__.startswith("_ParallelInterleave"):
        variant = tf.data.experimental.to_variant(dataset)
        graph = tf.raw_ops.DatasetToGraphV2(input_dataset=variant, external_state_policy=1)  # without a warning
        definition = tf.compat.v1.GraphDef.FromString(graph.numpy())
    elif function is not None:
        definition = function.graph.as_graph_def()
    else:
        return False
    return any(node.attr["deterministic"].s == b"false" for node in nodes(definition) if "deterministic" in node.attr)


def reshuffles(dataset: tf.data.Dataset) -> bool:
    """Whether each iteration may have another order."""
    return draws_anew(dataset) or _reads_captured(dataset) or any(map(reshuffles, parents(dataset)))


def draws_at_start(dataset: tf.data.Dataset) -> bool:
    """Whether creating an iterator draws the whole order, even if nobody reads it; otherwise reading draws orders."""
    kind = type(dataset).__name__.strip("_")
    if _reads_captured(dataset) or kind in ("RepeatDataset", "CacheDataset") or len(parents(dataset)) > 1:
        return not reshuffles(dataset)
    return all(map(draws_at_start, parents(dataset)))


def _reads_captured(dataset: tf.data.Dataset) -> bool:
    """Whether its function returns datasets that were created outside of it."""
    function = dataset_function(dataset)
    return function is not None and any(tensor.dtype == tf.variant for tensor in function.captured_inputs)


def random_operations(graph: tf.Graph) -> list[str]:
    """The types of a graph's operations whose random numbers no saved variable determines."""
    return sorted(operation_types(graph) & _UNSAVED_RANDOM)
