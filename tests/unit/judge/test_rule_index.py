"""Which rules a packet may match, by its addresses, ports and device, and at what cost."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.judge import rule_index
from tcpstuck_bpf.judge.rule_index import MOST_SUSPECTS, Matching, Packet, RuleIndex, index_of
from tcpstuck_bpf.model import FourTuple, address_bytes
from tcpstuck_bpf.rulesets import DropRule, Jump, Ruleset

Conditions = tuple[tuple[str, str], ...]


def who(client: str = "10.0.0.1", server: str = "192.0.2.1", port: int = 40_000) -> FourTuple:
    return FourTuple(address_bytes(client), address_bytes(server), port, 3311, 7)


def rule(chain: str, number: int, conditions: Conditions = (), hook: str = "") -> DropRule:
    return DropRule("inet", "t", chain, hook, "handle", number, conditions)


def jump(chain: str, target: str, conditions: Conditions = (), hook: str = "") -> Jump:
    return Jump("inet", "t", chain, hook, target, conditions)


def matching(ruleset: Ruleset, packet: Packet | None = None) -> Matching:
    return index_of(ruleset).matching(packet or Packet(who(), "input", None))


def numbers(ruleset: Ruleset, packet: Packet | None = None) -> list[int]:
    return [ruleset.rules[place].number for place in matching(ruleset, packet).rules]


def test_a_rule_counts_only_where_its_chain_is_come_to() -> None:
    ruleset = Ruleset(
        (rule("base", 1, hook="input"), rule("one", 2), rule("other", 3), rule("late", 4)),
        (),
        jumps=(
            jump("base", "one", (("dport", "3311"),), "input"),
            jump("base", "other", (("dport", "3312"),), "input"),
            jump("one", "late", (("saddr", "10.0.0.0/8"),)),
            jump("late", "one"),
        ),
    )
    assert numbers(ruleset) == [1, 2, 4]
    assert numbers(ruleset, Packet(who("198.51.100.1"), "input", None)) == [1, 2]
    assert numbers(ruleset, Packet(who(), None, None)) == [1, 2, 4]
    assert numbers(ruleset, Packet(who(), "prerouting", None)) == []
    assert numbers(ruleset, Packet(who("2001:db8::1", "2001:db8::2"), "input", None)) == [1, 2]


@pytest.mark.parametrize(("end", "port"), [("dport", 3311), ("sport", 40_000)])
def test_a_range_of_ports_has_both_its_ends(end: str, port: int) -> None:
    ranges = (
        (f"{port}", True),
        (f"{port}:{port}", True),
        (f"1:{port}", True),
        (f"{port}:65535", True),
        (f"1:{port - 1}", False),
        (f"{port + 1}:65535", False),
    )
    rules = tuple(rule("base", n, ((end, ports),), "input") for n, (ports, _) in enumerate(ranges))
    expected = [n for n, (_, holds_port) in enumerate(ranges) if holds_port]
    assert numbers(Ruleset(rules, ())) == expected


def test_a_jump_to_a_chain_that_drops_nothing_leads_nowhere() -> None:
    """The rules of a chain that drops nothing are not kept."""
    ruleset = Ruleset(
        (rule("base", 1, hook="input"),), (), jumps=(jump("base", "accepts", hook="input"),)
    )
    assert matching(ruleset) == Matching((0,), incomplete=False)


@pytest.mark.parametrize(
    ("client", "server", "expected"),
    [("10.0.0.1", "192.0.2.1", [4, 0]), ("2001:db8::1", "2001:db8::2", [6, 0])],
)
def test_a_rule_for_the_other_ip_version_is_ruled_out(
    client: str, server: str, expected: list[int]
) -> None:
    rules = (
        rule("base", 4, (("nfproto", "ipv4"),), "input"),
        rule("base", 6, (("nfproto", "ipv6"),), "input"),
        rule("base", 0, hook="input"),
    )
    assert numbers(Ruleset(rules, ()), Packet(who(client, server), "input", None)) == expected


addresses = st.sampled_from(["10.0.0.1", "10.1.0.1", "10.0.255.255", "192.0.2.7", "::1", "x"])
conditions = st.lists(
    st.one_of(
        st.tuples(
            st.just("saddr"), st.builds(lambda a, n: f"{a}/{n}", addresses, st.integers(0, 33))
        ),
        st.tuples(
            st.just("sport"), st.sampled_from(["1:65535", "40000", "1:39999", "1:40000", "http"])
        ),
        st.tuples(st.just("daddr"), st.sampled_from(["192.0.2.0/24", "192.0.3.0/24"])),
    ),
    max_size=3,
)


def holds(name: str, value: str, packet: FourTuple) -> bool:
    """The plain way."""
    try:
        if name == "sport":
            low, _, high = value.partition(":")
            return int(low) <= packet.client_port <= int(high or low)
        address = packet.client_ip if name == "saddr" else packet.server_ip
        return ipaddress.ip_address(address) in ipaddress.ip_network(value, strict=False)
    except ValueError:
        return True


@given(st.lists(conditions, max_size=6), st.sampled_from(["10.0.0.1", "10.1.0.9", "192.0.2.7"]))
def test_what_is_found_is_what_each_rule_by_itself_says(
    each: list[list[tuple[str, str]]], client: str
) -> None:
    rules = tuple(rule("base", n, tuple(own), "input") for n, own in enumerate(each))
    packet = who(client)
    expected = [n for n, own in enumerate(each) if all(holds(*c, packet) for c in own)]
    assert numbers(Ruleset(rules, ()), Packet(packet, "input", None)) == expected


@pytest.mark.parametrize(
    ("pattern", "device", "can_be"),
    [
        ("veth0", None, True),
        ("eth7", None, False),
        ("veth*", None, True),
        ("eth*", None, False),
        ("veth0", 2, True),
        ("veth1", 2, False),
        ("veth*", 2, True),
        ("eth7", 99, True),
    ],
)
def test_a_rule_for_another_device_is_ruled_out(
    pattern: str, device: int | None, can_be: bool
) -> None:
    """If the packet's device is unknown, only a device that does not exist rules a rule out."""
    devices = ((1, "lo"), (2, "veth0"), (3, "veth1"))
    ruleset = Ruleset((rule("base", 1, (("iifname", pattern),), "input"),), (), devices=devices)
    assert bool(numbers(ruleset, Packet(who(), "input", device))) == can_be
    unknown = ruleset._replace(devices=None)
    assert numbers(unknown, Packet(who(), "input", device)) == [1]


def test_many_suspects_are_cut_off_and_that_is_said() -> None:
    some = Ruleset(tuple(rule("base", n, hook="input") for n in range(MOST_SUSPECTS)), ())
    assert (len(numbers(some)), matching(some).incomplete) == (MOST_SUSPECTS, False)
    more = some._replace(rules=(*some.rules, rule("base", 99, hook="input")))
    assert (len(numbers(more)), matching(more).incomplete) == (MOST_SUSPECTS, True)


def cost(index: RuleIndex, packet: Packet) -> int:
    before = index.steps_left
    index.matching(packet)
    return before - index.steps_left


def test_a_chain_is_looked_at_once_however_many_jumps_lead_to_it() -> None:
    number = 1500
    ruleset = Ruleset(
        tuple(rule("inner", n, (("saddr", f"198.51.{n >> 8}.{n & 255}"),)) for n in range(number)),
        (),
        jumps=tuple(jump("base", "inner", (), "input") for _ in range(number)),
    )
    index = RuleIndex(ruleset)
    assert cost(index, Packet(who(), "input", None)) < 4 * number
    assert index.matching(Packet(who("198.51.1.7"), "input", None)).rules == (263,)


def test_rules_for_single_clients_are_found_without_a_look_at_the_others() -> None:
    rules = tuple(
        rule("base", n, (("saddr", f"10.9.{n >> 8}.{n & 255}"),), "input") for n in range(5000)
    )
    index = RuleIndex(Ruleset(rules, ()))
    first = cost(index, Packet(who(), "input", None))
    assert first < 2 * len(rules)
    later = [cost(index, Packet(who(f"10.9.0.{n}"), "input", None)) for n in range(100)]
    assert max(later) <= 4


def test_a_look_for_networks_of_each_length_is_paid_for() -> None:
    """Else somebody's rules could make more work than is counted."""
    rules = tuple(rule("base", n, (("saddr", f"10.9.0.0/{n}"),), "input") for n in range(16, 33))
    index = RuleIndex(Ruleset(rules, ()))
    elsewhere = Packet(who("198.51.100.1"), "input", None)
    index.matching(elsewhere)
    assert cost(index, elsewhere) >= len(rules)


def test_each_further_listener_pays_for_the_look_at_all_rules() -> None:
    """Though none of them is for it."""
    rules = tuple(rule("base", n, (("dport", "1"),), "input") for n in range(100))
    index = RuleIndex(Ruleset(rules, ()))
    for server in ("192.0.2.1", "192.0.2.2"):
        packet = Packet(who(server=server), "input", None)
        assert cost(index, packet) >= len(rules)
        assert cost(index, packet) < 10


def test_a_ruleset_that_makes_too_much_work_is_judged_no_more_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Anybody may have rules that each packet has to be held against, one by one."""
    monkeypatch.setattr(rule_index, "MOST_STEPS", 1000)
    ports = tuple(rule("base", n, (("sport", str(n)),), "input") for n in range(100))
    index = RuleIndex(Ruleset(ports, ()))
    found = [index.matching(Packet(who(port=n), "input", None)) for n in range(20)]
    assert found[0] == Matching((0,), incomplete=False)
    assert found[-1].incomplete
    servers = RuleIndex(Ruleset(ports, ()))
    found = [servers.matching(Packet(who(server=f"192.0.2.{n}"), "input", None)) for n in range(20)]
    assert found[-1] == Matching((), incomplete=True)


def test_readings_that_share_their_rules_share_their_index() -> None:
    ruleset = Ruleset((rule("base", 1, hook="input"),), ())
    assert index_of(ruleset) is index_of(ruleset._replace(problems=("one",), read_ns=7))
    same = Ruleset((rule("base", 1, hook="input"),), ())
    assert index_of(same) is not index_of(ruleset)


def test_namespaces_whose_drops_are_told_by_turns_each_keep_their_index() -> None:
    several = [Ruleset((rule("base", n, hook="input"),), ()) for n in range(10)]
    first = [index_of(ruleset) for ruleset in several]
    again = [index_of(ruleset) for ruleset in several]
    assert all(one is other for one, other in zip(first, again))


def test_indexes_of_many_rules_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was let go with its reading is not to be kept here."""
    monkeypatch.setattr(rule_index, "_INDEXED_RULES", 100)
    for number in range(20):
        index_of(Ruleset(tuple(rule("base", n + number, hook="input") for n in range(30)), ()))
    assert sum(index.ruleset.size for index in rule_index._indexes.values()) <= 100
    large = Ruleset(tuple(rule("base", n, hook="input") for n in range(500)), ())
    assert index_of(large) is index_of(large)


def test_few_views_of_many_rules_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule_index, "_VIEWED_RULES", 100)
    index = RuleIndex(Ruleset(tuple(rule("base", n, hook="input") for n in range(30)), ()))
    for n in range(50):
        index.matching(Packet(who(server=f"192.0.2.{n}"), "input", None))
    assert len(index._views) == 4


def test_few_indexes_are_kept() -> None:
    first = Ruleset((rule("base", 1, hook="input"),), ())
    kept = index_of(first)
    for number in range(2, 100):
        index_of(Ruleset((rule("base", number, hook="input"),), ()))
    assert index_of(first) is not kept
