"""Files that hold bytes: tars, torch's zips, pickles that build nothing, and images of new ones.

Imports `io`.
"""
