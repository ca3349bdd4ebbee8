"""Whole iterations: plan, state on disk, local and Slurm launchers, status.

Standard library and OmegaConf only: login nodes run this without torch.
"""
