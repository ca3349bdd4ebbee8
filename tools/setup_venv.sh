#!/bin/bash
# Make the virtual environment with exactly the packages of constraints/cpu.txt.
#
#   tools/setup_venv.sh PYTHON VENV
#
# torch comes from TORCH_INDEX_URL if set; by default from PyTorch's CPU index where there is no
# GPU, and from pip's own index (PyPI) where there is one or the CPU index cannot be reached.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-$(tools/find_python.sh)}
venv=${2:?}
lock=constraints/cpu.txt

make_venv() {
    if "$python" -m venv --clear "$venv"; then
        return
    fi
    rm -rf "$venv"
    if "$python" -m virtualenv "$venv" 2>/dev/null; then
        return
    fi
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    echo "error: $python cannot make a virtual environment: apt-get install python$version-venv" >&2
    exit 2
}

same_python() {
    ask='import sys; print(sys.version_info[:3])'
    [[ -x $venv/bin/python && $("$venv/bin/python" -c "$ask") == "$("$python" -c "$ask")" ]]
}

same_python || make_venv
rm -f "$venv"/.ready-*
# not compiled: what is imported is compiled in step 5, and that is a small part
install=("$venv/bin/python" -m pip --disable-pip-version-check install --no-compile)

# 1. torch, which has an index of its own
torch=$(grep '^torch==' $lock)
index=$(tools/torch_index.sh)
"${install[@]}" --no-deps --retries 1 ${index:+--extra-index-url "$index"} "$torch"

# 2. everything else, without dependency resolution: NeMo's own pins contradict each other. What
# has to be built (pure Python, all of it) is built with the lock's setuptools.
"${install[@]}" --no-deps "$(grep '^setuptools==' $lock)"
"${install[@]}" --no-deps --no-build-isolation -r $lock

# 3. PyPI's torch cannot be imported without CUDA libraries, which the lock leaves out
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "torch needs its CUDA libraries (about 3 GB): installing them"
    "${install[@]}" --upgrade-strategy only-if-needed "$torch"
fi

# 4. this package
"${install[@]}" --no-deps --no-build-isolation -e .

# 5. bytecode of what every member imports. Where PYTHONDONTWRITEBYTECODE is set, as in many images,
# Python would compile it again at each of their starts: 11 of 19 s.
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -W ignore -c '
import logging
logging.disable(logging.WARNING)
from nemo_warp.aligner.compat import activate
activate()
import nemo_warp.aligner.member'
