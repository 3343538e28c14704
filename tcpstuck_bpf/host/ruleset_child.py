"""Reads the firewall rules of one network namespace that can drop packets, and changes nothing.

It runs `nft -j` and `iptables-save` inside the namespace. Neither is run if it would make the
kernel load a module, so only rules in use are read. A stranger may have made any number of rules,
so `ruleset_reader` starts this as a child process with limits of time and memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tcpstuck_bpf.host import kallsyms, netfilter_hooks, netns
from tcpstuck_bpf.host.netns_cookie import own_cookie
from tcpstuck_bpf.host.nftables_text import nftables_rules
from tcpstuck_bpf.host.programs import ENVIRONMENT, find_program
from tcpstuck_bpf.host.ruleset_text import STRANGE, Parts, no_parts, reachable
from tcpstuck_bpf.host.xtables_text import xtables_rules
from tcpstuck_bpf.rulesets import DropRule, Ruleset

CPU_LIMIT_S = 60
"""Seconds of processor time for this process and for each program it runs. The size of the input
already bounds the work; this limit ends an endless loop. A start of the tool itself has taken seven
seconds in an emulated machine on shared processors.
"""
MEMORY_LIMIT = 256 << 20
"""Bytes of private memory for this process and each program it runs; 5 000 rules take 50 MiB."""
MOST_TEXT = 32 << 20
"""Largest output of one program in bytes: 60 000 rules. Parsed, it takes six times as much."""
MOST_RULES = 20_000
"""Largest number of relevant rules and jumps returned for one namespace."""

_MODULE = Path("/sys/module/nf_tables")
_BUILT_INTO_KERNEL = "nft_do_chain"
"""A function of nf_tables that kallsyms shows if nf_tables is built into the kernel."""
_OWN_NET = Path("/proc/thread-self/net")
_LEGACY = (("ip", "iptables", "ip_tables_names"), ("ip6", "ip6tables", "ip6_tables_names"))
_CONNTRACK = (
    ("nf_conntrack_in", ("prerouting", "output"), ("drop",)),
    ("nf_confirm", ("input", "postrouting"), ("drop", "insert_failed", "chainlength")),
)
"""Functions of connection tracking, their hooks, and the columns that count the packets they drop.
The last column is missing before 5.15 (nf_conntrack_standalone.c)."""
_MOST_DEVICES = 4096
"""Largest number of device names returned; with more devices none are."""
_MOST_ANSWER = 16 << 20
"""Largest answer in characters; MOST_RULES take a quarter of it, unless their names are long."""
NICENESS = 10
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _end_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends (prctl(2))."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _TooMuchError(Exception):
    """A program printed more than MOST_TEXT bytes."""


def _output(command: Sequence[str]) -> str:
    """Run a program and return its output. Raises OSError, SubprocessError and _TooMuchError."""
    program = find_program(command[0])
    if program is None:
        raise FileNotFoundError(2, "it is not installed", command[0])
    with subprocess.Popen(
        [program, *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=_end_with_parent,
        env=ENVIRONMENT,
    ) as running:
        assert running.stdout is not None
        text = running.stdout.read(MOST_TEXT + 1)
        if len(text) > MOST_TEXT:
            running.kill()
            raise _TooMuchError
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, command[0])
    return text.decode("utf-8", "replace")


def _legacy_command(program: str) -> Sequence[str] | None:
    """The command that lists the legacy tables; None if none is installed.

    `iptables-save` may be the nf_tables variant, which lists other tables with the same names.
    """
    if find_program(f"{program}-legacy-save"):
        return (f"{program}-legacy-save", "-c")
    if find_program("xtables-legacy-multi"):
        return ("xtables-legacy-multi", f"{program}-save", "-c")
    with contextlib.suppress(OSError, subprocess.SubprocessError, _TooMuchError):
        if "nf_tables" not in _output((f"{program}-save", "-V")):
            return (f"{program}-save", "-c")
    return None


class _Reading:
    """The rules and problems found so far."""

    def __init__(self) -> None:
        self.parts = no_parts()
        self.problems: list[str] = []
        self.elsewhere: list[str] = []
        self.tables_read: set[str] = set()

    def read(
        self, command: Sequence[str], parse: Callable[[str], Parts], problems: list[str]
    ) -> bool:
        """Add the rules that a program lists; False if they cannot be read."""
        try:
            parts = reachable(parse(_output(command)))
        except _TooMuchError:
            problems.append(f"{command[0]} lists too many rules to be read")
            return False
        except MemoryError:
            problems.append(f"reading the rules of {command[0]} takes too much memory")
            return False
        except (OSError, subprocess.SubprocessError, *STRANGE) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            problems.append(f"the rules of {command[0]} cannot be read: {why}")
            return False
        problems.extend(parts.problems)
        room = max(0, MOST_RULES - len(self.parts.rules) - len(self.parts.jumps))
        if len(parts.rules) + len(parts.jumps) > room:
            problems.append(f"there are more than {MOST_RULES} rules: not all of them are checked")
        self.parts.rules.extend(parts.rules[:room])
        self.parts.packets.extend(parts.packets[:room])
        self.parts.jumps.extend(parts.jumps[: max(0, room - len(parts.rules))])
        self.parts.chains.update(parts.chains)
        self.parts.mentioned.update(parts.mentioned)
        return True

    def read_nftables(self) -> None:
        """Read the rules of nf_tables, if it is in use."""
        if _MODULE.exists() or kallsyms.function_symbols([_BUILT_INTO_KERNEL]):
            self.read(("nft", "-j", "list", "ruleset"), nftables_rules, self.problems)

    def read_legacy(self) -> None:
        """Read the tables of ip_tables and ip6_tables, if there are any."""
        for family, program, names in _LEGACY:
            try:
                tables = (_OWN_NET / names).read_text("ascii").split()
            except FileNotFoundError:
                continue
            except OSError as error:
                self.elsewhere.append(
                    f"it is unknown whether {program} has legacy tables: {error.strerror}"
                )
                continue
            if not tables:
                continue
            command = _legacy_command(program)
            if command is None:
                self.elsewhere.append(
                    f"{program} has legacy tables ({', '.join(tables)}), but "
                    f"{program}-legacy-save, which lists them, is not installed"
                )
            elif self.read(command, partial(xtables_rules, family=family), self.elsewhere):
                self.tables_read.add(family)

    def read_others(self, devices: Sequence[tuple[int, str]]) -> None:
        """Add what else at the hooks can drop packets."""
        others = netfilter_hooks.besides_rules(
            self.parts.chains,
            self.tables_read,
            self.parts.mentioned,
            [name for _, name in devices],
        )
        for rule in others.rules:
            self.parts.add(rule, None)
        self.elsewhere.extend(others.problems)
        for function, hooks, columns in _CONNTRACK:
            dropped = _conntrack_drops(_OWN_NET / "stat" / "nf_conntrack", columns)
            for family in ("ip", "ip6") if dropped is not None else ():
                for hook in hooks:
                    rule = DropRule(family, "nf_conntrack", function, hook, "function", 0, ())
                    self.parts.add(rule, dropped)


def _conntrack_drops(statistics: Path, columns: Sequence[str]) -> int | None:
    """Packets that connection tracking dropped in this namespace; None if it is not in use.

    The file has a line of names, then a line of hexadecimal numbers for each CPU.
    """
    try:
        names, *cpus = (line.split() for line in statistics.read_text("ascii").splitlines())
        places = [names.index(column) for column in columns if column in names]
        return sum(int(cpu[place], 16) for cpu in cpus for place in places)
    except (OSError, ValueError, IndexError):
        return None


def read_own() -> Ruleset:
    """The current rules that can drop packets in the calling thread's network namespace."""
    reading = _Reading()
    devices = socket.if_nameindex()
    reading.read_nftables()
    reading.read_legacy()
    reading.read_others(devices)
    return Ruleset(
        tuple(reading.parts.rules),
        tuple(reading.problems),
        0,
        tuple(reading.parts.jumps),
        tuple(reading.parts.packets),
        tuple(dict.fromkeys(reading.elsewhere)),
        tuple(devices) if len(devices) <= _MOST_DEVICES else None,
        time.monotonic_ns(),
        own_cookie(),
    )


def main(inode: int) -> int:
    """Print the Ruleset of the network namespace with this inode number, as JSON."""
    _end_with_parent()
    # Other processes of this machine go first; no verdict waits for this one.
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S + 1))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    try:
        answer = json.dumps(netns.run_in(inode, read_own))
        if len(answer) > _MOST_ANSWER:
            answer = _refusal("their names are too long")
    except OSError as error:
        answer = _refusal(f"network namespace {inode}: {error.strerror}")
    except MemoryError:
        answer = _refusal(f"reading them takes more than {MEMORY_LIMIT >> 20} MiB")
    sys.stdout.write(answer)
    return 0


def _refusal(why: str) -> str:
    """The answer of a reading that failed."""
    return json.dumps(Ruleset((), (f"the rules cannot be read: {why}",)))
