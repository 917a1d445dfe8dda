"""Batches whose order is a function of the seed and the epoch, and datasets by name."""
