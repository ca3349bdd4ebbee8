#!/bin/bash
# Run the tests that need no NeMo with the oldest or the newest versions that pyproject.toml allows,
# or with those of NVIDIA's container, in an environment of their own (tools/setup_light.sh).
#
#   tools/test_light.sh oldest|newest|container [PYTHON] [PYTEST ARGUMENT ...]
set -euo pipefail
cd "$(dirname "$0")/.."

versions=${1:?oldest, newest or container}
tools/setup_light.sh "$versions" "${2-}"
light=(core evidence study checkpoints merge pipeline reporting
    test_config.py test_prompt_sets.py test_records.py test_schema.py)
exec ".venv-$versions/bin/python" -m pytest --timeout=900 -m "not nemo" "${light[@]/#/tests/}" "${@:3}"
