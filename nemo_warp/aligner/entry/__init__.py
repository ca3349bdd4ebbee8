"""What happens before NeMo is imported: the entry points' frame, checks, prompt files.

Imports neither NeMo nor another room, so that a mistake is told in a second.
"""
