"""What can go wrong with a reward, other than a wrong configuration (ValueError)."""


class RewardError(RuntimeError):
    """A reward server is not there, is not the one expected, or cannot do its work."""


class RewardTimeoutError(RewardError):
    """A server did not answer in time; a smaller question may fit."""


class RewardFailureRateError(RewardError):
    """Too many rewards failed: save, stop, exit with ``exit_codes.REWARDS_FAILED``."""
