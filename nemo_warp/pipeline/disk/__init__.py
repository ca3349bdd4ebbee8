"""What is there: a run's directory, requests, attempts, locks, and the state read from them.

Imports `recipe`. Nothing here starts or submits anything.
"""
