#!/bin/bash
# Install the Debian/Ubuntu packages that tests and demo use, as root or with password-less sudo.
# Without either, or without apt, say what is missing and what will be skipped; never fail for it.
#
#   tools/setup_system.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo 3)
PATH=$PATH:/usr/sbin:/sbin
has_libpython='
import ctypes.util, os, sys, sysconfig
name = "python%d.%d" % sys.version_info[:2]
inside = os.path.join(sysconfig.get_config_var("LIBDIR") or "", "lib" + name + ".so.1.0")
sys.exit(not (os.path.exists(inside) or ctypes.util.find_library(name)))'

missing=()
reasons=()
need() { # PACKAGE WHAT-HAPPENS-WITHOUT-IT COMMAND-THAT-PROVES-IT...
    local package=$1 reason=$2
    if ! "${@:3}" >/dev/null 2>&1; then
        missing+=("$package")
        reasons+=("  $package: without it $reason")
    fi
}
need python3 "nothing works" tools/find_python.sh
need "python$version-venv" "no virtual environment can be made" "$python" -c 'import ensurepip'
need "libpython$version" "the reward servers cannot start" "$python" -c "$has_libpython"
need git "records name the version without its commit" command -v git
need shellcheck "the shell scripts are not linted" command -v shellcheck
need slurm-client "tests on a real Slurm are skipped" command -v sbatch
need slurmctld "tests on a real Slurm are skipped" command -v slurmctld
need slurmd "tests on a real Slurm are skipped" command -v slurmd
need munge "tests on a real Slurm are skipped" command -v munged
need libpmix-dev "no test has Slurm start MPI's ranks" test -e \
    "/usr/lib/$(uname -m)-linux-gnu/pmix2/lib/libpmix.so"
need openmpi-bin "no test has mpirun start ranks" command -v mpirun
need chromium "the report's page is not looked at in a browser" command -v chromium

[[ ${#missing[@]} -eq 0 ]] && exit 0

as_root=()
if [[ $EUID -ne 0 ]]; then
    as_root=(sudo -n)
fi
if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
    echo "missing system packages (no apt-get, or neither root nor sudo without a password):"
    printf '%s\n' "${reasons[@]}"
    echo "to install them: sudo apt-get install ${missing[*]}"
    exit 0
fi

install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get)
"${install[@]}" update -q || true # a dead mirror is no reason not to try
# No service is started on the way: the tests run their own Slurm.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee $policy >/dev/null
    "${as_root[@]}" chmod +x $policy
    trap '"${as_root[@]}" rm -f $policy' EXIT
fi
for package in "${missing[@]}"; do # one by one: one that is unknown here must not stop the others
    "${install[@]}" install -q -y --no-install-recommends "$package" ||
        echo "could not install $package; go on without it"
done
