"""Checkpoints as logical tensors: readers for every NeMo 1 format, and output layouts.

The rooms, from the bottom: `io` (bytes on the disk) <- `containers` (tar, zip, pickle) <- `formats`
(what a checkpoint's files mean). `logical` and `names` are what they all speak in.
"""
