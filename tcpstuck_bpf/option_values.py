"""Parsers for option values: ports and services, lengths of time, addresses."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence

from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.host import known_names
from tcpstuck_bpf.model import SECOND_NS, address_bytes, address_text
from tcpstuck_bpf.usage import WrongValueError, nearest

LAST_PORT = 65535
_NUMBER = re.compile(r"[0-9]{1,9}")
_RANGE = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")
_UNITS_NS = {
    "d": 86_400 * SECOND_NS,
    "h": 3600 * SECOND_NS,
    "m": 60 * SECOND_NS,
    "s": SECOND_NS,
    "ms": SECOND_NS // 1000,
}
_TIME = re.compile(
    "".join(
        rf"(?:(?P<{unit}>[0-9]+(?:\.[0-9]*)?) *{spelled} *)?"
        for unit, spelled in (
            ("d", "d"),
            ("h", "h"),
            ("m", "m(?:in)?(?!s)"),
            ("s", "s"),
            ("ms", "ms"),
        )
    )
)
_SHORTEST_NS, _LONGEST_NS = SECOND_NS // 1000, 10**9 * SECOND_NS


def port_list(text: str) -> list[int]:
    """Ports, port ranges and service names, separated by commas.

    Their number is not limited: the programs have one bit for each port.
    """
    return [port for word in text.split(",") for port in _ports(word)]


def _ports(word: str) -> list[int]:
    number, ends = _NUMBER.fullmatch(word), _RANGE.fullmatch(word)
    low, high = (0, 0)
    if number:
        low = high = int(word)
    elif ends:
        low, high = map(int, ends.groups())
    elif word:
        low = high = _port_of_service(word)
    if 1 <= high < low <= LAST_PORT:
        raise WrongValueError(
            f"{word} is no range of ports", "its start exceeds its end", f"write -p {high}-{low}"
        )
    if not 1 <= low <= high <= LAST_PORT:
        raise WrongValueError(
            f"{word or repr(word)} is no port",
            f"ports are numbers from 1 to {LAST_PORT}",
            "write -p 3306, -p 3306,3311, -p 3306-3311 or -p mysql",
        )
    return [*range(low, high + 1)]


def _port_of_service(name: str) -> int:
    port = known_names.service_port(name)
    if port is None:
        remedy = "write its number: -p 3306"
        raise WrongValueError(
            f"{name} is no port",
            f"this machine has no TCP service of that name ({known_names.SERVICES})",
            nearest(name, known_names.service_names(), remedy),
        )
    return port


def ports_of(options: argparse.Namespace) -> tuple[int, ...]:
    """The ports of all -p together, sorted."""
    return tuple(sorted({port for ports in options.port for port in ports}))


def ports_text(ports: Sequence[int]) -> str:
    """Sorted ports as text; three or more consecutive ports become a range."""
    runs: list[list[int]] = []
    for port in ports:
        if not runs or port != runs[-1][-1] + 1:
            runs.append([])
        runs[-1].append(port)
    return ", ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )


def length_of_time(text: str) -> int:
    """A positive time in nanoseconds: `10m`, `1h30m`, `500ms`; without a unit, in seconds."""
    value = _in_units(text) or _in_seconds(text)
    if not _SHORTEST_NS <= value <= _LONGEST_NS:
        raise WrongValueError(
            f"{text or repr(text)} is no length of time",
            "it must be seconds, or numbers with d, h, m, s and ms in that order, from 1 ms to "
            "1e9 s",
            "write 90, 90s, 10m, 1h30m or 500ms",
        )
    return round(value)


def heartbeat_interval(text: str) -> int:
    """A length of time of one second or more, in nanoseconds; 0 for `off`."""
    if text == "off":
        return 0
    try:
        value = length_of_time(text)
    except WrongValueError:
        value = 0
    if value < SECOND_NS:
        raise WrongValueError(
            f"{text or repr(text)} is no interval",
            "it is a length of time of a second or more, or off",
            "write --heartbeat 5m or --heartbeat off",
        )
    return value


def _in_units(text: str) -> float:
    """Nanoseconds of a time with units; 0 if the text is not one."""
    found = _TIME.fullmatch(text.strip())
    parts = found.groupdict() if found else {}
    return sum(float(number) * _UNITS_NS[unit] for unit, number in parts.items() if number)


def _in_seconds(text: str) -> float:
    """Nanoseconds of a plain number of seconds; 0 if the text is not a finite number."""
    try:
        value = float(text)
    except ValueError:
        return 0
    return value * SECOND_NS if math.isfinite(value) else 0


def listener_addresses(text: str) -> tuple[bytes, ...]:
    """An IPv4 or IPv6 address, or the addresses of a name in /etc/hosts, as 16 bytes each."""
    try:
        return (address_bytes(text.strip("[]")),)
    except ValueError:
        known = known_names.hosts()
    if text.lower() in known:
        return tuple(map(address_bytes, known[text.lower()]))
    raise WrongValueError(
        f"{text!r} is neither an address nor a name of this machine",
        f"names are looked up in {known_names.HOSTS} alone: DNS may name a load balancer's address",
        nearest(text, known, "write the address; `getent ahosts NAME` shows what DNS says"),
    )


def listener_address(options: argparse.Namespace) -> bytes | None:
    """The address of --listener in the selected family; None without --listener."""
    if options.listener is None:
        return None
    found: dict[bytes, str] = {one: address_text(one) for one in options.listener}
    family: int | None = options.family
    fitting = [
        one for one, text in found.items() if family is None or (":" not in text) == (family == 4)
    ]
    if not fitting:
        raise UsageError(
            f"--listener {', '.join(found.values())} is never reached by IPv{family}",
            f"-{family} selects IPv{family} packets only",
            f"leave out -{family}",
        )
    if len(fitting) > 1:
        raise UsageError(
            "--listener names several addresses",
            f"they are {', '.join(found[one] for one in fitting)}; the filter takes one",
            "write one of them, or add -4 or -6",
        )
    return fitting[0]


def packet_rate(text: str) -> int:
    """Parse a number of packets per second."""
    return _whole_number(text, 1, 100_000, "--rescue-rate 100")


def process_number(text: str) -> int:
    """Parse the number of a process."""
    return _whole_number(text, 1, 1 << 22, "--pid 288")


def table_size(text: str) -> int:
    """Parse the number of entries of the kernel's table."""
    return _whole_number(text, 16, 1 << 24, "--max-handshakes 131072")


def _whole_number(text: str, lowest: int, highest: int, example: str) -> int:
    wanted = f"it takes a whole number from {lowest} to {highest}"
    try:
        value = int(text)
    except ValueError:
        raise WrongValueError(
            f"{text!r} is not a whole number", wanted, f"for example {example}"
        ) from None
    if not lowest <= value <= highest:
        raise WrongValueError(f"{value} is out of range", wanted, f"for example {example}")
    return value
