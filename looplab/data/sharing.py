"""How several workers share a dataset."""

from __future__ import annotations

import re

import tensorflow as tf

from looplab.compat import dataset_function, operation_types, parents

Policy = tf.data.experimental.AutoShardPolicy
_READER = re.compile("(TFRecord|TextLine|FixedLengthRecord|ArrayRecord)Dataset")


def shared(dataset: tf.data.Dataset, workers: int, ordered: bool) -> tf.data.Dataset:
    """The dataset with the way in which workers share it, unless its options already say so.

    Each reads some of the files if there are as many as workers. Otherwise, or if the order of the rows matters, each
    reads all batches and keeps its part of the rows: so it is for every dataset that does not read files.

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
    return dataset.with_options(options)


def have_equal_batches(dataset: tf.data.Dataset, workers: int, ordered: bool) -> bool:
    """Whether workers that share the dataset have as many batches as it has itself."""
    options = shared(dataset, workers, ordered).options()
    return workers == 1 or options.experimental_distribute.auto_shard_policy == Policy.DATA


def _files(dataset: tf.data.Dataset) -> int:
    """How many files a dataset reads; 0 if that is unknown."""
    reads = False
    while sources := parents(dataset):
        function = dataset_function(dataset)
        inside = [] if function is None else operation_types(function.graph)
        reads = reads or any(map(_READER.match, [type(dataset).__name__, *inside]))
        if len(sources) > 1:
            return 0
        dataset = sources[0]
    return int(dataset.cardinality()) if reads else 0
