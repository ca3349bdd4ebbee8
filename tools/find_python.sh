#!/bin/sh
# Print the path of the first Python 3.10 to 3.12 on this machine, preferring 3.11; or of the one
# that these versions are tested with. Looked for in PATH, then among pyenv's.
#
#   tools/find_python.sh [oldest|newest|container]
case ${1-} in
    '') wanted='3.11 3.12 3.10' ;;
    oldest) wanted=3.10 ;;
    newest | container) wanted=3.12 ;;
    *)
        echo "error: '$1' is none of oldest, newest, container" >&2
        exit 2
        ;;
esac

ask='import sys; print("%d.%d" % sys.version_info[:2])'
for version in $wanted; do
    for python in "python$version" python3 "$HOME/.pyenv/versions/$version".*/bin/python; do
        # a shim of pyenv's may be in PATH and lead nowhere
        if [ "$("$python" -c "$ask" 2>/dev/null)" = "$version" ]; then
            command -v "$python"
            exit
        fi
    done
done
echo "error: no Python $(echo "$wanted" | sed 's/ /, /g') found:" \
    "apt-get install python${wanted%% *} python${wanted%% *}-venv" >&2
exit 1
