#!/usr/bin/env python3
"""Merge NeMo checkpoints (see docs/merge.md); a thin script over nemo_warp.merge."""

import sys

from nemo_warp.merge.cli import main

if __name__ == "__main__":
    sys.exit(main())
