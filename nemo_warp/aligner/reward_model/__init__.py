"""NeMo reward models: scoring on all ranks, and training on pairs.

Imports `entry` and `compat` only: a reward model is no policy.
"""
