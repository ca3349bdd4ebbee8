"""One member's run: the loop, its objective, when it stops, and what it reports.

Imports every room below; nothing imports it but the program `train`.
"""
