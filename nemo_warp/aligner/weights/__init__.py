"""Second sets of a model's weights: sharded copies, the anchor, checkpoints, exports.

Knows Megatron's sharded state, not how a policy is built, sampled or trained.
"""
