"""What can go wrong with a reward, other than a wrong configuration (ValueError)."""


class RewardError(RuntimeError):
    """A reward server is not there, is not the one expected, or cannot do its work."""


class RewardFailureRateError(RewardError):
    """Too many rewards failed: save, stop, exit with ``exit_codes.REWARDS_FAILED``."""
