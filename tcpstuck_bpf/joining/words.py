"""What two recordings say together, in words: the answer first, then a row for each connection.

Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tcpstuck_bpf.client.waits import group_of
from tcpstuck_bpf.client.words import group_owners_text, owners_text
from tcpstuck_bpf.joining.match import TOLERATED_NS, Joined
from tcpstuck_bpf.joining.result import Result
from tcpstuck_bpf.joining.sides import ClientConnection, ServerHandshake
from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import SECOND_NS, address_text
from tcpstuck_bpf.output.page import INDENT, Page, counted, endpoint, grouped

SHOWN = 1000
"""Most rows; a line stands for the others."""
NAMED = 3
"""Number of groups that the answer lists."""
NOTHING = "reported nothing"
_WHY = {
    "ack-missing": "no ACK got to the server",
    "ack-filtered": "the server's host dropped the ACK before TCP",
    "accept-queue-full": "accept queue full",
    "ack-failed": "the server's host dropped the ACK",
}


def answer(result: Result) -> str:
    """One sentence on the connections that wait, fit to be sent to a colleague.

    For example: 12 connections of python3 (pid 288) to 10.9.0.1:3306 wait for a greeting; of all 12
    the server has no record: accept queue full.
    """
    waiting = result.waiting
    if not waiting:
        return _nobody_waits(result)
    total = len(waiting)
    groups = Counter(_group(one.client) for one in waiting if one.client is not None)
    named = groups.most_common(NAMED)
    of = f" {named[0][0]}" if len(groups) == 1 else ""
    sentence = f"{counted(total, 'connection')}{of} wait{'s' * (total == 1)} for a greeting"
    if len(groups) > 1:
        sentence += f": {', '.join(f'{grouped(number)} {group}' for group, number in named)}"
        others = total - sum(number for _, number in named)
        sentence += f", {grouped(others)} others" if others else ""
    return sentence + "".join(f"; {one}" for one in _server_says(waiting))


def _group(client: ClientConnection) -> str:
    group = group_of(client.socket, client.owners)
    to = endpoint(address_text(group.server_address), group.server_port)
    return f"of {group_owners_text(group)} to {to}"


def _server_says(waiting: Sequence[Joined]) -> Iterator[str]:
    """What the server's side knows of connections that wait."""
    total = len(waiting)
    known = [one.server for one in waiting if one.server is not None]
    forgotten = [one.finding for one in known if one.stuck]
    others = [one.finding for one in known if not one.stuck]
    silent = total - len(forgotten) - len(others)
    if forgotten:
        reasons = _listed(Counter(map(_why, forgotten)))
        yield f"{_of(len(forgotten), total)} the server has no record: {reasons}"
    if others:
        verdicts = _listed(Counter(one.verdict for one in others))
        yield f"{_of(len(others), total)} the server's side last said: {verdicts}"
    if silent:
        yield f"{_of(silent, total)} the server's side reported nothing"


def _of(number: int, total: int) -> str:
    if total == 1:
        return "of it"
    return f"of {'all ' * (number == total)}{grouped(number)}"


def _listed(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{text} ({grouped(number)})" for text, number in counts.most_common())


def _why(finding: Finding) -> str:
    return finding.cause or _WHY.get(finding.verdict, finding.meaning)


def _nobody_waits(result: Result) -> str:
    stuck = sum(one.server is not None and one.server.stuck for one in result.joined)
    if not result.joined:
        return "neither side reported a connection"
    said = "no connection waits at the client when its recording ends"
    if stuck:
        said += f"; the server's side ends with {counted(stuck, 'stuck client')}"
    return said


def how_they_fit(result: Result) -> Iterator[str]:
    """Sentences on what was joined, and on what keeps the rest apart."""
    yield (
        f"{grouped(result.both)} reported by both sides, {grouped(result.server_only)} by the "
        f"server's alone, {grouped(result.client_only)} by the client's alone"
    )
    overlap_ns = result.overlap_ns
    if overlap_ns >= 0:
        overlap = f"the recordings overlap for {duration_text(overlap_ns)}"
    else:
        first = "server" if result.server.end_ns < result.client.begin_ns else "client"
        overlap = (
            f"the recordings do not overlap: the {first}'s ends {duration_text(-overlap_ns)} "
            "before the other begins, by the clocks of their hosts"
        )
    difference, apart_ns = result.difference, result.apart_ns
    if difference is not None:
        yield overlap
        yield (
            "the connections were established "
            f"{_signed(difference.median)} after their SYN came to the server (median; from "
            f"{_signed(difference.least)} to {_signed(difference.most)}): the way there and back, "
            "and the difference of the hosts' clocks"
        )
    elif result.server_only and result.client_only and apart_ns is None:
        yield (
            "no address and port are in both recordings: a NAT or a proxy between the hosts hides "
            f"the addresses, or the recordings are of different times or ports; {overlap}"
        )
    else:
        yield overlap
    if apart_ns is not None:
        yield (
            "connections with the same addresses and ports are in both recordings, but "
            f"{duration_text(apart_ns)} or more apart, beyond the {TOLERATED_NS // SECOND_NS} s "
            "that are tolerated: they are others, or the hosts' clocks differ by so much"
        )
    if result.flood_suspected:
        yield (
            f"{counted(result.flood_suspected, 'silent client')} of the server that look like a "
            "SYN flood's are left out"
        )


def _signed(nanoseconds: int) -> str:
    return f"{'-' * (nanoseconds < 0)}{duration_text(abs(nanoseconds))}"


def row_lines(one: Joined, page: Page) -> Iterator[str]:
    """The row of a connection: its addresses, then what each side says."""
    who = one.four_tuple
    between = (
        f"{endpoint(who.client_ip, who.client_port)} to {endpoint(who.server_ip, who.server_port)}"
    )
    stuck = one.client is not None and one.client.waits
    yield from (page.red(line, stuck) for line in page.wrapped(between, "! " if stuck else "  "))
    yield from page.wrapped(f"server: {_server_text(one.server)}", INDENT)
    yield from page.wrapped(f"client: {_client_text(one.client)}", INDENT)


def _server_text(server: ServerHandshake | None) -> str:
    if server is None:
        return NOTHING
    finding = server.finding
    certainty = f" ({finding.certainty})" if finding.certainty != "certain" else ""
    return f"{finding.verdict}{certainty}: {finding.meaning}"


def _client_text(client: ClientConnection | None) -> str:
    if client is None:
        return NOTHING
    waited = duration_text(client.waited_ns)
    owners = owners_text(client.owners, client.socket.uid)
    verdict = client.verdict or "too young for a verdict"
    how = "waits for" if client.waits else "waited for"
    return f"{verdict}, {how} {waited}, of {owners}"


def lines(result: Result, page: Page, *, rows: bool) -> Iterator[str]:
    """Everything that is printed: the rows if wanted, then the answer and how the sides fit."""
    if rows:
        for one in result.joined[:SHOWN]:
            yield from row_lines(one, page)
        if len(result.joined) > SHOWN:
            more = grouped(len(result.joined) - SHOWN)
            yield f"... and {more} more connections (all of them in --json)"
        if result.joined:
            yield ""
    for line in page.wrapped(answer(result), ""):
        yield page.red(line, bool(result.waiting))
    for sentence in how_they_fit(result):
        yield from page.wrapped(sentence, "")
    for note in result.notes:
        yield from page.wrapped(f"note: {note}", "")
