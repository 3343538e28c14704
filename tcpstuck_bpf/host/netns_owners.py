"""Names for network namespaces that have none: the container, pod or process inside.

The control groups of a process contain the container's identifier, and the engine's files contain
the container's name. Containers choose these names, so every printer must sanitise them
(`terminal`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tcpstuck_bpf.host import netns

PROC = Path("/proc")
DOCKER = Path("/var/lib/docker/containers")
CONTAINERD = Path("/run/containerd/io.containerd.runtime.v2.task")
PODMAN = Path("/var/lib/containers/storage/overlay-containers/containers.json")
MOST_PROCESSES = 65_536
MOST_NAMESPACES = 1024
LONGEST_NAME = 64
LONGEST_LOOK_S = 0.2
"""A scan that takes longer stops and returns the names found so far."""
LOOK_AGAIN_S = 10.0
_LARGEST_CGROUP = 1 << 16
_LARGEST_FILE = 1 << 22
_SHORT = 12
"""Length of a shortened identifier, as in `docker ps` and `crictl ps`."""

_ENGINES = {
    "docker": "docker",
    "libpod": "podman",
    "cri-containerd": "containerd",
    "crio": "cri-o",
    "nerdctl": "nerdctl",
}
_SCOPE = re.compile(rf"/({'|'.join(_ENGINES)})[-/]([0-9a-f]{{64}})(?:\.scope)?(?:/|$)", re.M)
_POD = re.compile(
    r"[/-]pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12})(?:\.slice)?(?:/|$)", re.M
)
_IN_POD = re.compile(r"/pod[0-9a-f-]{36}/([0-9a-f]{64})(?:/|$)", re.M)
_MACHINE = re.compile(
    r"/(?:lxc\.payload\.|lxc/|machine-|systemd-nspawn@)([\w.-]+?)(?:\.scope|\.service)?(?:/|$)",
    re.M,
)


def names() -> dict[int, str]:
    """A name for every network namespace with a process in it, by inode number.

    A name from `netns.names` takes precedence over that of a container, pod or process.
    """
    known = netns.names()
    return {**owners(known), **known}


def owners(known: Collection[int], clock: Callable[[], float] = time.monotonic) -> dict[int, str]:
    """Names of namespaces not in `known`, by inode number. Processes may end during the scan."""
    until = clock() + LONGEST_LOOK_S
    found: dict[int, str] = {}
    for number, process in enumerate(_processes()):
        if number >= MOST_PROCESSES or len(found) >= MOST_NAMESPACES or clock() > until:
            break
        with contextlib.suppress(OSError):
            inode = (process / "ns/net").stat().st_ino
            if inode in known or inode in found:
                continue
            name = _name_by(process)
            # The process may have ended and its number been reused.
            if (process / "ns/net").stat().st_ino == inode:
                found[inode] = name
    return found


def _processes() -> Iterator[Path]:
    with contextlib.suppress(OSError), os.scandir(PROC) as entries:
        for entry in entries:
            if entry.name.isdecimal():
                yield PROC / entry.name


def _name_by(process: Path) -> str:
    """The namespace's name as derived from a process. Raises OSError if the process has ended."""
    groups = _start_of(process / "cgroup", _LARGEST_CGROUP)
    return container_name(groups) or f"pid {process.name} ({_own_name(process)})"


def _own_name(process: Path) -> str:
    return _start_of(process / "comm", LONGEST_NAME).rstrip("\n")


def _start_of(path: Path, size: int) -> str:
    with path.open("rb") as file:
        return os.fsdecode(file.read(size))


def container_name(groups: str) -> str:
    """The container or pod of these control groups; empty if there is none."""
    scope, pod, machine = _SCOPE.search(groups), _POD.search(groups), _MACHINE.search(groups)
    in_pod = _IN_POD.search(groups)
    engine, identifier = "", ""
    if scope is not None:
        engine, identifier = _ENGINES[scope.group(1)], scope.group(2)
    elif in_pod is not None:
        engine, identifier = "container", in_pod.group(1)
    if pod is not None:
        name = _pod_name(identifier)
        if name:
            return f"pod {name}"
        uid = pod.group(1).replace("_", "-")
        return f"pod {uid[:8]} ({engine} {identifier[:_SHORT]})" if identifier else f"pod {uid}"
    if identifier:
        name = _container_s_name(engine, identifier)
        short = f"{engine} {identifier[:_SHORT]}"
        return f"{name} ({short})" if name else short
    return f"container {_cut(machine.group(1))}" if machine is not None else ""


def _container_s_name(engine: str, identifier: str) -> str:
    """The container's name in its engine; empty if it cannot be read."""
    if engine == "docker":
        found = _json_of(DOCKER / identifier / "config.v2.json")
        name = found.get("Name") if isinstance(found, dict) else None
        return _cut(name.lstrip("/")) if isinstance(name, str) else ""
    if engine == "podman":
        known = _json_of(PODMAN)
        for one in known if isinstance(known, list) else ():
            if isinstance(one, dict) and one.get("id") == identifier:
                given = one.get("names")
                first = given[0] if isinstance(given, list) and given else None
                return _cut(first) if isinstance(first, str) else ""
    return ""


def _pod_name(identifier: str) -> str:
    """Kubernetes namespace and pod name from containerd's files; empty if they are missing."""
    found = _json_of(CONTAINERD / "k8s.io" / identifier / "config.json") if identifier else None
    notes = found.get("annotations") if isinstance(found, dict) else None
    if not isinstance(notes, dict):
        return ""
    parts = [notes.get(f"io.kubernetes.cri.sandbox-{part}") for part in ("namespace", "name")]
    return "/".join(_cut(part) for part in parts if isinstance(part, str) and part)


def _json_of(path: Path) -> Any:
    """The parsed content of a file; None if it is unreadable, too large, or not JSON."""
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
        return json.loads(data) if len(data) <= _LARGEST_FILE else None
    except (OSError, ValueError, RecursionError):
        return None


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


class KnownNames(Mapping[int, str]):
    """Names by inode number. An unknown inode, which may be new, starts another scan.

    Scans are at least LOOK_AGAIN_S apart.
    """

    def __init__(
        self,
        look: Callable[[], Mapping[int, str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = look or names
        self._clock = clock
        self._found = dict(self._look())
        self._next_look = clock() + LOOK_AGAIN_S

    def __getitem__(self, inode: int) -> str:
        if inode not in self._found and self._clock() >= self._next_look:
            # A name that was printed once does not change.
            self._found = {**self._look(), **self._found}
            self._next_look = self._clock() + LOOK_AGAIN_S
        return self._found[inode]

    def __iter__(self) -> Iterator[int]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)
