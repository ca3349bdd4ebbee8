"""Is one policy better than another? Statistics over responses that evaluations wrote down.

Numpy, scipy and, for texts, sacrebleu; no torch, no NeMo, no model: everything here is computed
from files, later and anywhere. Imports `nemo_warp.records` only.
"""
