"""A real terminal: tmux runs a command in it, sends keys, and tells what it shows."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lab.patience import Deadline

LIMIT_S = 60
_LOOK_S = 0.05
"""A terminal signals nothing when its contents change, so they are looked at this often."""
STATUS = "exit status "
"""Precedes the command's exit status on the screen, when it has ended."""


class Terminal:
    """A terminal with one running command."""

    def __init__(self, socket: Path) -> None:
        self._socket = str(socket)

    def tmux(self, *words: str) -> str:
        """Run a tmux command. Returns its output."""
        done = subprocess.run(
            ["tmux", "-S", self._socket, "-f", "/dev/null", *words],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=LIMIT_S,
        )
        return done.stdout

    def type(self, line: str) -> None:
        """Type a line."""
        self.tmux("send-keys", "-l", line)
        self.press("Enter")

    def press(self, *keys: str) -> None:
        """Press keys, by tmux's names."""
        self.tmux("send-keys", *keys)

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size."""
        self.tmux("resize-window", "-x", str(columns), "-y", str(lines))

    def screen(self, *, colours: bool = False, whole: bool = False) -> str:
        """What the terminal shows; `whole`: also what scrolled off, each line in one piece."""
        return self.tmux("capture-pane", "-p", *["-e"] * colours, *["-J", "-S", "-"] * whole)

    def clear(self) -> None:
        """Forget what the terminal has shown."""
        self.tmux("send-keys", "-R")
        self.tmux("clear-history")

    def _size(self) -> str:
        return self.tmux("display-message", "-p", "#{window_width}x#{window_height}").strip()

    def until(self, wanted: str | Callable[[str], bool], limit_s: float = LIMIT_S) -> str:
        """Wait until the screen has this text, or until this function says so of it."""
        deadline = Deadline(limit_s)
        while True:
            shown = self.screen()
            if wanted in shown if isinstance(wanted, str) else wanted(shown):
                return shown
            assert not deadline.passed(), f"not on the screen: {wanted}\n{self._size()}\n{shown}"
            time.sleep(_LOOK_S)

    def exit_status(self, limit_s: float = LIMIT_S) -> int:
        """Wait for the command's end."""
        shown = self.until(lambda text: STATUS in text, limit_s)
        return int(shown.rpartition(STATUS)[2].split()[0])

    @property
    def pid(self) -> int:
        """The shell that runs the command."""
        return int(self.tmux("display-message", "-p", "#{pane_pid}"))


@contextlib.contextmanager
def terminal(
    directory: Path,
    command: list[str],
    columns: int = 80,
    lines: int = 24,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Terminal]:
    """Run a command in a terminal of this size; afterwards its exit status is on the screen."""
    one = Terminal(directory / "tmux")
    settings = " ".join(f"{name}={shlex.quote(v)}" for name, v in (environment or {}).items())
    script = f'{settings} {shlex.join(command)}; echo "{STATUS}$?"; exec cat'
    size = ("-x", str(columns), "-y", str(lines))
    one.tmux("new-session", "-d", *size, "-c", str(Path.cwd()), "sh", "-c", script)
    try:
        yield one
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            one.tmux("kill-server")
