"""Converts the header and each step of the client's side to a line of a recording, and back. Pure.

The decoders (`*_of`) raise KeyError, TypeError, ValueError, AttributeError or OverflowError for
damaged values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tcpstuck_bpf.client.actions import Action, Attempt, Outcome, Plan, Totals
from tcpstuck_bpf.client.facts import Owner, Owners
from tcpstuck_bpf.client.recorded_sockets import RecordedSockets, socket_of, socket_values
from tcpstuck_bpf.client.steps import (
    Attempted,
    ClientHeader,
    ClientStep,
    Owned,
    Polled,
    WatchEnded,
)
from tcpstuck_bpf.model import TraceFilter
from tcpstuck_bpf.recording.lines import CLIENT, Values
from tcpstuck_bpf.recording.table import address_of, integer
from tcpstuck_bpf.steps import WallClock

_HIGHEST_PORT = 65_535


def header_values(header: ClientHeader) -> Values:
    """Encode the header."""
    wanted = header.wanted
    address = wanted.listener_address
    return {
        "side": CLIENT,
        "ports": list(wanted.ports),
        "family": wanted.family,
        "server_address": None if address is None else address.hex(),
        "netns": wanted.netns,
        "pid": header.pid,
        "timeout_ns": header.timeout_ns,
        "clock": asdict(header.clock),
        "watched": header.watched,
        "own_netns": header.own_netns,
        "netns_names": {str(inode): name for inode, name in header.netns_names.items()},
    }


def header_of(values: Values) -> ClientHeader:
    """Decode the header."""
    address, clock, family = values["server_address"], values["clock"], values["family"]
    if family not in (None, 4, 6):
        raise ValueError(f"{family!r} is no family")
    return ClientHeader(
        TraceFilter(
            ports=tuple(map(_port, values["ports"])),
            family=family,
            listener_address=None if address is None else address_of(address),
            netns=_integer_or_none(values["netns"]),
        ),
        integer(values["timeout_ns"]),
        WallClock(integer(clock["monotonic_ns"]), integer(clock["realtime_ns"])),
        str(values["watched"]),
        _integer_or_none(values["pid"]),
        _integer_or_none(values["own_netns"]),
        {integer(int(inode)): str(name) for inode, name in values["netns_names"].items()},
    )


def _port(value: Any) -> int:
    if integer(value) > _HIGHEST_PORT:
        raise ValueError(f"{value} is no port")
    return int(value)


def _integer_or_none(value: Any) -> int | None:
    return None if value is None else integer(value)


def values_of(step: ClientStep, sockets: RecordedSockets) -> Values:
    """Encode a step as a line."""
    if isinstance(step, Polled):
        return sockets.values_of(step)
    if isinstance(step, Owned):
        return {"owners": {str(inode): _owners_values(one) for inode, one in step.owners.items()}}
    if isinstance(step, Attempted):
        return {"attempted": step.now_ns, "attempts": [*map(_attempt_values, step.attempts)]}
    return {
        "end": step.now_ns,
        "notes": list(step.notes),
        "longest_poll_ns": step.longest_poll_ns,
        "pause_ns": step.pause_ns,
        "mending": None if step.mending is None else _totals_values(step.mending),
    }


def step_of(values: Values, sockets: RecordedSockets) -> ClientStep:
    """Decode a line. Raises KeyError also for one of unknown kind."""
    if "poll" in values:
        return sockets.step_of(values)
    if "owners" in values:
        owners = values["owners"].items()
        return Owned({integer(int(inode)): _owners_of(one) for inode, one in owners})
    if "attempted" in values:
        attempts = tuple(map(_attempt_of, values["attempts"]))
        return Attempted(integer(values["attempted"]), attempts)
    mending = values["mending"]
    return WatchEnded(
        integer(values["end"]),
        tuple(map(str, values["notes"])),
        _integer_or_none(values["longest_poll_ns"]),
        _integer_or_none(values["pause_ns"]),
        None if mending is None else _totals_of(mending),
    )


def time_of(step: ClientStep) -> int | None:
    """Latest time that a step shows; None if it shows none."""
    if isinstance(step, Polled):
        return step.poll.time_ns
    return None if isinstance(step, Owned) else step.now_ns


def _owners_values(owners: Owners) -> list[Any]:
    processes = [list(one) for one in owners.processes]
    return [processes, owners.more, owners.hidden, owners.sought]


def _owners_of(values: Any) -> Owners:
    processes, more, hidden, sought = values
    return Owners(tuple(map(_owner_of, processes)), integer(more), bool(hidden), bool(sought))


def _owner_of(values: Any) -> Owner:
    name, pid, fd, container = values
    return Owner(str(name), integer(pid), integer(fd), str(container))


def _attempt_values(attempt: Attempt) -> list[Any]:
    plan = attempt.plan
    return [
        plan.action.value,
        socket_values(plan.socket),
        _owners_values(plan.owners),
        plan.number,
        attempt.time_ns,
        attempt.outcome.value,
        attempt.reason,
    ]


def _attempt_of(values: Any) -> Attempt:
    action, socket, owners, number, time_ns, outcome, reason = values
    plan = Plan(Action(action), socket_of(socket), _owners_of(owners), integer(number))
    return Attempt(plan, integer(time_ns), Outcome(outcome), str(reason))


def _totals_values(totals: Totals) -> Values:
    return {
        "dry_run": totals.dry_run,
        "done": [[action.value, outcome.value, n] for (action, outcome), n in totals.done.items()],
        "challenged": totals.challenged,
        "asked": totals.asked,
        "reasons": dict(totals.reasons),
        "left_alone": dict(totals.left_alone),
    }


def _totals_of(values: Values) -> Totals:
    return Totals(
        bool(values["dry_run"]),
        {(Action(action), Outcome(outcome)): integer(n) for action, outcome, n in values["done"]},
        integer(values["challenged"]),
        integer(values["asked"]),
        _numbers_of(values["reasons"]),
        _numbers_of(values["left_alone"]),
    )


def _numbers_of(values: Mapping[str, Any]) -> dict[str, int]:
    return {str(why): integer(number) for why, number in values.items()}
