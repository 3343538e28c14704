"""Names of ports and addresses from this machine's own files, without network access."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path

SERVICES = Path("/etc/services")
HOSTS = Path("/etc/hosts")
_MOST_CHARACTERS = 1 << 22
"""Largest part of a file that is read. Block lists in /etc/hosts take a megabyte or two."""


def service_port(name: str) -> int | None:
    """The TCP port of a service, by getservbyname(3); None if unknown."""
    # Imported only where it is used: most runs name no service.
    import socket

    for spelling in (name, name.lower()):
        try:
            return socket.getservbyname(spelling, "tcp")
        except (OSError, UnicodeError, ValueError):
            continue
    return None


def service_names() -> list[str]:
    """The names of TCP services in services(5); none if the file cannot be read."""
    return [
        name
        for words in _lines(SERVICES)
        if len(words) > 1 and words[1].endswith("/tcp")
        for name in (words[0], *words[2:])
    ]


def hosts() -> dict[str, list[str]]:
    """Addresses by lower-case name from /etc/hosts, in the file's order.

    DNS is not used: a query could delay the start, and its answer may be a load balancer's address,
    which no packet on this host has.
    """
    found: dict[str, list[str]] = {}
    for address, *names in filter(None, _lines(HOSTS)):
        try:
            ipaddress.ip_address(address)
        except ValueError:
            continue
        for name in names:
            known = found.setdefault(name.lower(), [])
            if address not in known:
                known.append(address)
    return found


def _lines(path: Path) -> Iterator[list[str]]:
    """The words of each line; comments are removed."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MOST_CHARACTERS)
    except OSError:
        return
    for line in text.splitlines():
        yield line.partition("#")[0].split()
