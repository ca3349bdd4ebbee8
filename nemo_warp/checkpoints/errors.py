"""The error for anything wrong with a checkpoint on disk."""


class CheckpointError(Exception):
    """A checkpoint on disk is damaged, incomplete, hostile, or of a kind that is not supported."""
