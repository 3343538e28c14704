"""The pure parts of the lab's pairs of kernels, and both ends' sockets over the loopback."""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.errors import LabError
from lab.guests import guest_command, machine, pair, run
from lab.guests.pair import Pair, PairResult
from lab.guests.pair_end import (
    FAMILIES,
    OPTION_SETS,
    echoes,
    echoing,
    has_been_spoken_to,
    is_greeted,
    negotiated,
)
from lab.guests.run import GuestError, GuestOptions, Wire, choose_native
from lab.guests.trees import ROWS, Row
from lab.patience import Deadline
from lab.processes.servers import GREETING

PAIR = Pair(Row("potato"), Row("woody"))
WIRE = Wire(7, "02:00:00:00:09:01")
CLOSING = {"server": "2.2", "client": "2.4", "untraced": 4, "waiting": 4}


def one_try(**other: object) -> dict[str, Any]:
    good = {"clients": 8, "stuck": 8, "greeted": 8, "equal": 8, "rescued": 8}
    return {"family": 4, "options": "all", "negotiated": "SACK", **good, **other}


def all_tries() -> list[dict[str, Any]]:
    return [one_try(family=family, options=name) for name in OPTION_SETS for family in FAMILIES]


def said(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for module in (guest_command, pair):
        module.add_parser(subparsers)
    return parser.parse_args(words)


class TestPairs:
    def test_every_row_plays_both_parts_once_and_never_against_itself(self) -> None:
        pairs = pair.ring(ROWS)
        assert [one.server for one in pairs] == list(ROWS)
        assert {one.client for one in pairs} == set(ROWS)
        assert all(one.server != one.client for one in pairs)

    @pytest.mark.parametrize("words", [[], ["--server", "sid"], ["--all", "--client", "sid"]])
    def test_a_senseless_choice_is_no_error_of_the_guests(self, words: list[str]) -> None:
        arguments = parsed("pair", *words)
        with pytest.raises(LabError, match="which pairs"):
            arguments.run(arguments)


class TestResults:
    def test_all_that_was_tried_and_owed_is_good(self) -> None:
        result = PairResult(PAIR)
        result.take_in(said(*all_tries(), CLOSING) + b'{"cut o')
        assert result.tries == all_tries()
        assert result.good
        assert pair.complaints([result]) == []
        line = " ".join(pair.table([result]).splitlines()[-1].split())
        assert line == "potato 2.2 woody 2.4 6 no timestamps SACK 8 of 8 8/8"

    @pytest.mark.parametrize("what", ["stuck", "greeted", "equal", "rescued"])
    def test_one_client_too_few_is_a_complaint(self, what: str) -> None:
        result = PairResult(PAIR, [*all_tries()[1:], one_try(**{what: 7})], CLOSING)
        assert not result.good
        assert f"'{what}': 7" in pair.complaints([result])[0]

    @pytest.mark.parametrize(
        ("tries", "closing"),
        [(all_tries()[1:], CLOSING), (all_tries(), {}), (all_tries(), {**CLOSING, "waiting": 3})],
    )
    def test_what_was_not_tried_or_not_controlled_is_a_complaint(
        self, tries: list[dict[str, Any]], closing: dict[str, Any]
    ) -> None:
        result = PairResult(PAIR, tries, closing)
        assert not result.good
        assert len(pair.complaints([result])) == 1


class TestWire:
    def test_a_guest_with_a_wire_has_one_interface_on_it(self) -> None:
        options = GuestOptions(wire=WIRE)
        words = machine.qemu_arguments(options, Path("/control"), Path("/boot/vmlinuz"))
        assert "socket,id=lab.wire,fd=7" in words
        assert sum(f"mac={WIRE.address}" in word for word in words) == 1
        assert not any(
            "-netdev" in word
            for word in machine.qemu_arguments(
                GuestOptions(), Path("/control"), Path("/boot/vmlinuz")
            )
        )

    def test_a_wire_needs_a_guest(self) -> None:
        assert not choose_native(GuestOptions(wire=WIRE), lambda: None)
        with pytest.raises(GuestError):
            choose_native(GuestOptions(wire=WIRE, native="always"), lambda: None)

    def test_the_servers_guest_is_the_one_that_its_command_line_says(self, tmp_path: Path) -> None:
        options = GuestOptions(
            kernel=tmp_path / "vmlinuz",
            root=tmp_path,
            cpus=1,
            views=(tmp_path / "a b", tmp_path),
            wire=WIRE,
            environment={"A": "b c"},
        )
        words = machine.guest_words(options, pair.command_for("server"))
        assert words[:3] == [sys.executable, "-m", "lab"]
        arguments = parsed(*words[3:])
        assert guest_command.options_from(arguments) == options
        assert arguments.command[1:] == pair.command_for("server")

    @pytest.mark.parametrize("text", ["7", "x,02:00:00:00:09:01", "7,socket", "7,"])
    def test_half_a_wire_is_refused(self, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            parsed("guest", "--wire", text)
        assert "DESCRIPTOR,HARDWARE-ADDRESS" in capsys.readouterr().err

    def test_a_command_gets_the_descriptor_that_it_is_to_hold(self) -> None:
        ours, theirs = socket.socketpair()
        code = f"import socket; socket.socket(fileno={theirs.fileno()}).send(b'here')"
        with (
            ours,
            theirs,
            run._session(
                [sys.executable, "-c", code], cwd=Path("/"), pass_fds=[theirs.fileno()]
            ) as process,
        ):
            ours.settimeout(30)
            assert ours.recv(4) == b"here"
            assert process.wait(30) == 0


class TestEnds:
    @pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
    def test_a_client_is_greeted_and_hears_what_it_said(self, address: str) -> None:
        with echoing(0) as port, socket.create_connection((address, port)) as client:
            assert is_greeted(client, Deadline(30))
            assert negotiated(client) == "timestamps SACK scaling"
            assert not has_been_spoken_to(client)
            assert echoes(client)

    def test_silence_is_no_greeting(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        with listener, socket.create_connection(listener.getsockname()) as client:
            assert not has_been_spoken_to(client)
            assert not is_greeted(client, Deadline(0.01))
            served, _ = listener.accept()
            served.close()
            assert not is_greeted(client, Deadline(30))
            assert has_been_spoken_to(client)

    def test_other_words_and_other_bytes_are_told(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(b"x" * len(GREETING))
            assert not is_greeted(ours, Deadline(30))

    def test_the_module_runs_in_either_part(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "lab.guests.pair_end", "neither"], capture_output=True, text=True
        )
        assert "KeyError: 'neither'" in done.stderr
