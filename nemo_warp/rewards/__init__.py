"""Rewards: servers, and a client that gives a failed sample NaN and never a number.

``serve`` puts any Python callable behind PyTriton; ``nemo_warp.aligner.serve_reward_model`` does
the same for a NeMo reward model. Both use NeMo-Aligner's protocol (`nemo_warp.rewards.triton`)
and announce themselves in an endpoint file (`nemo_warp.rewards.endpoint`), which ``client`` reads.
"""

from nemo_warp.rewards.errors import RewardError, RewardFailureRateError

__all__ = ["RewardError", "RewardFailureRateError"]
