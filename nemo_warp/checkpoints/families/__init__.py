"""Model families: what Hugging Face and NeMo call the same configuration and the same weights.

`configuration` maps the keys, `tensors` the weights, as rows of one that are rows of the other, so
that both directions are read off one table. `importing` and `exporting` stream along it.
"""
