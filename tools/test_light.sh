#!/bin/bash
# Run the tests that need no NeMo with the oldest or the newest versions that pyproject.toml allows,
# in an environment of their own (PyPI's torch with its CUDA libraries: 3 to 6 GB).
#
#   tools/test_light.sh oldest|newest [PYTHON] [PYTEST ARGUMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."

versions=${1:?oldest or newest}
python=${2:-$(tools/find_python.sh)}
venv=.venv-$versions
constraints=()
case $versions in
    oldest) constraints=(-c constraints/oldest.txt) ;;
    newest) ;;
    *) echo "error: '$versions' is neither oldest nor newest" >&2; exit 2 ;;
esac

"$python" -m venv "$venv"
"$venv/bin/python" -m pip install -q "${constraints[@]}" -e '.[data,judge]' \
    hypothesis pytest pytest-timeout pytest-xdist safetensors sentencepiece
light=(core evidence study checkpoints merge pipeline reporting
    test_config.py test_prompt_sets.py test_records.py test_schema.py)
exec "$venv/bin/python" -m pytest --timeout=900 -m "not nemo" "${light[@]/#/tests/}" "${@:3}"
