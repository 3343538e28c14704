"""The completions, asked for in real shells: a line is typed, and all proposals inserted."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.pages import completions
from lab.pages.build import BASH, write_pages
from lab.patience import patient
from tcpstuck_bpf.judge.rules import VERDICT_NAMES
from tcpstuck_bpf.options import build_parser

LIMIT_S = 30.0
READY, END = "ready>", "<end>"
# The shell prints what it was given as arguments, each on a line of its own.
PRINTER = "tcpstuck-trace() { printf '<%s>\\n' \"$@\"; printf '%s%s\\n' '<en' 'd>'; }"
BASH_START = f"""
source {{directory}}/{BASH}
{PRINTER}
bind 'set bell-style none'
bind '"\\C-t": insert-completions'
PS1='{READY}'
"""
ZSH_START = f"""
fpath=({{directory}} $fpath)
autoload -Uz compinit; compinit -D -u
{PRINTER}
zstyle ':completion:*' completer _all_matches _complete
zstyle ':completion:*' insert true
zstyle ':completion:*:all-matches' old-matches false
bindkey -e; bindkey '^T' complete-word
unsetopt BEEP ZLE_BRACKETED_PASTE PROMPT_SP PROMPT_CR
PS1='{READY}'
"""

Ask = Callable[[str], set[str]]


class Shell:
    """An interactive shell at a terminal of its own."""

    def __init__(self, words: list[str], directory: Path, environment: dict[str, str]) -> None:
        self._unread = ""
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(directory)
            os.execvpe(words[0], words, {**environment, "TERM": "dumb"})
        size = struct.pack("4H", 50, 4000, 0, 0)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)
        self._until(READY)

    def _until(self, mark: str) -> str:
        end = time.monotonic() + patient(LIMIT_S)
        while mark not in self._unread:
            left = end - time.monotonic()
            assert left > 0, f"no {mark!r} in {self._unread!r}"
            if select.select([self._terminal], [], [], left)[0]:
                self._unread += os.read(self._terminal, 65536).decode("utf-8", "replace")
        text, _, self._unread = self._unread.partition(mark)
        return text

    def arguments(self, typed: str) -> list[str]:
        """What the command was given after the proposals for the typed line were inserted."""
        os.write(self._terminal, f"tcpstuck-trace {typed}\x14\r".encode())
        shown = self._until(END)
        self._until(READY)
        lines = shown.replace("\r", "\n").splitlines()
        return [line[1:-1] for line in lines if line[:1] == "<" and line[-1:] == ">"]

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.close(self._terminal)
        os.waitpid(self._pid, 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A current directory with a file and a directory in it."""
    directory = tmp_path_factory.mktemp("place")
    (directory / "mail.tcpstuck").touch()
    (directory / "built").mkdir()
    return directory


@pytest.fixture(scope="module", params=["bash", "zsh"])
def ask(
    request: pytest.FixtureRequest, place: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ask]:
    """What a shell proposes for the last word of a line."""
    if shutil.which(request.param) is None:
        pytest.fail(f"no {request.param}: make setup installs it")
    start = tmp_path_factory.mktemp(request.param)
    write_pages(start)
    if request.param == "bash":
        (start / "rc").write_text(BASH_START.replace("{directory}", str(start)))
        words = ["bash", "--noprofile", "--rcfile", str(start / "rc"), "-i"]
    else:
        (start / ".zshrc").write_text(ZSH_START.replace("{directory}", str(start)))
        words = ["zsh", "-o", "no_global_rcs", "-i"]
    shell = Shell(words, place, {"PATH": os.environ["PATH"], "ZDOTDIR": str(start)})

    def proposals(typed: str) -> set[str]:
        before = len(typed.split()) - (not typed.endswith(" "))
        return set(shell.arguments(typed)[before:])

    yield proposals
    shell.close()


def test_every_option_is_proposed(ask: Ask) -> None:
    known = {option for action in build_parser()._actions for option in action.option_strings}
    long = {option for option in known if option.startswith("--")}
    assert {one.rstrip("=") for one in ask("--")} == long


def test_a_beginning_narrows_it_down(ask: Ask) -> None:
    assert {one.rstrip("=") for one in ask("-p 25 --res")} == {
        "--rescue",
        "--rescue-exclude",
        "--rescue-rate",
        "--rescue-late",
    }


@pytest.mark.parametrize("typed", ["--explain ", "--explain=", "--only ", "--only="])
def test_verdicts_are_proposed(ask: Ask, typed: str) -> None:
    assert {one.rpartition("=")[2] for one in ask(typed)} >= {*VERDICT_NAMES}


def test_a_list_goes_on_after_its_comma(ask: Ask) -> None:
    assert ask("--only ack-missing,data") == {"ack-missing,data-lost"}


def test_what_is_written_behind_the_sign_is_proposed(ask: Ask) -> None:
    proposed = {one.rpartition("=")[2] for one in ask("--rescue=")}
    modes = {"known", "all", "reset"}
    assert proposed == {*modes, "dry-run", *(f"{mode},dry-run" for mode in modes)}
    assert {one.rpartition("=")[2] for one in ask("--rescue=dr")} == {"dry-run"}
    assert ask("--probe-mode f") == {"fentry"}


@pytest.mark.parametrize("option", ["--replay", "--record", "--vmlinux", "--against"])
def test_files_are_proposed(ask: Ask, option: str) -> None:
    assert ask(f"{option} mail") == {"mail.tcpstuck"}


@pytest.mark.parametrize("option", ["--build", "--programs"])
def test_directories_alone_are_proposed(ask: Ask, option: str) -> None:
    assert {one.rstrip("/") for one in ask(f"{option} ")} == {"built"}


def test_namespaces_are_proposed(ask: Ask) -> None:
    assert "all" in ask("--netns ")
    assert ask("--netns /etc/pass") >= {"/etc/passwd"}


@pytest.mark.parametrize("typed", ["-p ", "--timeout ", "--rescue-rate "])
def test_numbers_are_typed_by_hand(ask: Ask, typed: str) -> None:
    assert ask(typed) == set()


def test_every_value_has_its_way() -> None:
    """A new metavar is to be thought of here."""
    by_hand = {
        action.dest
        for action in build_parser()._actions
        if (found := completions.value(action)) is not None and found.empty
    }
    assert by_hand == {
        "port",
        "listener",
        "pid",
        "timeout",
        "duration",
        "max_handshakes",
        "metrics",
        "rescue_exclude",
        "rescue_rate",
    }
