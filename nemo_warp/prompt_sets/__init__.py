"""Prompts from data sets: rows read, put into a model's own chat template, split and written.

`rows` reads, `templates` makes text and tokens, `making` filters and splits, `command` is the tool.
"""
