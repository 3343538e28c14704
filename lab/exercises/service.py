"""`systemctl restart mariadb` in a terminal on the exercises' server.

No systemd runs in a network namespace. The command connects to a socket of the process that made
the hosts. That process restarts the database and answers: nothing, or why it failed.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Protocol

from lab.errors import LabError

_ASK = """\
import socket, sys
with socket.socket(socket.AF_UNIX) as one:
    one.connect(sys.argv[1])
    answer = one.makefile().read()
sys.exit(answer or 0)
"""
_COMMAND = """\
#!/bin/sh
if [ "$*" != "restart mariadb" ]; then
    echo "systemctl: the exercises only have: systemctl restart mariadb" >&2
    exit 1
fi
exec {ask}
"""


class Restartable(Protocol):
    """What the command restarts."""

    def restart(self) -> None:
        """End it and start it again. Raises LabError."""


class ServiceCommand:
    """The command, at `place`/systemctl, and the thread that obeys it; a context manager."""

    def __init__(self, place: Path, database: Restartable) -> None:
        self._database = database
        address = str(place / "systemctl.socket")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen()
        command = place / "systemctl"
        command.write_text(_COMMAND.format(ask=shlex.join([sys.executable, "-c", _ASK, address])))
        command.chmod(0o755)
        self._thread = threading.Thread(target=self._obey, name="systemctl")

    def __enter__(self) -> ServiceCommand:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # This ends the thread's accept(); closing the socket would not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _obey(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                asking, _ = self._listener.accept()
                with asking:
                    answer = self._restarted()
                    # Ctrl-C may have ended the command meanwhile.
                    with contextlib.suppress(BrokenPipeError):
                        asking.sendall(answer.encode())

    def _restarted(self) -> str:
        try:
            self._database.restart()
        except LabError as error:
            return "\n".join(error.lines())
        return ""
