"""Steps of a run on the client's side, written by hand, and a recording of them."""

from __future__ import annotations

from pathlib import Path

from tcpstuck_bpf.client.actions import Action, Attempt, Outcome, Plan, Totals
from tcpstuck_bpf.client.recording import ClientRecorder
from tcpstuck_bpf.client.steps import (
    Attempted,
    ClientHeader,
    ClientStep,
    Owned,
    Polled,
    WatchEnded,
)
from tcpstuck_bpf.model import SECOND_NS
from tests.unit.client.world import BEGIN_NS, OTHER_NETNS, client_socket, header, owned, poll


def at(number: float) -> int:
    """The time so many seconds after the begin of the run."""
    return BEGIN_NS + round(number * SECOND_NS)


ASKED = client_socket(1, 124)
CHALLENGED = client_socket(2, 14)
TOTALS = Totals(
    dry_run=False,
    done={(Action.CHALLENGE, Outcome.SENT): 1, (Action.QUESTION, Outcome.FORGOT): 1},
    challenged=1,
    asked=1,
    reasons={"no such reason": 2},
    left_alone={"its turn has not come": 3},
)
END = WatchEnded(at(9), ("a note",), 12_000_000, SECOND_NS // 2, TOTALS)
STEPS: tuple[ClientStep, ...] = (
    Polled(
        poll(
            0,
            client_socket(1, 120),
            client_socket(2, 10),
            client_socket(4, 200, uid=33, inode=0),
            client_socket(3, 1, netns=OTHER_NETNS, port=25, server="fd09::1", client="fd09::2"),
            established=7,
        )._replace(subflows=1)
    ),
    Owned({7_001: owned(), 7_002: owned("php-fpm", 7, 3, "web")}),
    Polled(
        poll(
            4,
            client_socket(1, 124),
            client_socket(2, 14),
            client_socket(3, 5, netns=OTHER_NETNS, port=25, server="fd09::1", client="fd09::2"),
            established=8,
        ),
        beyond=2,
    ),
    Owned({7_003: owned("postfix", 9)}),
    Attempted(
        at(4.5),
        (
            Attempt(Plan(Action.CHALLENGE, CHALLENGED, owned()), at(4.1), Outcome.SENT, ""),
            Attempt(Plan(Action.QUESTION, ASKED, owned()), at(4.2), Outcome.FORGOT, "an RST came"),
        ),
    ),
    Polled(
        poll(5, client_socket(2, 0.25, bytes_received=77), established=7)._replace(
            failures={OTHER_NETNS: "Permission denied"},
            namespaces=frozenset({client_socket().four_tuple.netns}),
        ),
    ),
    Polled(poll(6, established=6), beyond=0),
    END,
)
"""One is asked about and forgotten, one rescued, one closed unseen, one waits to the end."""


def recorded(
    path: Path, steps: tuple[ClientStep, ...] = STEPS, start: ClientHeader | None = None
) -> Path:
    """A recording of these steps."""
    recorder = ClientRecorder(str(path), header() if start is None else start)
    for step in steps:
        recorder.write(step)
    recorder.close()
    assert recorder.failure is None
    return path
