"""``nemo-warp run | plan | status | resume | stop``: each has `add_arguments` and `main`."""
