"""Measuring policies on held-out prompts: one point, and the front that eta or kappa spans.

Imports `sampling` and the rooms below it; members evaluate through it, too.
"""
