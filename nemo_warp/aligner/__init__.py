"""Training and evaluation through NeMo-Aligner: the only subpackage that imports NeMo."""
