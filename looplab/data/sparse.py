"""Sparse arrays as ragged rows, because the graph cannot gather rows of a `tf.SparseTensor`."""

import tensorflow as tf

# Without `from __future__ import annotations`: `tf.experimental.ExtensionType` reads the annotations of a class.


class SparseRows(tf.experimental.ExtensionType):
    """A sparse array, row by row."""

    indices: tf.RaggedTensor
    """int64: for each row, the places of its values in the other dimensions, of shape (values, rank - 1)."""
    values: tf.RaggedTensor
    """For each row, its values."""
    row_shape: tf.TensorShape

    @classmethod
    def of(cls, array: tf.SparseTensor) -> "SparseRows":
        """From an array whose indices are in order."""
        splits = tf.searchsorted(array.indices[:, 0], tf.range(array.dense_shape[0] + 1))
        splits = tf.cast(splits, tf.int64)
        return cls(
            indices=tf.RaggedTensor.from_row_splits(array.indices[:, 1:], splits),
            values=tf.RaggedTensor.from_row_splits(array.values, splits),
            row_shape=array.shape[1:],
        )

    @property
    def signature(self) -> tf.TypeSpec:
        """That of an array with any number of rows of this shape."""
        values = tf.RaggedTensorSpec([None, None], self.values.dtype, 1, tf.int64)
        indices = tf.RaggedTensorSpec([None, None, self.row_shape.rank], tf.int64, 1, tf.int64)
        return SparseRows.Spec(indices=indices, values=values, row_shape=self.row_shape)

    @property
    def batch_signature(self) -> tf.SparseTensorSpec:
        """That of a batch."""
        return tf.SparseTensorSpec([None, *self.row_shape], self.values.dtype)

    def batch(self, rows: tf.Tensor) -> tf.SparseTensor:
        """The given rows as a sparse array."""
        indices, values = tf.gather(self.indices, rows), tf.gather(self.values, rows)
        numbers = tf.cast(indices.value_rowids(), tf.int64)
        shape = tf.shape(rows, tf.int64)[0], *(tf.constant(size, tf.int64) for size in self.row_shape)
        return tf.SparseTensor(tf.concat([numbers[:, None], indices.values], 1), values.values, tf.stack(shape))
