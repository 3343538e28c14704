#!/bin/bash
# Installs what the lab, the tests and the tool's development need on a Debian machine, and prints
# each step. If everything is installed, the script changes nothing and ends quickly.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

# mariadb-server-core, because mariadb-server would start a service. Neither a kernel nor kernel
# headers: guests boot a kernel from a cache.
packages=(
	python3-bpfcc python3-venv python3-pyelftools python3-tabulate
	gcc libc6-dev make git clang-format
	qemu-system-x86 udev kmod file mmdebstrap bubblewrap zstd lz4 lzop
	iproute2 iptables nftables tcpdump tshark
	mariadb-server-core mariadb-client-core
	python3-jsonschema man-db mandoc zsh tmux
)
venv=.venv
stamp=$venv/.setup-stamp

say() { printf 'setup: %s\n' "$*"; }

as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo "$@"
	else
		say "cannot run $1: not root and no sudo; run this as root" >&2
		exit 1
	fi
}

# Runs a command quietly; prints its output only if it fails.
quietly() {
	local log
	log=$(mktemp)
	if ! "$@" >"$log" 2>&1; then
		tail -n 20 "$log" >&2
		rm -f "$log"
		say "failed: $*" >&2
		return 1
	fi
	rm -f "$log"
}

apt() {
	quietly as_root env DEBIAN_FRONTEND=noninteractive \
		apt-get -qq -o DPkg::Lock::Timeout=300 "$@"
}

missing=()
for package in "${packages[@]}"; do
	state=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
	[ "$state" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
	say "installing ${missing[*]}"
	apt update
	apt install --no-install-recommends -y "${missing[@]}"
fi

# Use the distribution's interpreter, because the bcc package is installed for it.
fingerprint=$({ cat setup.cfg pyproject.toml; /usr/bin/python3 --version; pwd; } | sha256sum)
if [ "$(cat $stamp 2>/dev/null)" != "$fingerprint" ]; then
	say "creating the virtual environment $venv"
	quietly /usr/bin/python3 -m venv --system-site-packages $venv
	export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
	# compat: a path entry instead of an import hook, which every interpreter start would load.
	quietly $venv/bin/python -m pip install --quiet --config-settings editable_mode=compat \
		--editable '.[dev]'
	printf '%s\n' "$fingerprint" >$stamp
fi

fetch() { $venv/bin/python -m lab fetch; }
if ! fetched=$(fetch 2>/dev/null); then
	say "refreshing the package lists"
	apt update
	fetched=$(fetch)
fi
while read -r line; do
	case $line in
	*"already in the cache") ;;
	*) say "for guests: $line" ;;
	esac
done <<<"$fetched"
say "everything is installed"
