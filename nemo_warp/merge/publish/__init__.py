"""Outputs while they are written, what survives a kill, and how they get their final name."""
