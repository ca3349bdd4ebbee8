"""``python -m nemo_warp.merge``: the merger's command line, wherever the package is installed."""

import sys

from nemo_warp.merge.cli import main

if __name__ == "__main__":
    sys.exit(main())
