"""The pure parts of the guest harness, and its native half against processes of known behaviour."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.guests import guest_command, machine, run
from lab.guests.run import GuestError, GuestOptions, Wire, run_in_guest
from lab.patience import PATIENCE_VARIABLE

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
KERNEL = Path("/cache/boot/vmlinuz-1")
CONTROL = Path("/tmp/control")
THE_COMMAND = ("-m", "lab", "guest", "--native", "always", "--timeout", "30")
ANOTHER_PROGRAM = (
    "-c",
    """
import sys
from lab.guests.run import GuestOptions, run_in_guest, write_through
options = GuestOptions(native="always", timeout_s=30)
run_in_guest(sys.argv[2:], options=options, stdout_sink=write_through(sys.stdout))
""",
)
GUESTS_BESIDE = (
    "-c",
    """
import signal, sys
from concurrent.futures import wait
# A background job of a shell has SIGINT ignored, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from lab.guests.run import GuestOptions, guests_beside, run_in_guest, write_through
options = GuestOptions(native="always", timeout_s=30)
with guests_beside(2) as pool:
    wait([
        pool.submit(run_in_guest, command, options=options, stdout_sink=write_through(sys.stdout))
        for command in (["sleep", "1000"], sys.argv[2:], ["sleep", "1000"])
    ])
""",
)


def virtme(options: GuestOptions, use_kvm: bool = False) -> list[str]:
    return machine.virtme_arguments(
        options, kernel=KERNEL, busybox=Path("/cache/busybox"), control=CONTROL, use_kvm=use_kvm
    )


def following(arguments: list[str], name: str) -> list[str]:
    return [after for before, after in zip(arguments, arguments[1:]) if before == name]


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    guest_command.add_parser(parser.add_subparsers())
    return parser.parse_args(["guest", *arguments])


def native(code: str, environment: dict[str, str] | None = None) -> run.GuestResult:
    settings = GuestOptions(native="always", timeout_s=30.0, environment=environment or {})
    return run_in_guest([sys.executable, "-c", code], options=settings)


class TestCommandLine:
    @given(st.lists(words, min_size=1, max_size=5), words)
    def test_shell_hands_over_every_word_and_setting_unchanged(
        self, arguments: list[str], value: str
    ) -> None:
        line = machine.command_line(["/usr/bin/printf", r"%s\0", *arguments], {"SETTING": value})
        shown = subprocess.run(["/bin/bash", "-c", line], capture_output=True, check=True).stdout
        assert shown == b"".join(word.encode() + b"\0" for word in arguments)
        settings = subprocess.run(
            ["/bin/bash", "-c", machine.command_line(["/usr/bin/env", "-0"], {"A": value})],
            capture_output=True,
            check=True,
        ).stdout
        assert settings == f"A={value}\0".encode()

    def test_guest_sees_nothing_of_the_hosts_environment_but_the_users_patience(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOST_ONLY", "1")
        monkeypatch.setenv(PATIENCE_VARIABLE, "3")
        seen = machine.guest_environment({"PATH": "/x"})
        assert "HOST_ONLY" not in seen
        assert (seen["PATH"], seen[PATIENCE_VARIABLE]) == ("/x", "3")

    @given(words.filter(lambda name: bool(name)))
    def test_boot_script_is_valid_shell_whatever_the_paths(self, name: str) -> None:
        share = Path("/srv") / name.replace("/", "_")
        options = GuestOptions(shares=(share,), views=(share,))
        script = machine.boot_script(["true"], options, share)
        subprocess.run(["/bin/bash", "-n"], input=script.encode(), check=True)
        assert f"cd {shlex.quote(str(share))}" in script


class TestVirtmeArguments:
    """Where the arguments and the guest's first script have to agree, and what nobody may miss."""

    EVERYTHING = GuestOptions(
        root=Path("/srv/tree"),
        kernel=KERNEL,
        shares=(Path("/srv/out"), Path("/srv/a,readonly=on")),
        views=(Path("/srv/a b"), Path("/srv/c")),
    )

    @pytest.mark.parametrize("options", [GuestOptions(), EVERYTHING])
    def test_what_is_exported_is_mounted_and_the_other_way_round(
        self, options: GuestOptions
    ) -> None:
        exported = [tag for _, tag, _ in exports_of(options)]
        mounted = set(re.findall(r" (lab\.\w+)(?= )", all_scripts(options)))
        assert sorted(exported) == sorted(mounted)

    def test_only_control_and_shares_can_be_written(self) -> None:
        writable = {path for path, _, read_only in exports_of(self.EVERYTHING) if not read_only}
        assert writable == {str(CONTROL), *map(str, self.EVERYTHING.shares)}

    def test_every_port_the_script_uses_is_made(self) -> None:
        devices = following(virtme(GuestOptions()), "-device")
        made = {device.split("name=")[1].split(",")[0] for device in devices if "name=" in device}
        script = all_scripts(GuestOptions())
        by_stream = [script.replace("$stream", stream) for stream in ("stdout", "stderr")]
        assert made == set(re.findall(r"/dev/virtio-ports/(lab\.\w+)", "".join(by_stream)))

    @pytest.mark.parametrize(
        ("use_kvm", "icount", "hastened"),
        [(False, False, True), (True, False, False), (False, True, False)],
    )
    def test_only_an_emulated_guest_that_counts_no_instructions_is_hastened(
        self, use_kvm: bool, icount: bool, hastened: bool
    ) -> None:
        arguments = virtme(GuestOptions(icount=icount), use_kvm)
        given = {word for before, word in zip(arguments, arguments[1:]) if before == "--kopt"}
        assert (set(machine.EMULATED) <= given) == hastened
        assert (following(arguments, "-accel") == ["tcg,thread=single"]) == hastened
        assert (following(arguments, "-cpu") == [machine.PLAIN_CPU[1]]) == hastened
        assert (following(arguments, "-machine") == [machine.FEW_DEVICES[1]]) == hastened
        assert hastened or not given & set(machine.EMULATED)

    @pytest.mark.parametrize(
        ("use_kvm", "icount", "disabled"),
        [(True, False, False), (True, True, True), (False, False, True), (False, True, True)],
    )
    def test_kvm_is_off_unless_it_works_and_no_clock_counts(
        self, use_kvm: bool, icount: bool, disabled: bool
    ) -> None:
        arguments = virtme(GuestOptions(icount=icount), use_kvm)
        assert ("--disable-kvm" in arguments) is disabled

    def test_kernel_command_line_has_room_for_the_first_script(self) -> None:
        """x86's COMMAND_LINE_SIZE is 2048 bytes; virtme-ng's own arguments take about 700."""
        assert len(base64.b64encode(first_script(GuestOptions()).encode())) < 1000


def exports_of(options: GuestOptions) -> list[tuple[str, str, bool]]:
    """Path, tag and whether it is read-only, as QEMU reads them: two commas are one, in a value."""
    exports = []
    for words in following(virtme(options), "-virtfs"):
        parts = [part.replace("\0", ",") for part in words.replace(",,", "\0").split(",")]
        named = dict(part.split("=", 1) for part in parts[1:])
        exports.append((named["path"], named["mount_tag"], named.get("readonly") == "on"))
    return exports


def first_script(options: GuestOptions) -> str:
    return following(virtme(options), "--script-sh")[0]


def all_scripts(options: GuestOptions) -> str:
    return first_script(options) + machine.boot_script(["true"], options, Path("/"))


class TestArguments:
    def test_command_may_contain_options_and_dashes(self) -> None:
        arguments = parsed("--cpus", "4", "--", "sh", "-c", "exit 3", "--", "--cpus")
        assert arguments.command == ["--", "sh", "-c", "exit 3", "--", "--cpus"]
        assert guest_command.options_from(arguments).cpus == 4

    def test_everything_reaches_the_options(self, tmp_path: Path) -> None:
        image = tmp_path / "vmlinuz"
        options = guest_command.options_from(
            parsed(
                *("--kernel", str(image), "--memory", "512M", "--icount", "--share", str(tmp_path)),
                *("--root", str(tmp_path), "--view", str(tmp_path)),
                *("--timeout", "1.5", "--native", "never", "--env", "A=b=c", "--env", "D="),
                *("--", "true"),
            )
        )
        assert options == GuestOptions(
            kernel=image,
            root=tmp_path,
            memory="512M",
            icount=True,
            shares=(tmp_path,),
            views=(tmp_path,),
            timeout_s=1.5,
            native="never",
            environment={"A": "b=c", "D": ""},
        )

    @pytest.mark.parametrize(
        "wrong",
        [
            ("--cpus", "0"),
            ("--cpus", "two"),
            ("--memory", "2"),
            ("--memory", "0G"),
            ("--timeout", "0"),
            ("--timeout", "nan"),
            ("--timeout", "inf"),
            ("--env", "A"),
            ("--env", "1A=b"),
            ("--env", "A;rm=b"),
            ("--native", "maybe"),
        ],
    )
    def test_wrong_use_is_refused_before_anything_boots(self, wrong: tuple[str, str]) -> None:
        with pytest.raises(SystemExit) as refusal:
            parsed(*wrong, "--", "true")
        assert refusal.value.code == 2


class TestNativeChoice:
    @pytest.mark.parametrize(
        ("mode", "refusal", "expected"),
        [
            ("auto", None, True),
            ("auto", "lockdown", False),
            ("always", "lockdown", True),
            ("never", None, False),
        ],
    )
    def test_follows_the_trial_unless_told(
        self, mode: str, refusal: str | None, expected: bool
    ) -> None:
        assert run.choose_native(GuestOptions(native=mode), lambda: refusal) is expected

    @pytest.mark.parametrize(
        "wish",
        [
            GuestOptions(icount=True),
            GuestOptions(kernel=KERNEL),
            GuestOptions(root=Path("/srv/tree")),
            GuestOptions(wire=Wire(7, "02:00:00:00:09:01")),
        ],
    )
    def test_what_only_a_guest_has_is_never_run_natively(self, wish: GuestOptions) -> None:
        assert run.choose_native(wish, lambda: None) is False
        with pytest.raises(GuestError):
            run.choose_native(dataclasses.replace(wish, native="always"), lambda: None)


class TestNativeRun:
    """The same pump and time limit that a guest's streams go through."""

    def test_streams_stay_apart_and_the_status_comes_back(self) -> None:
        result = native("import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)")
        assert (result.status, result.stdout, result.stderr) == (7, b"out\n", b"err\n")
        assert result.native
        assert not result.timed_out

    def test_a_signal_is_128_and_its_number(self) -> None:
        result = native("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        assert result.status == 128 + 9

    def test_more_than_a_pipe_holds_arrives_whole(self) -> None:
        size = 1 << 20
        result = native(
            f"import sys; sys.stdout.write('x' * {size}); sys.stderr.write('y' * {size})"
        )
        assert result.stdout == b"x" * size
        assert result.stderr == b"y" * size

    def test_environment_is_added(self) -> None:
        value = "a b'c\"$d\n"
        result = native(
            "import os; print(os.environ['SETTING'], end='')", environment={"SETTING": value}
        )
        assert result.stdout == value.encode()

    def test_time_limit_ends_the_command_and_what_it_started(self, tmp_path: Path) -> None:
        pipe = tmp_path / "held"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        code = (
            "import os, signal\n"
            f"os.open({str(pipe)!r}, os.O_WRONLY)\n"
            "os.fork()\n"
            "print('started', flush=True)\n"
            "signal.pause()"
        )
        began = time.monotonic()
        result = run_in_guest(
            [sys.executable, "-c", code], options=GuestOptions(native="always", timeout_s=2.0)
        )
        assert result.timed_out
        assert result.status == run.TIMEOUT_STATUS
        assert b"started" in result.stdout
        assert 2.0 <= time.monotonic() - began < 20.0
        os.set_blocking(reader, True)
        # End of file only once every process that held the other end is gone.
        assert os.read(reader, 1) == b""
        os.close(reader)

    def test_a_command_that_falls_silent_has_hung(self) -> None:
        code = "import signal\nprint('the last word', flush=True)\nsignal.pause()"
        said: list[bytes] = []
        began = time.monotonic()
        with pytest.raises(GuestError, match="hung: it printed nothing for 2 s"):
            run_in_guest(
                [sys.executable, "-c", code],
                options=GuestOptions(native="always", timeout_s=60.0, silence_s=2.0),
                stdout_sink=said.append,
            )
        assert b"".join(said) == b"the last word\n"
        assert time.monotonic() - began < 30.0

    def test_a_command_that_goes_on_printing_may_go_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The clock moves only when the command prints, each time less than it may be silent."""
        times, now = 8, [100.0]
        pipe = tmp_path / "go on"
        os.mkfifo(pipe)
        answers = os.open(pipe, os.O_RDWR)

        def hear(piece: bytes) -> None:
            # A line may come in two pieces.
            if piece.endswith(b"\n"):
                now[0] += 1.5
                os.write(answers, b"!")

        code = f"with open({str(pipe)!r}, 'rb', 0) as answers:\n"
        code += f"    for _ in range({times}):\n        print(1, flush=True)\n"
        code += "        answers.read(1)"
        options = GuestOptions(native="always", timeout_s=60.0, silence_s=2.0)
        with monkeypatch.context() as patch:
            patch.setattr(run.time, "monotonic", lambda: now[0])
            result = run_in_guest([sys.executable, "-c", code], options=options, stdout_sink=hear)
        os.close(answers)
        assert (result.status, now[0]) == (0, 100.0 + times * 1.5)

    def test_a_process_left_behind_neither_delays_nor_survives(self, tmp_path: Path) -> None:
        pipe = tmp_path / "held"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        code = (
            f"import os, signal\nos.open({str(pipe)!r}, os.O_WRONLY)\nos.fork() or signal.pause()"
        )
        result = native(code)
        assert (result.status, result.timed_out) == (0, False)
        os.set_blocking(reader, True)
        assert os.read(reader, 1) == b""
        os.close(reader)

    def test_a_command_gets_the_descriptor_that_it_is_to_hold(self) -> None:
        ours, theirs = socket.socketpair()
        code = f"import socket; socket.socket(fileno={theirs.fileno()}).send(b'here')"
        words, end = [sys.executable, "-c", code], theirs.fileno()
        with ours, theirs, run._session(words, cwd=Path("/"), pass_fds=[end]) as process:
            ours.settimeout(30)
            assert ours.recv(4) == b"here"
            assert process.wait(30) == 0

    def test_sinks_get_the_pieces_as_they_come(self) -> None:
        pieces: list[bytes] = []
        result = run_in_guest(
            [sys.executable, "-c", "print(1)"],
            options=GuestOptions(native="always"),
            stdout_sink=pieces.append,
        )
        assert b"".join(pieces) == b"1\n"
        assert result.stdout == b""


class TestCommand:
    """`python -m lab guest` as a process, natively."""

    @staticmethod
    def start(code: str, through: Sequence[str] = THE_COMMAND) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *through, "--", sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[3],
        )

    def test_a_reader_that_leaves_ends_it_without_a_traceback(self) -> None:
        with self.start("while True: print('x' * 1000)") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.read(1)
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(30) == 128 + signal.SIGPIPE

    @pytest.mark.parametrize(
        ("through", "number"),
        [
            (THE_COMMAND, signal.SIGTERM),
            (THE_COMMAND, signal.SIGKILL),
            (ANOTHER_PROGRAM, signal.SIGTERM),
            (GUESTS_BESIDE, signal.SIGTERM),
            (GUESTS_BESIDE, signal.SIGINT),
            (GUESTS_BESIDE, signal.SIGKILL),
        ],
    )
    def test_whatever_ends_it_ends_the_command_and_what_that_started(
        self, tmp_path: Path, through: Sequence[str], number: signal.Signals
    ) -> None:
        pipe = tmp_path / "held"
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        code = (
            "import os, signal\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            f"os.open({str(pipe)!r}, os.O_WRONLY)\n"
            "os.fork() and print('started', flush=True)\n"
            "signal.pause()"
        )
        with self.start(code, through) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"started\n"
            process.send_signal(number)
            asked = 128 + number if number == signal.SIGTERM else -number
            assert process.wait(30) == asked
        os.set_blocking(reader, True)
        assert os.read(reader, 1) == b""
        os.close(reader)
