"""Pure mathematics of WARP: torch tensors in, torch tensors out."""
