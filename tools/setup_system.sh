#!/bin/bash
# Install the Debian/Ubuntu packages that tests and demo use, as root or with password-less sudo.
# Without either, or without apt, say what is missing and what will be skipped; never fail for it.
set -euo pipefail

# command or file that proves a package -> package : what is skipped without it
needs=(
    "python3-venv:python3 -c 'import ensurepip':the virtual environment cannot be made"
    "git:command -v git:records name the version without its commit"
    "shellcheck:command -v shellcheck:the shell scripts are not linted"
    "slurm-client:command -v sbatch:tests on a real Slurm are skipped"
    "slurmctld:command -v slurmctld:tests on a real Slurm are skipped"
    "slurmd:command -v slurmd:tests on a real Slurm are skipped"
    "munge:command -v munged:tests on a real Slurm are skipped"
)

missing=()
reasons=()
for need in "${needs[@]}"; do
    IFS=: read -r package proof reason <<<"$need"
    if ! PATH="$PATH:/usr/sbin:/sbin" bash -c "$proof" >/dev/null 2>&1; then
        missing+=("$package")
        reasons+=("  $package: without it $reason")
    fi
done
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
