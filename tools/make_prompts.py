#!/usr/bin/env python3
"""Turn a data set into prompts with a model's own chat template (docs/models.md)."""

import sys

from nemo_warp.prompt_sets.command import main

if __name__ == "__main__":
    sys.exit(main())
