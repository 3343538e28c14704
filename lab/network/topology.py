"""Two network namespaces joined by a veth pair, with all relevant sysctls pinned.

    client 10.9.0.2, fd09::2  veth0 ———— veth0  10.9.0.1, fd09::1 server

The client also owns every address of LOCAL_SOURCES and answers a stray SYN-ACK to them with RST.
The server routes SILENT_SOURCES through the client; no host owns these addresses or answers for
them. Neighbour entries are permanent, because ARP and neighbour discovery queue only a few packets
and would distort a burst of SYNs.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeout
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from pyroute2 import IPRoute, NetNS, netns
from pyroute2 import config as pyroute2_settings

from lab.ending import sigterm_ends_program
from lab.errors import LabError, LabTimeoutError
from lab.network.readings import SocketRow, count_known, parse_netstat, parse_ss
from lab.patience import COMMAND_S, patient

INTERFACE = "veth0"
SERVER_ADDRESS = {4: "10.9.0.1", 6: "fd09::1"}
CLIENT_ADDRESS = {4: "10.9.0.2", 6: "fd09::2"}
PREFIX_LENGTH = {4: 24, 6: 64}
LOCAL_SOURCES = {4: "10.9.1.0/24", 6: "fd09:0:0:1::/64"}
SILENT_SOURCES = {4: "10.9.200.0/21", 6: "fd09:0:0:200::/64"}

SYSCTLS: Mapping[str, str] = {
    "net/core/somaxconn": "4096",
    "net/ipv4/tcp_syncookies": "1",
    "net/ipv4/tcp_timestamps": "1",
    "net/ipv4/tcp_sack": "1",
    "net/ipv4/tcp_window_scaling": "1",
    "net/ipv4/tcp_ecn": "2",
    "net/ipv4/tcp_fastopen": "0",
    "net/ipv4/tcp_max_syn_backlog": "4096",
    "net/ipv4/tcp_syn_retries": "6",
    "net/ipv4/tcp_synack_retries": "5",
    "net/ipv4/tcp_abort_on_overflow": "0",
    "net/ipv4/tcp_retries2": "15",
    "net/ipv4/tcp_fin_timeout": "60",
    "net/ipv4/tcp_tw_reuse": "0",
    "net/ipv4/tcp_max_tw_buckets": "262144",
    "net/ipv4/tcp_keepalive_time": "7200",
    "net/ipv4/tcp_invalid_ratelimit": "500",
    "net/ipv4/ip_local_port_range": "10000 65000",
    "net/ipv4/ip_forward": "0",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv6/conf/all/forwarding": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/accept_ra": "0",
}
SYSCTLS_OF_SOME_KERNELS: Mapping[str, str] = {
    # Since 6.5 (ccce324dabfe), the first SYN retransmissions come every second by default.
    "net/ipv4/tcp_syn_linear_timeouts": "0",
    "net/ipv4/tcp_migrate_req": "0",
}

Result = TypeVar("Result")
_instances = itertools.count(1)
_held: dict[int, int] = {}
"""Open files of the created namespaces, by inode number, kept for the life of the process. The
kernel gives a new namespace the lowest free inode number (ns_alloc_inum). Without the open file, a
tracer's verdict on a removed namespace could be taken for one on its successor."""
# pyroute2's forked helpers have a default timeout of 1 s, too short on an emulated machine.
pyroute2_settings.default_communicate_timeout = int(patient(COMMAND_S))
# It ends them with SIGTERM. A handler of ours that raises would run our clean-up in such a copy of
# this process, and remove the namespaces that this process goes on using.
pyroute2_settings.disable_mp_signal = True


class Namespace:
    """One network namespace, and a resident thread in it.

    A network namespace is a property of a thread, not of a process. Everything that the resident
    thread opens, reads or starts belongs to this namespace; the process's other threads do not
    move. No other namespace gets the same inode number while the process lives, or until
    `give_up_number`. Raises LabError if the namespace cannot be created.
    """

    forks: ClassVar[bool] = False
    """Whether lab processes are forked (`lab.processes.preloaded`). The kernel tests set it."""

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            netns.create(name)
        except OSError as error:
            raise LabError(
                f"cannot create the network namespace {name}", str(error), "run the lab as root"
            ) from error
        held = os.open(Path(netns.NETNS_RUN_DIR) / name, os.O_RDONLY | os.O_CLOEXEC)
        self.inode = os.fstat(held).st_ino
        _held[self.inode] = held
        self._resident = ThreadPoolExecutor(1, name, netns.setns, (name, 0))

    def run(self, function: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        """Call a function on the resident thread of this namespace. Raises LabTimeoutError."""
        limit_s = patient(COMMAND_S)
        try:
            return self._resident.submit(function, *arguments, **named).result(limit_s)
        except FuturesTimeout as error:
            raise LabTimeoutError(f"{function} in {self.name}", limit_s, "nothing") from error

    def command(self, *words: str) -> str:
        """Run a command in this namespace and return its standard output.

        Raises LabError if the command is not installed, fails or does not end.
        """
        try:
            done = self.run(
                subprocess.run, words, capture_output=True, text=True, timeout=patient(COMMAND_S)
            )
        except FileNotFoundError as error:
            raise LabError(
                f"cannot run {words[0]}", "it is not installed", "run `make demo` to install it"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise LabTimeoutError(words[0], patient(COMMAND_S), "still running") from error
        if done.returncode != 0:
            why = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            raise LabError(f"`{' '.join(words)}` failed", why, "see its manual page")
        return done.stdout

    @property
    def forks_into(self) -> int | None:
        """The descriptor for a lab process to be forked into this namespace; None: start it."""
        return _held.get(self.inode) if self.forks else None

    def popen(self, words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process in this namespace; the caller must end the process."""
        return self.run(subprocess.Popen, words, **options)

    def pin(self, values: Mapping[str, str], if_known: bool = False) -> None:
        """Set sysctls in this namespace; their names are paths below /proc/sys.

        Raises LabError if this kernel lacks a sysctl, unless `if_known` is set.
        """
        self.run(_write_sysctls, values, if_known)

    def counters(self) -> dict[str, int]:
        """The TcpExt counters of this namespace (SyncookiesSent, ListenOverflows ...)."""
        return parse_netstat(self.run(Path("/proc/thread-self/net/netstat").read_text))

    def count_known(self, port: int) -> int:
        """Number of connections and handshakes at a port, read from /proc: `ss` starts slowly."""
        return sum(
            count_known(self.run(Path(f"/proc/thread-self/net/{table}").read_text), port)
            for table in ("tcp", "tcp6")
        )

    def sockets(self, state: str, *conditions: str) -> list[SocketRow]:
        """The TCP sockets of this namespace in one of `ss`'s states, such as `established`."""
        return parse_ss(self.command("ss", "-tnH", "state", state, *conditions))

    def give_up_number(self) -> None:
        """Close the held file; the namespace then ends with its last process and its name."""
        if (held := _held.pop(self.inode, None)) is not None:
            os.close(held)

    def close(self) -> None:
        """Remove the name; the kernel keeps the namespace while a process or file uses it."""
        self._resident.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(FileNotFoundError):
            netns.remove(self.name)


class OwnNamespace(Namespace):
    """The network namespace of this process, for a guest that is one end of the connection."""

    def __init__(self) -> None:
        self.name = "own"
        self.inode = Path("/proc/self/ns/net").stat().st_ino
        self._resident = ThreadPoolExecutor(1, self.name)

    def close(self) -> None:
        """End the resident thread; the namespace stays."""
        self._resident.shutdown(wait=True, cancel_futures=True)


class Topology:
    """The server's and the client's namespace; a context manager that removes both.

    Names contain the process id and a number, so several topologies can exist at once. If the main
    thread opens the topology, SIGTERM raises SystemExit meanwhile, so the topology is removed then
    as well.
    """

    server: Namespace
    client: Namespace

    def __init__(self) -> None:
        self._name = f"tcpstuck-{os.getpid()}-{next(_instances)}"
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Topology:
        with contextlib.ExitStack() as building:
            building.enter_context(sigterm_ends_program())
            self.server = Namespace(f"{self._name}-server")
            building.callback(self.server.close)
            self.client = Namespace(f"{self._name}-client")
            building.callback(self.client.close)
            for namespace in (self.server, self.client):
                namespace.pin(SYSCTLS)
                namespace.pin(SYSCTLS_OF_SOME_KERNELS, if_known=True)
            self._join()
            self._cleanup = building.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def cut(self) -> None:
        """Delete the veth pair; later packets of either end are lost."""
        with NetNS(self.client.name, flags=0) as client:
            client.link("del", index=int(client.link_lookup(ifname=INTERFACE)[0]))

    def _join(self) -> None:
        with NetNS(self.server.name, flags=0) as server, NetNS(self.client.name, flags=0) as client:
            server.link(
                "add",
                ifname=INTERFACE,
                kind="veth",
                peer={"ifname": INTERFACE, "net_ns_fd": self.client.name},
            )
            server_link = _address_link(server, SERVER_ADDRESS)
            client_link = _address_link(client, CLIENT_ADDRESS)
            for family in (4, 6):
                _know_neighbour(server, server_link, CLIENT_ADDRESS[family], client, client_link)
                _know_neighbour(client, client_link, SERVER_ADDRESS[family], server, server_link)
                for sources in (LOCAL_SOURCES[family], SILENT_SOURCES[family]):
                    server.route("add", dst=sources, gateway=CLIENT_ADDRESS[family])
                # Table 255 is `local`, scope 254 is `host`: every address of the prefix is local.
                client.route(
                    "add", dst=LOCAL_SOURCES[family], type="local", table=255, scope=254, oif=1
                )


def source_addresses(prefix: str, count: int) -> list[str]:
    """The first `count` host addresses of a prefix, as text; fewer if the prefix has fewer."""
    hosts: Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address] = iter(
        ipaddress.ip_network(prefix).hosts()
    )
    return [str(host) for host in itertools.islice(hosts, count)]


def _write_sysctls(values: Mapping[str, str], if_known: bool) -> None:
    for name, value in values.items():
        path = Path("/proc/sys") / name
        if if_known and not path.exists():
            continue
        try:
            path.write_text(value)
        except OSError as error:
            raise LabError(
                f"cannot set {name} to {value}", str(error), "run the lab as root, on Linux 5.10+"
            ) from error


def _address_link(route: IPRoute, addresses: Mapping[int, str]) -> int:
    link = int(route.link_lookup(ifname=INTERFACE)[0])
    for family, address in addresses.items():
        # 0x02 (IFA_F_NODAD): without duplicate address detection, the address is usable at once.
        flags = {"flags": 0x02} if family == 6 else {}
        route.addr("add", index=link, address=address, prefixlen=PREFIX_LENGTH[family], **flags)
    for index in (int(route.link_lookup(ifname="lo")[0]), link):
        route.link("set", index=index, state="up")
    return link


def _know_neighbour(
    route: IPRoute, link: int, address: str, neighbour: IPRoute, neighbour_link: int
) -> None:
    hardware_address = neighbour.get_links(neighbour_link)[0].get_attr("IFLA_ADDRESS")
    known = {"dst": address, "lladdr": hardware_address, "ifindex": link, "state": "permanent"}
    # Older pyroute2 does not infer the family.
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    route.neigh("add", family=family, **known)
