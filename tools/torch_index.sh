#!/bin/sh
# Print where torch is looked for besides pip's own index: TORCH_INDEX_URL if set, PyTorch's CPU
# index where there is no GPU, else nothing.
if [ -n "${TORCH_INDEX_URL-}" ]; then
    echo "$TORCH_INDEX_URL"
elif ! nvidia-smi -L >/dev/null 2>&1; then
    echo https://download.pytorch.org/whl/cpu
fi
