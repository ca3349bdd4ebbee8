"""What is wanted: the recipe loaded and checked, the plan of its stages, where each has its place.

Reads no state of a run; imports no other room.
"""
