"""The policy in NeMo's terms: its configuration, model and optimizer, and the REINFORCE actor.

Imports `weights`.
"""
