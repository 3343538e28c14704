"""A network namespace is called by its container, pod or process, where it has no name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tcpstuck_bpf.host import netns, netns_owners
from tcpstuck_bpf.host.netns_owners import KnownNames, container_name, owners

ID = "3f4e5d6c7b8a" + "0" * 52
UID = "0a1b2c3d-1111-2222-3333-444455556666"


@pytest.fixture(autouse=True)
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of container engines; none is there at first."""
    monkeypatch.setattr(netns_owners, "DOCKER", tmp_path / "docker")
    monkeypatch.setattr(netns_owners, "PODMAN", tmp_path / "podman.json")
    monkeypatch.setattr(netns_owners, "CONTAINERD", tmp_path / "containerd")
    return tmp_path


@pytest.mark.parametrize(
    ("groups", "name"),
    [
        (f"0::/system.slice/docker-{ID}.scope\n", "docker 3f4e5d6c7b8a"),
        (f"12:pids:/docker/{ID}\n0::/\n", "docker 3f4e5d6c7b8a"),
        (f"0::/machine.slice/libpod-{ID}.scope/container\n", "podman 3f4e5d6c7b8a"),
        (f"0::/machine.slice/libpod-conmon-{ID}.scope\n", ""),
        (f"0::/system.slice/nerdctl-{ID}.scope\n", "nerdctl 3f4e5d6c7b8a"),
        (
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod"
            f"{UID.replace('-', '_')}.slice/cri-containerd-{ID}.scope\n",
            "pod 0a1b2c3d (containerd 3f4e5d6c7b8a)",
        ),
        (f"0::/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice/crio-{ID}.scope\n",
         "pod 0a1b2c3d (cri-o 3f4e5d6c7b8a)"),
        (f"4:cpu:/kubepods/besteffort/pod{UID}/{ID}\n", "pod 0a1b2c3d (container 3f4e5d6c7b8a)"),
        (f"4:cpu:/kubepods/besteffort/pod{UID}\n", f"pod {UID}"),
        ("0::/lxc.payload.web/init.scope\n", "container web"),
        ("0::/machine.slice/machine-web.scope\n", "container web"),
        ("0::/system.slice/mysql.service\n", ""),
        (f"0::/user.slice/docker-{ID[:20]}.scope\n", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_control_groups_tell_whose_it_is(groups: str, name: str) -> None:
    assert container_name(groups) == name


def test_the_name_that_people_gave_goes_first(engines: Path) -> None:
    docker = engines / "docker" / ID
    docker.mkdir(parents=True)
    (docker / "config.v2.json").write_text(json.dumps({"Name": "/web", "ID": ID}))
    assert container_name(f"0::/docker/{ID}\n") == "web (docker 3f4e5d6c7b8a)"
    others = [{"id": "0" * 64, "names": ["other"]}, {"id": ID, "names": ["db"]}]
    (engines / "podman.json").write_text(json.dumps(others))
    assert container_name(f"0::/libpod-{ID}.scope\n") == "db (podman 3f4e5d6c7b8a)"
    bundle = engines / "containerd" / "k8s.io" / ID
    bundle.mkdir(parents=True)
    notes = {
        "io.kubernetes.cri.sandbox-name": "mysql-0",
        "io.kubernetes.cri.sandbox-namespace": "shop",
    }
    (bundle / "config.json").write_text(json.dumps({"annotations": notes}))
    assert container_name(f"0::/kubepods/pod{UID}/{ID}\n") == "pod shop/mysql-0"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"Name": 3}', "[" * 100_000, '{"Name": ""}', "\xff"]
)
def test_files_that_are_not_what_they_should_be_name_nobody(content: str, engines: Path) -> None:
    docker = engines / "docker" / ID
    docker.mkdir(parents=True)
    for path in (docker / "config.v2.json", engines / "podman.json"):
        path.write_text(content, encoding="latin-1")
    assert container_name(f"0::/docker/{ID}\n") == "docker 3f4e5d6c7b8a"
    assert container_name(f"0::/libpod-{ID}.scope\n") == "podman 3f4e5d6c7b8a"


def test_what_is_too_large_or_too_long_is_cut_off(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker = engines / "docker" / ID
    docker.mkdir(parents=True)
    (docker / "config.v2.json").write_text(json.dumps({"Name": "n" * 1000}))
    assert container_name(f"0::/docker/{ID}\n") == f"{'n' * 64}... (docker 3f4e5d6c7b8a)"
    monkeypatch.setattr(netns_owners, "_LARGEST_FILE", 100)
    assert container_name(f"0::/docker/{ID}\n") == "docker 3f4e5d6c7b8a"


class Processes:
    """A /proc with processes, each in a network namespace of its own."""

    def __init__(self, proc: Path) -> None:
        self._proc = proc
        self.inodes: dict[int, int] = {}

    def add(self, pid: int, comm: str, groups: str, beside: int | None = None) -> None:
        process = self._proc / str(pid)
        (process / "ns").mkdir(parents=True)
        (process / "comm").write_text(f"{comm}\n")
        (process / "cgroup").write_text(groups)
        if beside is None:
            (process / "ns/net").write_text("")
        else:
            os.link(self._proc / str(beside) / "ns/net", process / "ns/net")
        self.inodes[pid] = (process / "ns/net").stat().st_ino


@pytest.fixture
def processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Processes:
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "meminfo").write_text("")
    monkeypatch.setattr(netns_owners, "PROC", proc)
    return Processes(proc)


def test_every_namespace_gets_a_name_and_known_ones_keep_theirs(processes: Processes) -> None:
    processes.add(100, "mysqld", "0::/system.slice/mysql.service\n")
    processes.add(200, "nginx", f"0::/docker/{ID}\n")
    processes.add(300, "init", "0::/\n")
    inodes = processes.inodes
    assert owners({inodes[300]}) == {
        inodes[100]: "pid 100 (mysqld)",
        inodes[200]: "docker 3f4e5d6c7b8a",
    }


def test_a_process_that_ends_meanwhile_is_passed_over(processes: Processes) -> None:
    processes.add(100, "gone", "")
    (netns_owners.PROC / "100" / "cgroup").unlink()
    processes.add(200, "mysqld", "", beside=100)
    assert owners(()) == {processes.inodes[200]: "pid 200 (mysqld)"}


def test_a_process_that_changed_its_namespace_meanwhile_names_none(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may be another process's by then."""
    processes.add(100, "mysqld", "")

    def name_and_move(process: Path) -> str:
        (process / "ns/other").write_text("")
        (process / "ns/other").rename(process / "ns/net")
        return "wrong"

    monkeypatch.setattr(netns_owners, "_name_by", name_and_move)
    assert owners(()) == {}


@pytest.mark.parametrize(
    ("bound", "value"), [("MOST_PROCESSES", 2), ("MOST_NAMESPACES", 2), ("LONGEST_LOOK_S", 2)]
)
def test_a_look_is_bounded_in_number_and_time(
    bound: str, value: int, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pid in range(100, 110):
        processes.add(pid, "one", "")
    monkeypatch.setattr(netns_owners, bound, value)
    ticks = iter(range(1000))
    found = owners((), lambda: next(ticks) if bound == "LONGEST_LOOK_S" else 0)
    assert len(found) == 2


def test_foreign_bytes_come_through_as_they_are(processes: Processes) -> None:
    """Whoever prints them makes them harmless."""
    processes.add(100, "x", "")
    (netns_owners.PROC / "100" / "comm").write_bytes(b"\x1b[2J\xff\n")
    assert owners(()) == {processes.inodes[100]: "pid 100 (\x1b[2J\udcff)"}


def test_names_of_ip_netns_go_before_owners(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.add(100, "mysqld", "")
    processes.add(200, "nginx", "")
    monkeypatch.setattr(netns, "names", lambda: {processes.inodes[100]: "web"})
    assert netns_owners.names() == {
        processes.inodes[100]: "web",
        processes.inodes[200]: "pid 200 (nginx)",
    }


def test_a_namespace_that_came_later_is_looked_for_but_not_all_the_time() -> None:
    looks: list[dict[int, str]] = [{1: "host"}, {1: "other", 2: "web"}, {3: "late"}]
    now = 0.0
    known = KnownNames(lambda: looks.pop(0), lambda: now)
    assert (dict(known), known.get(2)) == ({1: "host"}, None)
    now = 10.0
    assert (known.get(1), len(looks)) == ("host", 2)
    assert (known.get(2), known.get(1), known.get(3), len(looks)) == ("web", "host", None, 1)
    now = 20.0
    assert (known.get(3), len(known)) == ("late", 3)


def test_this_machine_is_looked_at() -> None:
    found = netns_owners.names()
    assert netns.own_netns() in found
    assert all(found.values())
