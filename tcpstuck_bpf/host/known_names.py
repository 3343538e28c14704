"""Names that this machine gives to ports and addresses, by its own files. No network is asked."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path

SERVICES = Path("/etc/services")
HOSTS = Path("/etc/hosts")
_MOST_CHARACTERS = 1 << 22
"""Of a file that is read. Lists of hosts to block have a megabyte or two."""


def service_port(name: str) -> int | None:
    """The TCP port of a service, as getservbyname(3) has it; None where it is not known."""
    # Imported where it is used: most runs name no service.
    import socket

    for spelling in (name, name.lower()):
        try:
            return socket.getservbyname(spelling, "tcp")
        except (OSError, UnicodeError, ValueError):
            continue
    return None


def service_names() -> list[str]:
    """The names of TCP services in services(5); none where the file cannot be read."""
    return [
        name
        for words in _lines(SERVICES)
        if len(words) > 1 and words[1].endswith("/tcp")
        for name in (words[0], *words[2:])
    ]


def hosts() -> dict[str, list[str]]:
    """Addresses by name, as /etc/hosts has them, in its order; names are in small letters.

    DNS is not asked: it may keep a start waiting, and its answer may be a load balancer's address,
    to which no packet comes here.
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
    """The words of each line, without comments."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MOST_CHARACTERS)
    except OSError:
        return
    for line in text.splitlines():
        yield line.partition("#")[0].split()
