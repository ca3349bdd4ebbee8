"""WARP (Weight Averaged Rewarded Policies) on NeMo-Aligner and Megatron-core."""

__version__ = "0.1.0"
