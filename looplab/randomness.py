"""What is random in a data set or a graph, and whether it can be had again."""

from __future__ import annotations

import tensorflow as tf

# Kernels that count for themselves; the stateless ones, and those of `tf.random.Generator`, do not.
_UNSAVED_RANDOM = {
    *("RandomStandardNormal", "RandomUniform", "RandomUniformInt", "TruncatedNormal", "ParameterizedTruncatedNormal"),
    *("RandomShuffle", "RandomGamma", "RandomPoisson", "RandomPoissonV2", "Multinomial"),
    *("SampleDistortedBoundingBox", "SampleDistortedBoundingBoxV2", "RandomCrop"),
}
# Within a data set, a generator that counts for itself is no variable of the trainer's.
_COUNTING = {"RngReadAndSkip", "RngSkip", "AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp"}


def find_unseeded(dataset: tf.data.Dataset) -> str:
    """What is random in a data set's pipeline without a seed, or ""."""
    for inner in dataset._inputs():
        if found := find_unseeded(inner):
            return found
    seeds = getattr(dataset, "_seed", None), getattr(dataset, "_seed2", None)
    kind = type(dataset).__name__.strip("_").removesuffix("Dataset").lower()
    if all(seed is not None and int(seed) == 0 for seed in seeds):
        return f"`{kind}` without a `seed`"
    function = getattr(getattr(dataset, "_map_func", None), "function", None)
    if function is None:
        return ""
    graph = function.graph
    shuffles = [o for o in graph.get_operations() if o.type.startswith("ShuffleDataset")]
    if any(tf.get_static_value(seed) == 0 for o in shuffles for seed in o.inputs[2:3]):
        return f"`shuffle` without a `seed` in `{kind}`"
    counting = [o.type for o in graph.get_operations() if o.type in _COUNTING]
    return next((f"{operation} in `{kind}`" for operation in [*random_operations(graph), *counting]), "")


def reshuffles(dataset: tf.data.Dataset) -> bool:
    """Whether it may give another order each time that it is begun."""
    names = ("_reshuffle_each_iteration", "_rerandomize")
    return (
        any(getattr(dataset, name, None) for name in names)
        or _has_datasets_within(dataset)
        or any(map(reshuffles, dataset._inputs()))
    )


def draws_when_begun(dataset: tf.data.Dataset) -> bool:
    """Whether it draws its order when an iterator is made, though nobody reads it; else some of it as it is read."""
    kind = type(dataset).__name__.strip("_")
    if _has_datasets_within(dataset) or kind in ("RepeatDataset", "CacheDataset") or len(dataset._inputs()) > 1:
        return not reshuffles(dataset)
    return all(map(draws_when_begun, dataset._inputs()))


def _has_datasets_within(dataset: tf.data.Dataset) -> bool:
    """Whether its function gives data sets that were made outside of it."""
    function = getattr(getattr(dataset, "_map_func", None), "function", None)
    return function is not None and any(tensor.dtype == tf.variant for tensor in function.captured_inputs)


def random_operations(graph: tf.Graph) -> list[str]:
    """The operations of a graph whose random numbers no variable leads to: none can bring them back."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    return sorted({node.op for node in nodes if node.op in _UNSAVED_RANDOM})
