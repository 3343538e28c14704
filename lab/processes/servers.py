"""Servers that speak first: the lab's own small server and a real MariaDB.

Both can be paused; the kernel then still handles handshakes, but no process accepts connections.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from lab.errors import LabError, LabTimeoutError
from lab.patience import COMMAND_S, LOAD_S, SETTLE_S, START_S, Deadline, patient
from lab.processes.child import Child, End, pause

GREETING = b"220 lab at your service\r\n"
MARIADB_BINARY = "/usr/sbin/mariadbd"
MARIADB_UID = 65534
"""The user `nobody`. mariadbd does not run as root, and the user `mysql` comes only with the full
server package, which would start a service."""
SETTINGS_FILE = "60-lab.cnf"
"""As in the Vagrantfile."""


class Listen(NamedTuple):
    """Open the listening socket; the server accepts no connection before Resume."""

    address: str
    port: int
    backlog: int
    both_families: bool
    shares_port: bool = False
    """Share the port with other listeners (SO_REUSEPORT)."""
    transparent: bool = False
    """Accept packets sent to other addresses and ports (IP_TRANSPARENT)."""


class Listening(NamedTuple):
    """The answer to Listen."""

    port: int


class Resume(NamedTuple):
    """Start to accept and greet; connections in the accept queue come first."""


class Pause(NamedTuple):
    """Stop accepting."""


class Peers(NamedTuple):
    """Answer with all connections accepted so far."""


class AwaitAccepted(NamedTuple):
    """Answer True once `how_many` connections are accepted, or False when the limit passes."""

    how_many: int
    limit_s: float


class Accepted(NamedTuple):
    """The peer that accept() returned, and the time (CLOCK_MONOTONIC ns)."""

    peer_ip: str
    peer_port: int
    time_ns: int


class Greeter(Child):
    """The lab's own server process; a context manager. It listens at once and starts paused.

    With port 0 the kernel chooses; the attribute `port` is the actual port.
    """

    def __init__(
        self,
        end: End,
        address: str,
        port: int,
        *,
        backlog: int,
        both_families: bool = False,
        shares_port: bool = False,
        transparent: bool = False,
    ) -> None:
        super().__init__(end, "lab.processes.greeter_process")
        wanted = Listen(address, port, backlog, both_families, shares_port, transparent)
        try:
            listening = self.ask(wanted)
        except BaseException:
            self.close()
            raise
        self.port = int(listening.port)

    def __enter__(self) -> Greeter:
        return self

    def resume(self) -> None:
        """Start to accept and greet."""
        self.ask(Resume())

    def pause(self) -> None:
        """Stop accepting; the kernel still fills the accept queue."""
        self.ask(Pause())

    def accepted(self) -> list[Accepted]:
        """All connections accepted so far."""
        return list(self.ask(Peers()))

    def await_accepted(self, count: int, limit_s: float = SETTLE_S) -> None:
        """Wait until `count` connections are accepted. Raises LabTimeoutError."""
        limit_s = patient(limit_s)
        if not self.ask(AwaitAccepted(count, limit_s), limit_s + LOAD_S):
            seen = f"{len(self.accepted())} accepted"
            raise LabTimeoutError(f"the server to accept {count} connections", limit_s, seen)


class MariaDb:
    """A real mariadbd in a namespace; a context manager.

    mariadbd runs without grant tables and unneeded storage engines, because it sends the greeting
    before it uses them. It then starts in a tenth of a second instead of many seconds. Raises
    LabError if mariadbd cannot be started.

    Address, port and backlog are in a file of `settings`, a directory like MariaDB's own
    /etc/mysql/mariadb.conf.d. Each start reads it.
    """

    def __init__(self, end: End, address: str, port: int, *, backlog: int) -> None:
        self._end = end
        self._directory = Path(tempfile.mkdtemp(prefix="tcpstuck-mariadb-"))
        self._log = self._directory / "log"
        self.settings = self._directory / "mariadb.conf.d"
        try:
            os.chown(self._directory, MARIADB_UID, MARIADB_UID)
            self.settings.mkdir()
            (self.settings / SETTINGS_FILE).write_text(
                f"[mariadbd]\nbind-address = {address}\nport = {port}\nback_log = {backlog}\n"
            )
            self._start()
        except BaseException:
            self._remove_directory()
            raise

    def __enter__(self) -> MariaDb:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._kill()
        self._remove_directory()

    def pause(self) -> None:
        """Send SIGSTOP and wait until the process has stopped."""
        pause(self._process)
        if self._process.poll() is not None:
            raise self._cannot_start("it ended before it could be paused")

    def resume(self) -> None:
        """Send SIGCONT."""
        os.kill(self._process.pid, signal.SIGCONT)

    def restart(self) -> None:
        """End the server in good order and start it again. Raises LabError, LabTimeoutError."""
        self._process.terminate()
        self.resume()
        limit_s = patient(COMMAND_S)
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            raise LabTimeoutError("MariaDB to end", limit_s, self._said()) from error
        self._start()

    def _words(self) -> list[str]:
        return [
            # If the lab dies, no stopped database may stay behind.
            *("setpriv", f"--reuid={MARIADB_UID}", f"--regid={MARIADB_UID}", "--clear-groups"),
            *("--pdeathsig", "KILL", MARIADB_BINARY),
            f"--defaults-file={self.settings / SETTINGS_FILE}",
            f"--datadir={self._directory}",
            f"--socket={self._directory / 'socket'}",
            f"--pid-file={self._directory / 'pid'}",
            "--max-connections=500",
            "--max-connect-errors=1000000",
            # mariadbd must not disconnect clients that only read the greeting.
            "--connect-timeout=3600",
            "--skip-networking=0",
            "--skip-name-resolve",
            "--skip-grant-tables",
            "--performance-schema=OFF",
            "--innodb=OFF",
            "--default-storage-engine=Aria",
        ]

    def _start(self) -> None:
        kind = (socket.AF_UNIX, socket.SOCK_DGRAM)
        with socket.socket(*kind) as notices, self._log.open("wb") as log:
            path = self._directory / "notify"
            path.unlink(missing_ok=True)
            notices.bind(str(path))
            path.chmod(0o777)
            try:
                self._process = self._end.popen(
                    self._words(),
                    env={**os.environ, "NOTIFY_SOCKET": str(path)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            except FileNotFoundError as error:
                raise self._cannot_start(str(error)) from error
            try:
                self._await_ready(notices)
            except BaseException:
                self._kill()
                raise

    def _await_ready(self, notices: socket.socket) -> None:
        """Wait for READY=1 of sd_notify(3), which mariadbd sends once it listens."""
        deadline = Deadline(START_S)
        while not deadline.passed():
            # A short timeout: a process that ends sends no notice.
            notices.settimeout(min(1.0, deadline.left() or 0.001))
            try:
                if b"READY=1" in notices.recv(4096):
                    return
            except socket.timeout:
                pass
            if self._process.poll() is not None:
                raise self._cannot_start(f"exit status {self._process.returncode}: {self._said()}")
        raise LabTimeoutError("MariaDB to listen", deadline.limit_s, self._said())

    def _said(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "nothing in its log"

    def _cannot_start(self, why: str) -> LabError:
        return LabError("cannot run MariaDB", why, "install mariadb-server-core and util-linux")

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait(patient(COMMAND_S))

    def _remove_directory(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
