"""From prompts to a scored global batch: generation, and the rewards that were asked meanwhile.

Imports `policy` and `entry`; training and evaluation sample through it alike.
"""
