"""docs/schema and docs/json.md against the lines of --client, whatever names strangers have."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.client.actions import Action, Attempt, Outcome, Plan, Totals
from tcpstuck_bpf.client.export import attempt_line, summary_line, verdict_line
from tcpstuck_bpf.client.facts import Owner, Owners
from tcpstuck_bpf.client.printing import VERDICTS
from tcpstuck_bpf.client.waits import Change, Waits
from tcpstuck_bpf.model import SECOND_NS
from tests.property.test_foreign_text import names
from tests.property.test_schema import DOCS, VALIDATOR, assert_valid, keys_of
from tests.replay.test_json_keys import sections
from tests.unit.client.test_rows import summary_of
from tests.unit.client.world import BEGIN_NS, CLOCK, client_socket, poll

Line = dict[str, Any]
COUNTS = st.integers(0, 1 << 40)


def lines_for(name: str, count: int) -> list[Line]:
    """A line of every kind, with all that may be in it."""
    owners = Owners((Owner(name, 7, 3, name), Owner(name, 8, 3, "")), count, False)
    sockets = [
        client_socket(1, 60, keepalive_ns=count, last_ack_ns=count),
        client_socket(2, 60, server="fd09::1", inode=0),
    ]
    waits = Waits(3 * SECOND_NS)
    changes = waits.take(poll(0, *sockets))
    changes = [one._replace(owners=owners) for one in changes if one.socket.inode] + changes
    waits.note_owners({sockets[0].inode: owners})
    for verdict in VERDICTS:
        after = client_socket(1, bytes_received=count, data_segs_out=count)
        changed = Change(verdict, after, BEGIN_NS + count, count, owners, "greeting-missing")
        changes += [changed, changed._replace(was="server-slow", challenged_ns=BEGIN_NS)]
    attempts = [
        Attempt(Plan(action, sockets[0], owners, 1 + count), BEGIN_NS + count, outcome, reason)
        for action in Action
        for outcome in Outcome
        for reason in ("", name)
    ]
    summary = summary_of(
        waits,
        watched=name,
        notes=(name,),
        unread={5: name},
        losses={"untracked": count},
        longest_poll_ns=count,
        slow=count,
        mending=Totals(
            True,
            {(one.plan.action, one.outcome): 1 + count for one in attempts},
            count,
            count,
            {name: 1 + count},
            {name: 1 + count},
        ),
    )
    lines = [attempt_line(one, CLOCK) for one in attempts]
    found = [verdict_line(one, CLOCK) for one in changes]
    return [json.loads(line) for line in (*found, *lines, summary_line(summary, CLOCK))]


@given(names, COUNTS)
def test_every_line_is_valid(name: str, count: int) -> None:
    for line in lines_for(name, count):
        assert line["side"] == "client"
        assert_valid(line)


def test_a_key_more_or_less_is_not_valid() -> None:
    for line in lines_for("name", 3):
        assert not VALIDATOR.is_valid({**line, "surplus": 1})
        for key in line:
            less = copy.deepcopy(line)
            del less[key]
            assert not VALIDATOR.is_valid(less), key


@pytest.mark.parametrize(
    ("heading", "definition"),
    [
        ("verdict (with --client)", "client_verdict"),
        ("owners (with --client)", "client_owner"),
        ("rescue (with --client)", "client_rescue"),
        ("rescue in the summary (with --client)", "client_rescue_totals"),
        ("summary (with --client)", "client_summary"),
        ("stuck_groups (with --client)", "client_group"),
    ],
)
def test_docs_and_schema_list_the_same_keys(heading: str, definition: str) -> None:
    documented = dict(sections((DOCS / "json.md").read_text("utf-8")))
    assert keys_of(definition) == documented[heading]
