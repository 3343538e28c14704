"""The pure parts of the lab's pairs of kernels, and both ends' sockets over the loopback."""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from lab.errors import LabError
from lab.guests import pair
from lab.guests.pair import Pair, PairResult
from lab.guests.pair_end import (
    FAMILIES,
    OPTION_SETS,
    Server,
    control_server,
    echoes,
    echoing,
    is_greeted,
    negotiated,
    server_at,
    stuck_of,
)
from lab.guests.trees import ROWS, Row
from lab.network.readings import SocketRow
from lab.network.topology import OwnNamespace
from lab.patience import Deadline
from lab.processes.servers import GREETING
from lab.scenarios.tracer import Tracer

LOOPBACK = "127.0.0.1"
PAIR = Pair(Row("potato"), Row("woody"))
CLOSING = {"server": "2.2", "client": "2.4", "untraced": 4, "waiting": 4}


def one_try(**other: object) -> dict[str, Any]:
    good = {"clients": 8, "stuck": 8, "greeted": 8, "equal": 8, "rescued": 8}
    return {"family": 4, "options": "all", "negotiated": "SACK", **good, **other}


def all_tries() -> list[dict[str, Any]]:
    return [one_try(family=family, options=name) for name in OPTION_SETS for family in FAMILIES]


def said(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


class TestPairs:
    def test_every_row_plays_both_parts_once_and_never_against_itself(self) -> None:
        pairs = pair.ring(ROWS)
        assert [one.server for one in pairs] == list(ROWS)
        assert {one.client for one in pairs} == set(ROWS)
        assert all(one.server != one.client for one in pairs)

    @pytest.mark.parametrize("words", [[], ["--server", "sid"], ["--all", "--client", "sid"]])
    def test_a_senseless_choice_is_no_error_of_the_guests(self, words: list[str]) -> None:
        parser = argparse.ArgumentParser()
        pair.add_parser(parser.add_subparsers())
        arguments = parser.parse_args(["pair", *words])
        with pytest.raises(LabError, match="no pairs selected"):
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


class KnowingOnly:
    """Stands in for the server's namespace: `ss` shows one connection."""

    def __init__(self, client: socket.socket) -> None:
        ours, theirs = client.getpeername(), client.getsockname()
        self._row = SocketRow(0, 0, *ours, *theirs)

    def sockets(self, *_asked: str) -> list[SocketRow]:
        return [self._row]


class TestEnds:
    @pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
    def test_a_client_is_greeted_and_hears_what_it_said(self, address: str) -> None:
        with echoing(0) as port, socket.create_connection((address, port)) as client:
            assert is_greeted(client, Deadline(30))
            assert negotiated(client) == "timestamps SACK scaling"
            assert echoes(client)

    def test_silence_and_other_words_are_no_greeting_and_no_echo(self) -> None:
        ours, theirs = socket.socketpair()
        with ours:
            assert not is_greeted(ours, Deadline(0.01))
            theirs.sendall(b"x" * len(GREETING))
            assert not is_greeted(ours, Deadline(30))
            theirs.close()
            assert not is_greeted(ours, Deadline(30))
            assert not echoes(ours)

    def test_only_silent_clients_that_the_server_does_not_know_are_stuck(self) -> None:
        """As the server's end tells it, by way of the wire."""
        with socket.create_server((LOOPBACK, 0)) as listener, control_server(0) as control:
            clients = [socket.create_connection(listener.getsockname()) for _ in range(4)]
            served = [listener.accept()[0] for _ in clients]
            known, _greeted, _left, stuck = clients
            served[1].sendall(GREETING)
            served[2].close()
            place = KnowingOnly(known)
            end = Server(cast(OwnNamespace, place), cast(Tracer, None))
            with ThreadPoolExecutor(1) as thread:
                answering = thread.submit(end.serve, control)
                server = server_at(*control.server_address)
                # What was sent has come: the loopback hands over at once.
                assert stuck_of(server, clients) == [stuck]
                server.end()
                answering.result(30)
            for one in (*clients, *served):
                one.close()

    def test_the_module_runs_in_either_part(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "lab.guests.pair_end", "neither"], capture_output=True, text=True
        )
        assert "KeyError: 'neither'" in done.stderr
