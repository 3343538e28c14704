"""The command as a user meets it: wrong use, refusals, and pipes that close."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tcpstuck_bpf.cli import EXIT_BROKEN_PIPE, main
from tcpstuck_bpf.errors import EXIT_CANNOT_TRACE, EXIT_USAGE, CannotTraceError, UsageError
from tcpstuck_bpf.host import netns
from tcpstuck_bpf.judge.rules import VERDICT_NAMES
from tcpstuck_bpf.options import build_parser
from tests.builders import four_tuple, header
from tests.replay.test_replay import recorded

README = Path(__file__).parents[2] / "README.md"
WITHOUT_BCC = """
import sys
sys.modules["bcc"] = None
from tcpstuck_bpf.kernel import features
features.require_privileges = lambda: None
from tcpstuck_bpf.cli import main
sys.exit(main(sys.argv[1:]))
"""


def child(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a process where bcc cannot be imported."""
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", WITHOUT_BCC, *words],
        **{"capture_output": True, "text": True, "timeout": 60, "check": False, **options},
    )


@pytest.mark.parametrize(
    "words",
    [
        ["-p", "0"],
        ["-p", "70000"],
        ["-p", "abc"],
        ["-p", ""],
        ["-p", "25,,26"],
        ["-4", "-6"],
        ["-t", "0"],
        ["-t", "-1"],
        ["-t", "nan"],
        ["-d", "soon"],
        ["--only", "no-such-verdict"],
        ["--rescue=some"],
        ["--rescue=known,all"],
        ["--rescue", "--rescue-rate", "0"],
        ["--rescue", "--rescue-exclude", "10.0.0.0/33"],
        ["--rescue-late"],
        ["--rescue-exclude", "10.0.0.0/8"],
        ["--replay", "some.tcpstuck", "--rescue"],
        ["--listener", "no-such-name.invalid"],
        ["--listener", "2001:db8::1", "-4"],
        ["--netns", "/no/such/namespace"],
        ["--netns", "/etc/passwd"],
        ["--netns", "/etc"],
        ["--netns", "/proc/self/ns/mnt"],
        ["--netns", ""],
        ["--record", ""],
        ["--replay", ""],
        ["--ready-file", ""],
        ["--vmlinux", ""],
        ["--max-handshakes", "1"],
        ["--probe-mode", "magic"],
        ["--replay", "/no/such/file"],
        ["--replay", "/etc/passwd", "-p", "25"],
        ["--replay", "/etc/passwd", "--all"],
        ["--replay", "/etc/passwd"],
        ["--explain", "nonsense"],
        ["--explain", "ack-missing", "--all"],
        ["--explain", "--doctor"],
        ["--replay", "/no/such/file", "--explain"],
        ["--prot", "25"],
        ["surplus"],
    ],
)
def test_wrong_use_is_said_and_ends_with_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(words)
    out, err = capsys.readouterr()
    assert status == EXIT_USAGE
    assert out == ""
    assert len(err.splitlines()) == 3


def test_a_mistyped_option_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prot", "3311"]) == EXIT_USAGE
    assert "did you mean --port?" in capsys.readouterr().err


def test_a_wrong_value_of_a_known_option_is_not_taken_for_a_mistyped_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["-p", "70000"]) == EXIT_USAGE
    complaint = capsys.readouterr().err
    assert "70000" in complaint
    assert "did you mean" not in complaint


@pytest.mark.parametrize("option", ["--explain", "--only"])
@pytest.mark.parametrize("typed", ["accept-queue", "Accept_Queue_Full", "!accept-queue-full"])
def test_a_mistyped_verdict_is_guessed(
    option: str, typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([option, typed]) == EXIT_USAGE
    assert "did you mean accept-queue-full?" in capsys.readouterr().err


def test_help_fits_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("option", ["--all", "--no-why", "--no-cache", "--strict"])
@pytest.mark.parametrize("mode", ["--doctor", "--replay=some.tcpstuck", "--explain"])
def test_what_is_refused_is_named_as_it_was_written(
    mode: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([mode, option]) == EXIT_USAGE
    assert f": {option} cannot be combined with {mode.partition('=')[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--rescue-late", "--rescue-rate=7", "--rescue-exclude=10.0.0.1"]
)
def test_what_goes_with_the_rescue_alone_is_named_as_it_was_written(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([option]) == EXIT_USAGE
    assert f": {option.partition('=')[0]} needs --rescue" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["-t", "-1"], ["-t", "-4"], ["-d", "-0.5"]])
def test_a_negative_time_is_not_said_to_be_missing(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == EXIT_USAGE
    assert "begins with -" in capsys.readouterr().err


def test_a_namespace_behind_a_symbolic_link_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So people name a container's: ln -s /proc/PID/ns/net /run/netns/NAME."""
    monkeypatch.setattr(netns, "_NAMED", tmp_path)
    (tmp_path / "container").symlink_to("/proc/self/ns/net")
    assert netns.resolve("container") == netns.own_netns()
    assert netns.resolve(str(tmp_path / "container")) == netns.own_netns()


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/etc", "a directory"),
        ("/proc/self/ns/mnt", "a namespace of another kind"),
        ("/etc/passwd", "an ordinary file"),
    ],
)
def test_what_is_no_network_namespace_is_said(path: str, why: str) -> None:
    with pytest.raises(UsageError) as refused:
        netns.resolve(path)
    assert why in refused.value.why


def test_a_namespace_that_may_not_be_looked_at_is_not_said_to_be_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(CannotTraceError) as refused:
        netns.resolve("/proc/1/ns/net")
    assert "no network namespace" not in refused.value.what
    assert "root" in refused.value.remedy


def test_without_bcc_the_package_to_install_is_named() -> None:
    ended = child("-p", "3311")
    assert ended.returncode == EXIT_CANNOT_TRACE
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 3
    assert "python3-bpfcc" in ended.stderr


def test_without_privileges_sudo_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tcpstuck_bpf.kernel.features._effective_capabilities", lambda: 0)
    assert main(["-p", "3311"]) == EXIT_CANNOT_TRACE
    assert "sudo tcpstuck-trace" in capsys.readouterr().err


def test_a_replay_needs_no_bcc_and_tells_by_its_status(tmp_path: Path) -> None:
    ended = child("--replay", str(recorded(tmp_path / "run")))
    assert ended.stderr == ""
    assert "!accept-queue-full" in ended.stdout
    assert ended.returncode == 1


def test_a_replay_names_the_namespaces_of_the_recorded_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another machine's namespaces have the same numbers, and are others."""
    number = four_tuple().netns
    monkeypatch.setattr(netns, "names", lambda: {number: "wrong"})
    monkeypatch.setattr(netns, "own_netns", lambda: number)
    for known, heading in (
        (header(netns_names={number: "web"}), "in network namespace web:"),
        (header(), f"in network namespace {number}:"),
    ):
        path = str(recorded(tmp_path / "run", start=known))
        assert main(["--replay", path]) == 1
        shown = capsys.readouterr().out
        assert heading in shown
        assert "wrong" not in shown
    assert main(["--replay", str(recorded(tmp_path / "run", start=header(own_netns=number)))]) == 1
    assert "in network namespace" not in capsys.readouterr().out


HOSTILE = "\x1b]0;root\x07\x9b2J\u202ecaf\xe9 \u20ac"


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "utf-8"},
    ],
    ids=str,
)
def test_no_name_commands_the_terminal_or_ends_the_run(
    environment: dict[str, str], tmp_path: Path
) -> None:
    number = four_tuple().netns
    start = header(netns_names={number: os.fsdecode(HOSTILE.encode() + b"\xff\n")})
    ended = child(
        *("--replay", str(recorded(tmp_path / "run", start=start)), "-v"),
        text=False,
        env={**os.environ, **environment},
    )
    assert (ended.returncode, ended.stderr) == (1, b"")
    encoding = environment.get("PYTHONIOENCODING", "ascii")
    shown = ended.stdout.decode(encoding if "LC_ALL" not in environment else "utf-8")
    assert all(line.isprintable() for line in shown.split("\n"))
    assert "\\x1b]0;root\\x07\\x9b2J\\u202ecaf" in shown
    assert "\\xff\\x0a" in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_is_wrong_with_a_name_is_said_whatever_is_in_it(encoding: str) -> None:
    name = os.fsdecode(b"/no/such/\x1b[2J\xff\n\xe2\x80\xae")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for words in (["--replay", name], ["--vmlinux", name, "--doctor"], ["--netns", name], [name]):
        ended = child(*words, text=False, env=environment)
        assert ended.returncode == EXIT_USAGE
        assert ended.stderr.decode(encoding).replace("\n", "").isprintable()
        assert b"\\x1b[2J\\xff\\x0a\\u202e" in ended.stderr


def test_json_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    ended = child(
        *("--replay", str(recorded(tmp_path / "run")), "--json"),
        text=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-16"},
    )
    assert [json.loads(line)["type"] for line in ended.stdout.decode("utf-8").splitlines()]


def test_a_reader_that_closes_the_pipe_ends_it_quietly(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    path = str(recorded(tmp_path / "run"))
    ended = child(
        "--replay", path, "--json", capture_output=False, stdout=theirs, stderr=subprocess.PIPE
    )
    os.close(theirs)
    assert ended.stderr == ""
    assert ended.returncode == EXIT_BROKEN_PIPE


@pytest.mark.parametrize("words", [["--explain"], ["--explain", "ack-missing"]])
def test_what_waits_in_the_buffer_meets_a_closed_pipe_quietly(
    words: list[str],
) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    # Buffered, as users have it: only then does the end of the process meet the closed pipe.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = child(
        *words, capture_output=False, stdout=theirs, stderr=subprocess.PIPE, env=environment
    )
    os.close(theirs)
    assert ended.stderr == ""
    assert ended.returncode == EXIT_BROKEN_PIPE


@pytest.mark.parametrize("words", [["--explain"], ["--help"], ["--version"]])
@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("errors_too", [True, False])
def test_a_full_disk_below_the_output_is_told_and_is_no_stuck_connection(
    words: list[str], buffered: bool, errors_too: bool
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    with Path("/dev/full").open("w") as full:
        ended = child(
            *words,
            capture_output=False,
            stdout=full,
            stderr=full if errors_too else subprocess.PIPE,
            env=environment,
        )
    assert ended.returncode == EXIT_USAGE
    if not errors_too:
        assert "No space left on device" in ended.stderr
        assert len(ended.stderr.splitlines()) == 3


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_standard_stream_takes_nothing_and_breaks_nothing(
    closed: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", WITHOUT_BCC, "--replay", str(recorded(tmp_path / "run"))]
    ended = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ("accept-queue-full" in ended.stdout) == (">&-" not in closed.replace("2>&-", ""))


def test_messages_do_not_go_into_the_output_where_theirs_is_closed() -> None:
    ended = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", WITHOUT_BCC, "-p", "3311"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (EXIT_CANNOT_TRACE, "")


def test_ctrl_c_while_modules_are_read_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "difflib.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    ended = subprocess.run(
        [sys.executable, "-m", "tcpstuck_bpf", "--explain"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


LOSING_ITS_TERMINAL = """
import os, signal, types
signal.signal(signal.SIGHUP, signal.{before})
from tcpstuck_bpf.interrupts import Interrupts
interrupts = Interrupts()
interrupts.live = types.SimpleNamespace(stop=False, reading=False)
os.kill(os.getpid(), signal.SIGHUP)
print("for the terminal", flush=True)
os.write({result}, b"stopped" if interrupts.live.stop else b"goes on")
"""


@pytest.mark.parametrize(("before", "then"), [("SIG_DFL", b"stopped"), ("SIG_IGN", b"goes on")])
def test_a_lost_terminal_ends_a_run_unless_nohup_says_otherwise(before: str, then: bytes) -> None:
    result, theirs = os.pipe()
    terminal, end = pty.openpty()
    ended = subprocess.run(
        [sys.executable, "-c", LOSING_ITS_TERMINAL.format(before=before, result=theirs)],
        stdout=end,
        stderr=subprocess.PIPE,
        pass_fds=[theirs],
        timeout=60,
        check=False,
    )
    for number in (theirs, end):
        os.close(number)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert os.read(result, 100) == then
    printed = b""
    # Where nothing came, reading from a terminal whose other end is closed fails.
    with contextlib.suppress(OSError):
        printed = os.read(terminal, 100)
    assert (b"terminal" in printed) == (then == b"goes on")
    for number in (result, terminal):
        os.close(number)


def test_an_explanation_needs_neither_bcc_nor_privileges(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = child("--explain", "ack-missing")
    assert (ended.returncode, ended.stderr) == (0, "")
    monkeypatch.setattr("tcpstuck_bpf.kernel.features._effective_capabilities", lambda: 0)
    assert main(["--explain", "ack-missing"]) == 0
    assert "spoofed" in capsys.readouterr().out


def test_readme_documents_every_option_and_verdict() -> None:
    text = README.read_text("utf-8")
    table = text[text.index("## Options") : text.index("## Limits")]
    documented = set(re.findall(r"(?<![\w-])--?[a-z46][a-z-]*", table))
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert documented == known
    verdicts = text[text.index("## Verdicts") : text.index("## Options")]
    assert {*VERDICT_NAMES} == set(re.findall(r"^\| `([a-z-]+)`", verdicts, re.M))


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("/home/anna/.local/bin/tcpstuck-trace", "sudo /home/anna/.local/bin/tcpstuck-trace"),
        ("/opt/my tools/tcpstuck-trace", "sudo '/opt/my tools/tcpstuck-trace'"),
        ("/usr/local/sbin/tcpstuck-trace", "sudo tcpstuck-trace"),
        ("/usr/bin/tcpstuck-trace", "sudo tcpstuck-trace"),
        ("/usr/lib/python3/dist-packages/tcpstuck_bpf/__main__.py", "sudo tcpstuck-trace"),
    ],
)
def test_sudo_is_named_with_the_path_of_what_it_would_not_find(
    command: str,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [command])
    monkeypatch.setattr("tcpstuck_bpf.kernel.features._effective_capabilities", lambda: 0)
    assert main(["-p", "3311"]) == EXIT_CANNOT_TRACE
    assert capsys.readouterr().err.endswith(f"remedy: run it as root: {named}\n")
