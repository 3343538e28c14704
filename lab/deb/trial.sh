#!/bin/sh
# Installs the package, uses features that need no traceable kernel, and purges the package.
# Runs as root in a fresh Debian tree with the package's dependencies but not the package itself.
# Arguments: the package, its version, a recording of a client refused by a full accept queue.
set -eu
package=$1 version=$2 recording=$3

fail() {
	echo "trial: $*" >&2
	exit 1
}

# Lists all files except those that dpkg itself and other packages' triggers write.
files() {
	find / \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /trial \
		-o -path /var/lib/dpkg -o -path /var/log -o -path /var/cache/man \) -prune \
		-o -print | sort
}

# Runs a command, saves and prints its output, and checks its exit status.
refused() {
	expected=$1
	shift
	status=0
	"$@" >/trial/said 2>&1 || status=$?
	cat /trial/said
	[ "$status" = "$expected" ] || fail "$* ended with $status, not $expected"
}

files >/trial/before
dpkg --install "$package"

[ "$(tcpstuck-trace --version)" = "tcpstuck-trace $version" ] || fail "--version"
tcpstuck-trace --help | grep -q '^usage: tcpstuck-trace' || fail "--help"
tcpstuck-trace --explain ack-missing | grep -q '^Proves' || fail "--explain"
man tcpstuck-trace | grep -q 'EXIT STATUS' || fail "the manual page"
man -k tcpstuck-trace | grep -q SYN || man -w tcpstuck-trace
bash -n /usr/share/bash-completion/completions/tcpstuck-trace || fail "completion for bash"
[ -s /usr/share/zsh/vendor-completions/_tcpstuck-trace ] || fail "completion for zsh"
[ -s /usr/share/doc/tcpstuck-trace/schema/tcpstuck.schema.json ] || fail "the JSON Schema"

systemd-analyze verify tcpstuck-trace.service || fail "the unit"
enabled=$(systemctl is-enabled tcpstuck-trace.service 2>&1 || true)
[ "$enabled" = disabled ] || fail "the unit is $enabled"

refused 1 tcpstuck-trace --replay "$recording"
grep -q '!accept-queue-full' /trial/said || fail "--replay"
refused 3 setpriv --reuid=65534 --regid=65534 --clear-groups tcpstuck-trace -p 3311
[ "$(wc -l </trial/said)" = 3 ] || fail "not three lines"
grep -q 'remedy: run it as root: sudo tcpstuck-trace$' /trial/said || fail "no remedy"
python3 -c 'from bcc import BPF' || fail "BCC"
# Stand-in for the tool's cache of compiled programs.
mkdir -m 0700 /var/cache/tcpstuck-trace
touch /var/cache/tcpstuck-trace/kept

dpkg --remove tcpstuck-trace
[ -e /etc/default/tcpstuck-trace ] || fail "the options file is gone before the purge"
dpkg --purge tcpstuck-trace
files >/trial/after
diff /trial/before /trial/after || fail "the purge left files, or removed too many"
echo "trial: installed, used, removed and purged"
