"""Values as people write them: services and ranges, lengths of time, names of addresses."""

from __future__ import annotations

import io
import socket
import sys
from pathlib import Path

import pytest

from tcpstuck_bpf import run
from tcpstuck_bpf.cli import main
from tcpstuck_bpf.errors import EXIT_USAGE, UsageError
from tcpstuck_bpf.host import known_names
from tcpstuck_bpf.model import TraceFilter, address_bytes
from tcpstuck_bpf.option_values import length_of_time, listener_addresses, port_list
from tcpstuck_bpf.options import build_parser
from tcpstuck_bpf.usage import WrongValueError
from tests.replay.test_replay import recorded

SERVICES = {"mysql": 3306, "smtp": 25, "ms-sql-s": 1433}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a machine's files say, and no other."""

    def port(name: str, protocol: str) -> int:
        assert protocol == "tcp"
        if name not in SERVICES:
            raise OSError("service/proto not found")
        return SERVICES[name]

    monkeypatch.setattr(socket, "getservbyname", port)
    services, hosts = tmp_path / "services", tmp_path / "hosts"
    lines = (f"{name}\t{number}/tcp\t# a comment" for name, number in SERVICES.items())
    services.write_text("\n".join(("# comment", "domain 53/udp", *lines)))
    hosts.write_text(
        "127.0.0.1 localhost here.example here # loopback\n"
        "::1 localhost ip6-localhost\nbroken\n192.0.2.7 Web\n\xff fe\n",
        encoding="latin-1",
    )
    monkeypatch.setattr(known_names, "SERVICES", services)
    monkeypatch.setattr(known_names, "HOSTS", hosts)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("3306", [3306]),
        ("25,26", [25, 26]),
        ("3306-3311", [3306, 3307, 3308, 3309, 3310, 3311]),
        ("25-25", [25]),
        ("mysql", [3306]),
        ("MySQL", [3306]),
        ("ms-sql-s,smtp,80-81", [1433, 25, 80, 81]),
        ("1-65535", [*range(1, 65536)]),
    ],
)
@pytest.mark.usefixtures("machine")
def test_ports_are_numbers_ranges_and_services(text: str, ports: list[int]) -> None:
    assert port_list(text) == ports


@pytest.mark.parametrize(
    ("text", "what", "remedy"),
    [
        ("mysqll", "mysqll", "did you mean mysql?"),
        ("qqqqq", "qqqqq", "its number"),
        ("domain", "domain", "its number"),
        ("3311-3306", "3311-3306", "write -p 3306-3311"),
        ("0-3", "0-3", "3306"),
        ("1-70000", "1-70000", "3306"),
        ("70000", "70000", "3306"),
        ("25,,26", "''", "3306"),
        ("٣", "٣", "its number"),
    ],
)
@pytest.mark.usefixtures("machine")
def test_what_is_no_port_says_what_is(text: str, what: str, remedy: str) -> None:
    with pytest.raises(WrongValueError) as refused:
        port_list(text)
    assert what in str(refused.value)
    assert remedy in refused.value.remedy


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("3", 3_000_000_000),
        ("0.5", 500_000_000),
        ("1.001", 1_001_000_000),
        ("1e3", 1_000_000_000_000),
        ("500ms", 500_000_000),
        ("3s", 3_000_000_000),
        ("10m", 600_000_000_000),
        ("10min", 600_000_000_000),
        ("1h30m", 5_400_000_000_000),
        ("1h 30m", 5_400_000_000_000),
        ("1.5h", 5_400_000_000_000),
        ("2d", 172_800_000_000_000),
        ("1m1s1ms", 61_001_000_000),
    ],
)
def test_a_length_of_time_has_units(text: str, nanoseconds: int) -> None:
    assert length_of_time(text) == nanoseconds


@pytest.mark.parametrize(
    "text",
    ["0", "-1", "nan", "inf", "soon", "", "10x", "1h30", "30m1h", "1h1h", "h", "0s", "1e10"],
)
def test_what_is_no_length_of_time_says_what_is(text: str) -> None:
    with pytest.raises(WrongValueError) as refused:
        length_of_time(text)
    assert "1h30m" in refused.value.remedy


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("192.0.2.1", ["192.0.2.1"]),
        ("[2001:db8::1]", ["2001:db8::1"]),
        ("localhost", ["127.0.0.1", "::1"]),
        ("HERE", ["127.0.0.1"]),
        ("web", ["192.0.2.7"]),
    ],
)
@pytest.mark.usefixtures("machine")
def test_a_listener_is_an_address_or_a_name_of_this_machine(
    text: str, addresses: list[str]
) -> None:
    assert listener_addresses(text) == tuple(map(address_bytes, addresses))


@pytest.mark.usefixtures("machine")
def test_no_network_is_asked_what_a_name_means(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_words: object, **_more: object) -> None:
        pytest.fail("the resolver was asked")

    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        monkeypatch.setattr(socket, name, ask)
    for text, remedy in (("localhots", "did you mean localhost?"), ("q.invalid", "getent ahosts")):
        with pytest.raises(WrongValueError) as refused:
            listener_addresses(text)
        assert remedy in refused.value.remedy


@pytest.mark.parametrize(("words", "address"), [(["-4"], "127.0.0.1"), (["-6"], "::1"), ([], None)])
@pytest.mark.usefixtures("machine")
def test_of_several_addresses_one_is_to_be_chosen(words: list[str], address: str | None) -> None:
    options = build_parser().parse_args(["--listener", "localhost", *words])
    if address is None:
        with pytest.raises(UsageError) as refused:
            run._settings(options)
        assert "127.0.0.1" in refused.value.why
        assert "::1" in refused.value.why
        assert "-4" in refused.value.remedy
    else:
        found = run._settings(options).trace_filter.listener_address
        assert found == address_bytes(address)


def test_a_range_is_watched_as_a_range() -> None:
    options = build_parser().parse_args(["-p", "25"])
    for ports, words in (
        ((25,), "port 25"),
        ((25, 26), "ports 25, 26"),
        ((25, 3306, 3307, 3308), "ports 25, 3306-3308"),
        ((1, 2, 3, 5, 6), "ports 1-3, 5, 6"),
    ):
        assert run._watched(options, TraceFilter(ports=ports)) == words


def test_a_recording_comes_from_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = recorded(tmp_path / "run")
    assert main(["--replay", str(path)]) == 1
    from_file = capfd.readouterr().out
    with path.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert main(["--replay", "-"]) == 1
    assert capfd.readouterr().out == from_file


def test_what_is_wrong_with_standard_input_is_said_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("")
    with (tmp_path / "empty").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert main(["--replay", "-"]) == EXIT_USAGE
    assert "standard input is not a recording" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["--replay", "-"]) == EXIT_USAGE
    assert "a terminal" in capsys.readouterr().err


class Terminal(io.StringIO):
    """Where somebody sits, and types no recording."""

    def isatty(self) -> bool:
        return True
