"""`systemctl restart mariadb` in the exercises: the command, and MariaDB's restart itself."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lab.errors import LabError
from lab.exercises.service import ServiceCommand
from lab.processes.servers import MARIADB_BINARY, SETTINGS_FILE, MariaDb

LIMIT_S = 60
LOOPBACK = "127.0.0.1"


class Database:
    """Stands in for a MariaDB; `why`: it does not start again."""

    def __init__(self, why: str = "") -> None:
        self.restarts = 0
        self.why = why

    def restart(self) -> None:
        self.restarts += 1
        if self.why:
            raise LabError("cannot run MariaDB", self.why, "look at its settings")


def systemctl(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(place / "systemctl"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


def test_each_command_restarts_the_database_once(tmp_path: Path) -> None:
    database = Database()
    with ServiceCommand(tmp_path, database):
        for restarts in (1, 2):
            done = systemctl(tmp_path, "restart", "mariadb")
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
            assert database.restarts == restarts


def test_it_says_why_the_database_does_not_start(tmp_path: Path) -> None:
    with ServiceCommand(tmp_path, Database("unknown variable 'back_lag'")):
        done = systemctl(tmp_path, "restart", "mariadb")
    assert done.returncode == 1
    assert "unknown variable 'back_lag'" in done.stderr


@pytest.mark.parametrize("words", [(), ("restart",), ("restart", "ssh"), ("stop", "mariadb")])
def test_it_does_nothing_else(tmp_path: Path, words: tuple[str, ...]) -> None:
    database = Database()
    with ServiceCommand(tmp_path, database):
        done = systemctl(tmp_path, *words)
    assert done.returncode == 1
    assert "systemctl restart mariadb" in done.stderr
    assert database.restarts == 0


class ThisMachine:
    """Stands in for a Namespace: processes start where the test runs."""

    forks_into = None

    def popen(self, words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(words, **options)


def backlogs(port: int) -> list[str]:
    """The backlog of each listener at a port, as `ss` shows it in Send-Q."""
    words = ["ss", "-Hltn", f"sport = :{port}"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, timeout=LIMIT_S)
    return [line.split()[2] for line in shown.stdout.splitlines()]


@pytest.mark.skipif(not Path(MARIADB_BINARY).exists(), reason="MariaDB is not installed")
@pytest.mark.skipif(not shutil.which("ss"), reason="ss is not installed")
@pytest.mark.skipif(os.geteuid() != 0, reason="MariaDB runs as another user, which takes root")
@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_a_restarted_database_has_the_backlog_of_its_settings(paused: bool) -> None:
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    with MariaDb(ThisMachine(), LOOPBACK, port, backlog=50) as database:
        assert backlogs(port) == ["50"]
        file = database.settings / SETTINGS_FILE
        file.write_text(file.read_text().replace("back_log = 50", "back_log = 77"))
        if paused:
            database.pause()
        database.restart()
        assert backlogs(port) == ["77"]
