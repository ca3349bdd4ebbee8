"""What a checkpoint's files mean as tensors: torch_dist, zarr, rank files.

Imports `containers` and `io`.
"""
