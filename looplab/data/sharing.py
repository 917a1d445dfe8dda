"""How several workers share a dataset, and what cannot be shared."""

from __future__ import annotations

import re
from typing import Any

import tensorflow as tf

from looplab.compat import dataset_function, operation_types, parents

Policy = tf.data.experimental.AutoShardPolicy
_READER = re.compile("TFRecordDataset")
# What gives each worker, of its files, the rows that it would have of all files.
_BY_ROW = re.compile(
    "_?(Parallel)?(Map|Filter|FlatMap|Interleave|Shuffle|Batch|PaddedBatch|Prefetch|Cache|Options|TFRecord)Dataset"
)


def shared(dataset: tf.data.Dataset, workers: int, ordered: bool) -> tf.data.Dataset:
    """The dataset with the way in which workers share it, unless its options already say so.

    Each reads some of the files if there are as many as workers, and if that gives the same rows. Otherwise, or if the
    order of the rows matters, each reads all batches, in one order, and keeps its part of the rows.

    Args:
        dataset: Of batches.
        workers: How many share it.
        ordered: Whether the rows must keep their order, as in a prediction.
    """
    if workers == 1 or dataset.options().experimental_distribute.auto_shard_policy != Policy.AUTO:
        return dataset
    options = tf.data.Options()
    by_file = not ordered and _files(dataset) >= workers
    options.experimental_distribute.auto_shard_policy = Policy.FILE if by_file else Policy.DATA
    if not by_file:
        options.deterministic = True
    return dataset.with_options(options)


def is_by_row(dataset: tf.data.Dataset, workers: int, ordered: bool) -> bool:
    """Whether workers that share the dataset read the batches that it has itself, each a part of the rows."""
    options = shared(dataset, workers, ordered).options()
    return workers == 1 or options.experimental_distribute.auto_shard_policy == Policy.DATA


def check_sparse(name: str, element_spec: Any, replicas: int) -> None:
    """Requires that each replica gets a row of each sparse batch: TensorFlow cannot share one with fewer rows."""
    sparse = [spec for spec in tf.nest.flatten(element_spec) if isinstance(spec, tf.SparseTensorSpec)]
    if replicas > 1 and any((spec.shape[0] or 0) < replicas for spec in sparse):
        raise ValueError(
            f"`{name}` has sparse batches, and TensorFlow cannot split one that has fewer rows than the {replicas} "
            f"replicas. Pass dense arrays, or a dataset of which all batches have one size, with "
            f"`batch(..., drop_remainder=True)`."
        )


def _files(dataset: tf.data.Dataset) -> int:
    """How many files a dataset reads row by row; 0 if that is unknown, or if not all rows stay."""
    reads, specs = False, tf.nest.flatten(dataset.element_spec)
    if any(spec.shape.rank == 0 or spec.shape[0] is not None for spec in specs):  # without the last, smaller batch
        return 0
    while sources := parents(dataset):
        name, function = type(dataset).__name__, dataset_function(dataset)
        if len(sources) > 1 or not _BY_ROW.match(name):
            return 0
        inside = [] if function is None else operation_types(function.graph)
        reads = reads or any(map(_READER.match, [name, *inside]))
        dataset = sources[0]
    return int(dataset.cardinality()) if reads else 0
