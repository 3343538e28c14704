"""The two hosts of the exercises, as the Vagrantfile makes them: names, addresses and a MariaDB.

Each is a network namespace. A terminal on a host has the host's name, knows both hosts by name, and
finds `tcpstuck-trace`, `hang` and `flood`. On the server it also has MariaDB's settings, and
`systemctl restart mariadb`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from pyroute2 import NetNS

from lab.exercises.service import ServiceCommand
from lab.network.topology import INTERFACE, Namespace, Topology
from lab.processes.child import IMPORT_ROOT
from lab.processes.servers import MariaDb
from lab.scenarios.scene import PORT
from lab.terminals import Terminal, terminal

ADDRESSES = {"server": "192.168.56.10", "client": "192.168.56.20"}
"""Those of the Vagrantfile."""
PREFIX_LENGTH = 24
LINK = "eth1"
"""The device by which a Vagrant machine reaches the other."""
BACKLOG = 50
SETTINGS = "/etc/mysql/mariadb.conf.d"
COLUMNS, LINES = 132, 50


class Hosts:
    """Both hosts, and the terminals that were opened; a context manager. Raises LabError."""

    def __init__(self) -> None:
        self._terminals: dict[str, Terminal] = {}
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Hosts:
        with contextlib.ExitStack() as building:
            place = building.enter_context(tempfile.TemporaryDirectory(prefix="tcpstuck-lab-"))
            self._place = Path(place)
            topology = building.enter_context(Topology())
            self._namespaces = {"server": topology.server, "client": topology.client}
            for name, namespace in self._namespaces.items():
                _name_link(namespace, ADDRESSES[name])
            _introduce(self._namespaces)
            self._database = building.enter_context(
                MariaDb(topology.server, ADDRESSES["server"], PORT, backlog=BACKLOG)
            )
            self._write_files()
            building.enter_context(ServiceCommand(self._server_commands, self._database))
            self._cleanup = building.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def terminal(self, name: str) -> Terminal:
        """The terminal of this name, such as `server` or `server2`; a new one shows its prompt."""
        if name not in self._terminals:
            place = self._place / name
            place.mkdir()
            host = name.rstrip("0123456789")
            opened = terminal(place, self._shell(host, name), COLUMNS, LINES)
            self._terminals[name] = self._cleanup.enter_context(opened)
            self._terminals[name].until(prompt(name).rstrip())
        return self._terminals[name]

    def _write_files(self) -> None:
        """The files by which a terminal knows the hosts' names, and finds the commands."""
        lines = [f"{address} {name}\n" for name, address in ADDRESSES.items()]
        (self._place / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        commands = self._place / "commands"
        commands.mkdir()
        self._server_commands.mkdir()
        for name in ("hang", "flood"):
            (commands / name).symlink_to(IMPORT_ROOT / "lab" / name)
        tool = commands / "tcpstuck-trace"
        run = shlex.join([sys.executable, "-m", "tcpstuck_bpf"])
        tool.write_text(
            f'#!/bin/sh\nexec env PYTHONPATH={shlex.quote(str(IMPORT_ROOT))} {run} "$@"\n'
        )
        tool.chmod(0o755)

    @property
    def _server_commands(self) -> Path:
        return self._place / "server-commands"

    def _shell(self, host: str, name: str) -> list[str]:
        """The command that runs a terminal's shell."""
        mounts = {"/etc/hosts": self._place / "hosts"}
        path = [str(self._place / "commands"), os.environ["PATH"]]
        if host == "server":
            mounts[SETTINGS] = self._database.settings
            path.insert(0, str(self._server_commands))
        # Only this says what the prompt is, because the shell reads no file at its start.
        settings = {"PATH": ":".join(path), "HOME": "/root", "PS1": prompt(name)}
        begin = [
            *(f"mount --bind {shlex.quote(str(what))} {to}" for to, what in mounts.items()),
            f"hostname {host}",
            "cd /root",
            f"exec env {_assignments(settings)} bash --norc --noprofile",
        ]
        enter = ["ip", "netns", "exec", self._namespaces[host].name, "unshare", "--uts", "--mount"]
        return [*enter, "sh", "-ec", "; ".join(begin)]


def prompt(name: str) -> str:
    """The prompt of a terminal."""
    return f"{name}# "


def _assignments(settings: Mapping[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())


def _name_link(namespace: Namespace, address: str) -> None:
    """Give the device between the hosts the name and the address that a Vagrant machine has."""
    with NetNS(namespace.name, flags=0) as inside:
        index = inside.link_lookup(ifname=INTERFACE)[0]
        inside.link("set", index=index, state="down")
        inside.link("set", index=index, ifname=LINK, state="up")
        inside.addr("add", index=index, address=address, prefixlen=PREFIX_LENGTH)


def _introduce(namespaces: Mapping[str, Namespace]) -> None:
    """Tell each host the other's hardware address: a page that holds packets must not hold ARP."""
    with contextlib.ExitStack() as stack:
        links = {}
        for name, namespace in namespaces.items():
            inside = stack.enter_context(NetNS(namespace.name, flags=0))
            links[name] = inside, inside.link_lookup(ifname=LINK)[0]
        for name, (inside, index) in links.items():
            for other, (its, number) in links.items():
                if other != name:
                    inside.neigh(
                        "add",
                        family=socket.AF_INET,
                        dst=ADDRESSES[other],
                        lladdr=its.get_links(number)[0].get_attr("IFLA_ADDRESS"),
                        ifindex=index,
                        state="permanent",
                    )
