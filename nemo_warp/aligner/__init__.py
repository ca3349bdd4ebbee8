"""Training and evaluation through NeMo-Aligner: the only subpackage that imports NeMo.

The modules here are the programs that users and launchers start, one process per rank. The
rooms, from the bottom: `compat`, `entry` (no NeMo) <- `weights` <- `policy` <- `sampling` <-
`evaluation` <- `member`; `reward_model` stands apart. A room imports from rooms before it only.
"""
