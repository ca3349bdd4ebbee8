"""Who does it: a stage's programs as steps, watched; locally side by side, or as Slurm jobs.

Imports `recipe` and `disk`.
"""
