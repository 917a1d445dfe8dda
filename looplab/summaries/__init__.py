"""What a run writes to its log folder for TensorBoard."""
