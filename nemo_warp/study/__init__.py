"""Many runs that answer one question: recipes times seeds, and what they show together.

A study is a list of variants of one recipe. Each is run under several seeds by ``nemo-warp run``,
in a process of its own; what they measured goes into one JSON file, and tables and pictures are
drawn from that file alone. Imports neither NeMo nor torch, and starts runs as a user would.
"""
