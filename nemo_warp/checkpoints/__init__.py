"""Checkpoints as logical tensors: readers for every NeMo 1 format, and output layouts."""
