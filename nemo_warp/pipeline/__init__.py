"""Whole iterations: plan, state on disk, local and Slurm launchers, status.

Standard library and OmegaConf only: login nodes run this without torch. `task` and `ranks` are the
programs that launchers start. The rooms, from the bottom: `recipe` <- `disk` <- `launch` <-
`commands`. A room imports from rooms before it only.
"""
