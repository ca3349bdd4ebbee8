#!/bin/sh
# Print the path of the first Python 3.10 to 3.12 on this machine, preferring 3.11.
for name in python3.11 python3.12 python3.10 python3; do
    if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
        command -v "$name"
        exit
    fi
done
echo "error: no Python 3.10, 3.11 or 3.12 found: apt-get install python3.11 python3.11-venv" >&2
exit 1
