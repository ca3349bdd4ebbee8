#!/bin/bash
# Make the environment of the light tests, .venv-oldest, .venv-newest or .venv-container: what needs
# no NeMo, with the oldest or newest versions that pyproject.toml allows, or the container's.
#
#   tools/setup_light.sh oldest|newest|container [PYTHON]
#
# Made once, and again when what it installs changes; `rm -r .venv-newest` looks for newer ones.
set -euo pipefail
cd "$(dirname "$0")/.."

versions=${1:?oldest, newest or container}
python=${2:-$(tools/find_python.sh "$versions")}
venv=.venv-$versions
ready=$venv/.ready
constraints=()
case $versions in
    oldest | container) constraints=(-c "constraints/$versions.txt") ;;
    newest) ;;
    *) echo "error: '$versions' is none of oldest, newest, container" >&2; exit 2 ;;
esac

same_python() {
    [[ -x $venv/bin/python && $("$venv/bin/python" -c "$ask") == "$version" ]]
}

up_to_date() {
    [[ -e $ready ]] && same_python || return
    for source in pyproject.toml tools/setup_light.sh "${constraints[@]:1}"; do
        [[ $ready -nt $source ]] || return
    done
}

ask='import sys; print(sys.version)'
version=$("$python" -c "$ask")
up_to_date && exit

rm -f "$ready"
same_python || "$python" -m venv --clear "$venv"
# not compiled: Python compiles what it imports, and that is a small part
install=("$venv/bin/python" -m pip --disable-pip-version-check install -q --no-compile)
install+=("${constraints[@]}")
index=$(tools/torch_index.sh)
"${install[@]}" --no-deps --retries 1 ${index:+--extra-index-url "$index"} torch
"${install[@]}" -e '.[data,judge]' \
    hypothesis protobuf pytest pytest-timeout pytest-xdist safetensors sentencepiece
touch "$ready"
