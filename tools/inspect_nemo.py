#!/usr/bin/env python3
"""Show what a NeMo checkpoint holds (`nemo-inspect`); a thin script for a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nemo_warp.inspect_command import main

if __name__ == "__main__":
    sys.exit(main())
