"""The two passes over a group of tensors: measure the angles, then write every output.

Imports `publish` for the outputs it writes into.
"""
