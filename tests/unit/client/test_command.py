"""--client on the command line: what it takes, what it refuses, and what it needs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from tcpstuck_bpf.cli import main
from tcpstuck_bpf.client import command, socket_reset, sockets
from tcpstuck_bpf.errors import EXIT_CANNOT_TRACE, EXIT_NOTHING_STUCK, EXIT_USAGE
from tcpstuck_bpf.options import build_parser

ALLOWED = {
    *("--help", "--version", "--client", "--pid", "--port", "-4", "-6", "--listener", "--netns"),
    *("--timeout", "--duration", "--json", "--each", "--verbose", "--summary", "--only"),
    *("--ready-file", "--rescue", "--rescue-exclude", "--rescue-rate", "--rescue-late"),
    # --replay has a side of its own, by its recording (tests/replay).
    *("--record", "--replay"),
}
VALUES = {
    "--join": ["x", "y"],
    "--explain": [],
    "--heartbeat": ["5m"],
    "--plot": ["x.svg"],
    "--metrics": [":9435"],
    "--probe-mode": ["kprobe"],
    "--max-handshakes": ["4096"],
}
REFUSED = sorted(
    {action.option_strings[-1] for action in build_parser()._actions} - ALLOWED - {"--why"}
)


def complaint(capsys: pytest.CaptureFixture[str], *words: str, status: int = EXIT_USAGE) -> str:
    """What is said of wrong use: three lines, and nothing on standard output."""
    assert main(words) == status
    out, err = capsys.readouterr()
    assert out == ""
    what, why, remedy = err.splitlines()
    assert what.startswith("tcpstuck-trace: ")
    assert why.startswith("  why: ")
    assert remedy.startswith("  remedy: ")
    return str(err)


@pytest.mark.parametrize("option", REFUSED)
def test_every_option_of_the_server_s_side_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (action,) = (one for one in build_parser()._actions if option in one.option_strings)
    takes_value = action.nargs is None and not action.const
    words = VALUES.get(option, ["x"] if takes_value else [])
    said = complaint(capsys, "--client", "-p", "3306", option, *words)
    assert "cannot be combined with --" in said


def test_the_refused_options_are_most_of_them() -> None:
    assert {"--dry-run", "--live", "--metrics", "--all"} <= {*REFUSED}


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--client"], "--client needs -p"),
        (["--client", "-p", "25", "--only", "ack-missing"], "--only ack-missing cannot be"),
        (["--client", "-p", "25", "--pid", "0"], "--pid: 0 is out of range"),
        (["--client", "-p", "25", "--pid", "me"], "--pid: 'me' is not a whole number"),
        (["--client", "-p", "25", "--pid", str((1 << 22) - 1)], "there is no process"),
        (["--client", "-p", "25", "--netns", "no/such"], "no network namespace no/such"),
        (["--client", "-p", "25", "--ready-file", "/no/such/file"], "--ready-file /no/such/file"),
        (["--client", "-p", "25", "--record", "/no/such/file"], "--record /no/such/file cannot be"),
        (["--client", "--replay", "/no/such/file"], "cannot read the recording /no/such/file"),
        (["--client", "-p", "25", "-4", "--listener", "::1"], "is never reached by IPv4"),
        (["--pid", "7"], "--pid needs --client"),
        (["--only", "greeting-missing"], "--only greeting-missing needs --client"),
        (["--only", "server-slow"], "--only server-slow needs --client"),
        (["--rescue=reset"], "--rescue=reset needs --client"),
        (["--client", "-p", "25", "--rescue=all"], "--rescue=all cannot be combined with --client"),
        (["--client", "-p", "25", "--rescue=known,reset"], "'known,reset' is not known, all"),
        (["--client", "-p", "25", "--rescue-late"], "--rescue-late needs --rescue"),
        (["--client", "-p", "25", "--rescue-exclude", "::/0"], "--rescue-exclude needs --rescue"),
        (["--client", "-p", "25", "--rescue-rate", "7"], "--rescue-rate needs --rescue"),
    ],
)
def test_wrong_use_is_told_in_three_lines(
    words: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert what in complaint(capsys, *words)


@pytest.mark.parametrize(
    ("number", "named"),
    [
        (errno.ENOENT, "modprobe tcp_diag"),
        (errno.EACCES, "AF_NETLINK"),
        (errno.EPERM, "AF_NETLINK"),
    ],
)
def test_a_kernel_that_lists_no_sockets_is_an_error_with_a_remedy(
    number: int,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sockets, "dump", refuse)
    said = complaint(capsys, "--client", "-p", "25", status=EXIT_CANNOT_TRACE)
    assert named in said


def test_what_is_watched_is_said_as_it_was_asked_for() -> None:
    words = ["--client", "-p", "25,26", "-4", "--listener", "10.9.0.1", "--pid", "7"]
    options = build_parser().parse_args(words)
    wanted = command._wanted(options)
    assert (wanted.ports, wanted.family, wanted.netns, wanted.pid) == ((25, 26), 4, None, 7)
    assert command._watched(options, wanted) == "ports 25, 26 of 10.9.0.1 over IPv4 by process 7"


def test_a_run_needs_neither_bcc_nor_root() -> None:
    """As any user of a machine without BCC; the port is nobody's."""
    without = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    lines = (
        "import sys",
        f"sys.path[:] = {sys.path!r}",
        "sys.modules['bcc'] = None",
        "from tcpstuck_bpf.cli import main",
        "sys.exit(main(['--client', '-p', '1', '-d', '1ms', '--netns', '/proc/self/ns/net']))",
    )
    child = subprocess.run(
        [*without, sys.executable, "-S", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    if "Permission denied" in child.stderr:
        pytest.skip("another user may not read this tree")
    assert "no connection to port 1 in network namespace" in child.stdout
    assert child.returncode == EXIT_NOTHING_STUCK


def refuse_raw(*_: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("mode", ["--rescue", "--rescue=reset"])
def test_who_may_not_send_is_told_what_works_without(
    mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.socket, "socket", refuse_raw)
    monkeypatch.setattr(command, "refuse_unless_readable", lambda _wanted: None)
    said = complaint(capsys, "--client", "-p", "25", mode, status=EXIT_CANNOT_TRACE)
    assert "root or CAP_NET_RAW" in said
    assert "--rescue=dry-run" in said


def test_a_kernel_that_cannot_end_connections_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("a raw socket takes root")
    monkeypatch.setattr(socket_reset, "kernel_can_end_sockets", lambda: False)
    said = complaint(capsys, "--client", "-p", "25", "--rescue=reset", status=EXIT_CANNOT_TRACE)
    assert "CONFIG_INET_DIAG_DESTROY" in said


def test_a_dry_run_needs_no_root() -> None:
    """As any user; the port is nobody's."""
    without = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    lines = (
        "import sys",
        f"sys.path[:] = {sys.path!r}",
        "from tcpstuck_bpf.cli import main",
        "words = ['--client', '-p', '1', '-d', '1ms', '--netns', '/proc/self/ns/net']",
        "sys.exit(main([*words, '--rescue=' + sys.argv[1]]))",
    )
    for mode, status in (("dry-run", EXIT_NOTHING_STUCK), ("reset", EXIT_CANNOT_TRACE)):
        child = subprocess.run(
            [*without, sys.executable, "-S", "-c", "\n".join(lines), mode],
            capture_output=True,
            text=True,
            timeout=60,
            cwd="/",
        )
        if "Permission denied" in child.stderr:
            pytest.skip("another user may not read this tree")
        assert child.returncode == status, child.stderr
