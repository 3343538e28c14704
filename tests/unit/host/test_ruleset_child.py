"""What is read of a network namespace's rules, what could not be read, and within which limits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tcpstuck_bpf.host import (
    kallsyms,
    netfilter_hooks,
    netns,
    programs,
    ruleset_child,
    ruleset_reader,
)
from tcpstuck_bpf.host.netfilter_hooks import Others
from tcpstuck_bpf.host.ruleset_child import read_own
from tcpstuck_bpf.host.ruleset_reader import LIMIT_S, read_ruleset
from tcpstuck_bpf.rulesets import Ruleset

RULESET = """
add table inet guard
add chain inet guard acks { type filter hook input priority 0; policy accept; }
add chain inet guard closed { type filter hook prerouting priority 0; policy drop; }
add chain inet guard sub
add chain inet guard unused
add rule inet guard unused drop
add rule inet guard acks udp dport 9 counter accept
add rule inet guard acks ip saddr 10.0.0.0/8 tcp dport 3311 jump sub
add rule inet guard sub tcp sport != 1024 counter drop
add rule inet guard sub tcp dport vmap { 22 : accept, 23 : drop }
add rule inet guard sub iifname "eth*" tcp dport {80, 81} reject
"""
SAVED = "*filter\n:INPUT ACCEPT [0:0]\n[5:300] -A INPUT -p tcp -j TARPIT\nCOMMIT\n"


class Machine:
    """A namespace in which only that is in use which a test says."""

    def __init__(self, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.net = net
        self.installed: set[str] = set()
        self.prints: dict[str, str] = {}
        self.run: list[str] = []
        monkeypatch.setattr(ruleset_child, "_MODULE", net / "missing")
        monkeypatch.setattr(kallsyms, "_SYMBOLS", net / "missing")
        monkeypatch.setattr(ruleset_child, "_OWN_NET", net)
        monkeypatch.setattr(
            ruleset_child, "find_program", lambda name: name if name in self.installed else None
        )
        monkeypatch.setattr(ruleset_child, "_output", self.output)
        monkeypatch.setattr(netfilter_hooks, "besides_rules", lambda *_: Others((), ()))
        self.monkeypatch = monkeypatch

    def output(self, command: Sequence[str]) -> str:
        words = " ".join(command)
        self.run.append(words)
        if command[0] not in self.installed:
            raise FileNotFoundError(2, "it is not installed")
        return self.prints[words]

    def prints_ruleset(self, text: str) -> None:
        self.monkeypatch.setattr(ruleset_child, "_MODULE", self.net)
        self.installed.add("nft")
        self.prints["nft -j list ruleset"] = text


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"nftables": [{"rule": {}}]}', "nonsense"])
def test_what_is_no_ruleset_is_a_problem_that_is_told(text: str, machine: Machine) -> None:
    machine.prints_ruleset(text)
    told = read_own()
    assert told.rules == ()
    assert "the rules of nft cannot be read" in told.problems[0]


@pytest.mark.parametrize(
    "odd",
    [
        {"xt": "DROP"},
        {"vmap": ["a"]},
        {"match": {"op": "==", "left": {"meta": "l4proto"}, "right": "tcp"}},
        {"match": {"op": "==", "left": {"payload": "tcp dport"}, "right": 1}},
    ],
)
def test_a_rule_of_an_unusual_shape_is_a_problem_that_is_told(
    odd: object, machine: Machine
) -> None:
    chain = {"family": "ip", "table": "t", "name": "c", "hook": "input"}
    rules = [
        {"family": "ip", "table": "t", "chain": "c", "handle": number, "expr": [expression]}
        for number, expression in enumerate(({"drop": None}, odd))
    ]
    items = [{"chain": chain}, *({"rule": rule} for rule in rules)]
    machine.prints_ruleset(json.dumps({"nftables": items}))
    told = read_own()
    assert told.rules == ()
    assert "the rules of nft cannot be read" in told.problems[0]


def of_rules(number: int) -> str:
    chain = {"family": "ip", "table": "t", "name": "c", "hook": "input"}
    rule = {"family": "ip", "table": "t", "chain": "c", "handle": 1, "expr": [{"drop": None}]}
    return json.dumps({"nftables": [{"chain": chain}, *[{"rule": rule}] * number]})


def test_no_more_rules_are_handed_over_than_are_kept_and_it_is_said(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ruleset_child, "MOST_RULES", 3)
    machine.prints_ruleset(of_rules(3))
    assert (len(read_own().rules), read_own().problems) == (3, ())
    machine.prints_ruleset(of_rules(4))
    told = read_own()
    assert len(told.rules) == len(told.packets) == 3
    assert "more than 3 rules" in told.problems[0]


def test_what_a_listing_does_not_tell_is_said(machine: Machine) -> None:
    table = {"table": {"family": "ip", "name": "t", "flags": "t"}}
    machine.prints_ruleset(json.dumps({"nftables": [table]}))
    assert "dormant" in read_own().problems[0]


def save_as(machine: Machine, program: str, *, version: str = "") -> None:
    machine.installed.add(program)
    machine.prints[f"{program} -c"] = SAVED
    machine.prints[f"{program} -V"] = version


@pytest.mark.parametrize(
    ("program", "version", "is_read"),
    [
        ("iptables-legacy-save", "", True),
        ("iptables-save", "iptables-save v1.8.9 (legacy)", True),
        ("iptables-save", "iptables-save v1.6.1", True),
        ("iptables-save", "iptables-save v1.8.9 (nf_tables)", False),
        ("something else", "", False),
    ],
)
def test_legacy_tables_are_read_by_what_knows_them_or_it_is_said_that_they_were_not(
    program: str, version: str, is_read: bool, machine: Machine
) -> None:
    """nft's iptables-save lists tables of the same names, which are others."""
    (machine.net / "ip_tables_names").write_text("filter\n")
    save_as(machine, program, version=version)
    told = read_own()
    assert [(rule.kind, rule.number) for rule in told.rules] == [("number", 1)] * is_read
    assert told.packets == (5,) * is_read
    assert told.problems == ()
    assert len(told.elsewhere) == (not is_read)
    if not is_read:
        assert "iptables has legacy tables (filter)" in told.elsewhere[0]


def test_the_legacy_tables_of_each_family_are_looked_for(machine: Machine) -> None:
    (machine.net / "ip_tables_names").write_text("")
    assert read_own().elsewhere == ()
    (machine.net / "ip6_tables_names").write_text("raw\nfilter\n")
    assert "ip6tables has legacy tables (raw, filter)" in read_own().elsewhere[0]


def test_tables_that_may_not_be_looked_at_are_not_taken_for_none(machine: Machine) -> None:
    (machine.net / "ip_tables_names").mkdir()
    assert "unknown whether iptables has legacy tables" in read_own().elsewhere[0]


def test_where_legacy_tables_cannot_be_parsed_it_is_said(machine: Machine) -> None:
    (machine.net / "ip_tables_names").write_text("filter\n")
    save_as(machine, "iptables-legacy-save")
    machine.prints["iptables-legacy-save -c"] = ":INPUT\n"
    assert "the rules of iptables-legacy-save cannot be read" in read_own().elsewhere[0]


@pytest.mark.parametrize(
    ("statistics", "dropped"),
    [
        ("entries drop early_drop insert_failed\n0a 00 1f 00\n0a 00 00 00\n", (0, 0)),
        ("entries drop early_drop insert_failed\n0a 00 00 00\n0a 1f 00 02\n", (0x1F, 0x21)),
        ("entries drop insert_failed chainlength\n0a 01 02 04\n", (1, 7)),
        ("", None),
        ("entries found\n0a 1f\n", (0, 0)),
        ("entries drop\n0a\n", None),
    ],
)
def test_connection_tracking_is_a_suspect_with_the_kernels_own_counter(
    statistics: str, dropped: tuple[int, int] | None, machine: Machine
) -> None:
    (machine.net / "stat").mkdir()
    (machine.net / "stat" / "nf_conntrack").write_text(statistics)
    told = read_own()
    found = {(rule.family, rule.hook): n for rule, n in zip(told.rules, told.packets)}
    expected = {}
    if dropped is not None:
        for family in ("ip", "ip6"):
            expected.update({(family, hook): dropped[0] for hook in ("prerouting", "output")})
            expected.update({(family, hook): dropped[1] for hook in ("input", "postrouting")})
    assert found == expected
    assert all(rule.chain.startswith("nf_") for rule in told.rules)


def test_a_program_that_prints_too_much_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talking = tmp_path / "nft"
    talking.write_text("#!/bin/sh\nexec yes\n")
    talking.chmod(0o755)
    monkeypatch.setattr(programs, "PLACES", (str(tmp_path),))
    monkeypatch.setattr(ruleset_child, "_MODULE", tmp_path)
    monkeypatch.setattr(ruleset_child, "MOST_TEXT", 1 << 16)
    monkeypatch.setattr(ruleset_child, "_OWN_NET", tmp_path)
    assert read_own().problems == ("nft lists too many rules to be read",)


def in_child(program: str, monkeypatch: pytest.MonkeyPatch) -> Ruleset:
    monkeypatch.setattr(ruleset_reader, "_CHILD", program)
    return read_ruleset(netns.own_netns())


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("print('[')", "damaged"),
        ("print('[[], [], 0, 1]')", "damaged"),
        ("raise SystemExit(1)", "failed"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("import os; os.kill(os.getpid(), 24)", "too much processor time"),
    ],
)
def test_a_reader_that_fails_is_a_reading_that_says_so(
    program: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = in_child(program, monkeypatch)
    assert told.rules == ()
    assert why in told.problems[0]


def test_a_reader_that_hangs_is_ended_with_what_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it runs has a pipe open that nobody else has: it ends with the last process."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    program = (
        "from tcpstuck_bpf.host import ruleset_child; import sys, json; "
        f"ruleset_child._output(['sh', '-c', 'exec 3>{pipe}; read _ <{tmp_path}/nothing'])"
    )
    os.mkfifo(tmp_path / "nothing")
    monkeypatch.setattr(ruleset_reader, "LIMIT_S", 3.0)
    prefix = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    opened = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert "more than 3 s" in in_child(prefix + program, monkeypatch).problems[0]
        os.set_blocking(opened, True)
        assert os.read(opened, 1) == b""
    finally:
        os.close(opened)


LIMITED = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tcpstuck_bpf.host import ruleset_child; from tcpstuck_bpf import rulesets; "
    "ruleset_child.{limit}; "
    "ruleset_child.read_own = lambda: {greedy}; sys.exit(ruleset_child.main(int(sys.argv[2])))"
)


@pytest.mark.parametrize(
    ("limit", "greedy", "why"),
    [
        (
            "MEMORY_LIMIT = 100 << 20",
            "rulesets.Ruleset((), (str(len(bytes(200 << 20))),))",
            "reading them takes more than 100 MiB",
        ),
        ("CPU_LIMIT_S = 1", "all(True for _ in iter(int, 1))", "too much processor time"),
        (
            "_MOST_ANSWER = 100",
            "rulesets.Ruleset((), ('x' * 100,))",
            "their names are too long",
        ),
    ],
)
def test_a_reader_takes_no_more_than_its_limits(
    limit: str, greedy: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = in_child(LIMITED.format(limit=limit, greedy=greedy), monkeypatch)
    assert why in told.problems[0]


def test_a_namespace_that_is_gone_is_a_problem_and_no_error() -> None:
    ruleset = read_ruleset(1)
    assert ruleset.rules == ()
    assert "gone" in ruleset.problems[0]


READ = (
    "import json\n"
    "from tcpstuck_bpf.host import netns, ruleset_reader as reader\n"
    "print(json.dumps(reader.read_ruleset(netns.own_netns())))\n"
)


def in_own_namespace(*commands: str) -> tuple[list[str], Callable[[], Ruleset]]:
    """What shell commands print in a new namespace, and the rules that are read there then."""
    if os.geteuid() or shutil.which("nft") is None or shutil.which("unshare") is None:
        pytest.skip("takes root, nft and unshare")
    ended = subprocess.run(
        [
            "unshare",
            "-n",
            "sh",
            "-ec",
            f"{'; '.join(commands)}; exec '{sys.executable}' -c \"$0\"",
            READ,
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if "not supported" in ended.stderr or "Unable to initialize" in ended.stderr:
        pytest.skip("this kernel has no nf_tables")
    assert ended.returncode == 0, ended.stderr
    *printed, read = ended.stdout.splitlines()
    return printed, lambda: ruleset_reader.ruleset_of(json.loads(read))


def test_rules_are_read_as_nft_lists_them(tmp_path: Path) -> None:
    """In a namespace of its own, by the kernel's own nf_tables."""
    (tmp_path / "ruleset").write_text(RULESET)
    printed, read = in_own_namespace(f"nft -f {tmp_path}/ruleset", "nft -a list ruleset")
    handles = {
        line.split(" # handle ")[0].strip(): int(line.split(" # handle ")[1])
        for line in printed
        if " # handle " in line
    }
    expected = [
        next(h for rule, h in handles.items() if rule.startswith(begins))
        for begins in ("tcp sport != 1024", "tcp dport vmap", 'iifname "eth*"')
    ]
    told = read()
    by_rules = [rule for rule in told.rules if rule.family == "inet"]
    assert [(rule.hook, rule.chain, rule.kind, rule.number) for rule in by_rules] == [
        *(("", "sub", "handle", handle) for handle in expected),
        ("prerouting", "closed", "policy", 0),
    ]
    assert told.packets[:4] == (0, None, None, None)
    assert by_rules[2].conditions == (("iifname", "eth*"),)
    (jump,) = told.jumps
    assert (jump.hook, jump.chain, jump.target) == ("input", "acks", "sub")
    assert jump.conditions == (("saddr", "10.0.0.0/8"), ("protocol", "tcp"), ("dport", "3311"))
    assert told.devices == ((1, "lo"),)
    assert told.counted_ns > 0


def test_legacy_rules_are_read_from_a_namespace_and_missed_where_their_tool_is(
    tmp_path: Path,
) -> None:
    """An innocent rule of nft was named as the only one, beside a legacy rule that dropped."""
    if shutil.which("iptables-legacy") is None:
        pytest.skip("takes iptables-legacy")
    rule = "iptables-legacy -A INPUT -p tcp --dport 3311 -j NFQUEUE --queue-num 3"
    _, read = in_own_namespace(rule)
    told = read()
    assert [(r.table, r.chain, r.number) for r in told.rules if r.kind == "number"] == [
        ("filter", "INPUT", 1)
    ]
    for name in ("nft", "iptables-save"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    program = (
        "import json, tcpstuck_bpf.host.ruleset_child as child; "
        "from tcpstuck_bpf.host import programs; "
        f'programs.PLACES = ("{tmp_path}",); print(json.dumps(child.read_own().elsewhere))'
    )
    only = f"'{sys.executable}' -c '{program}'"
    printed, _ = in_own_namespace(rule, only)
    assert "legacy tables (filter)" in printed[0]
