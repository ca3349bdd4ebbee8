"""Pictures and tables of what was measured: matplotlib only, no torch, no NeMo."""
