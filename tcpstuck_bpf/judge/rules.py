"""Verdicts are data: a table of conditions, and what each verdict means, proves and advises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from tcpstuck_bpf.handshake.flow import FlowReport, State
from tcpstuck_bpf.model import EventKind, Moved

Certainty = Literal["certain", "likely", "possible"]

COOKIE_CHECKS = frozenset({"cookie_v4_check", "cookie_v6_check"})
# ACKs and RSTs that reach a listener go through cookie_vX_check, and dropped repeated SYNs end in
# tcp_conn_request. So silence is known only if both are probed.
_SILENCE_PROBES = COOKIE_CHECKS | {"tcp_conn_request"}

RAISE_BACKLOG = (
    "raise the listener's backlog (MySQL: back_log) and net.core.somaxconn, then restart the "
    "server: both take effect when it calls listen()"
)


class Rule(NamedTuple):
    """One verdict. `meaning` is for the table: at most 60 characters."""

    name: str
    stuck: bool
    """Whether the client thinks it is connected and the server has no record of it."""
    certainty: Certainty
    condition: Callable[[FlowReport], bool]
    meaning: str
    proves: str
    cannot_prove: str
    advice: str
    needs: frozenset[str] = frozenset()
    """Probes (kernel functions) without which the absence of a packet is not known."""


def _accept_queue_was_full(report: FlowReport) -> bool:
    """Whether the accept queue was full, by the kernel's counters, else by the queue's length.

    The queue is full if it has more entries than the limit (sk_acceptq_is_full() of
    include/net/sock.h).
    """
    entry = report.handshake
    if not entry.drop_counters & Moved.UNKNOWN:
        return bool(entry.drop_counters & Moved.LISTEN_OVERFLOWS)
    drops = [segment for segment in report.segments if segment.kind == EventKind.ACK_DROPPED]
    if not drops:
        return entry.accept_queue > entry.accept_queue_limit
    return any(drop.accept_queue > drop.accept_queue_limit for drop in drops)


def _is(state: State) -> Callable[[FlowReport], bool]:
    return lambda report: report.state is state


def _dropped(*, by_full_queue: bool) -> Callable[[FlowReport], bool]:
    return lambda report: (
        report.state is State.ACK_DROPPED and _accept_queue_was_full(report) == by_full_queue
    )


RULES: tuple[Rule, ...] = (
    Rule(
        name="completed",
        stuck=False,
        certainty="certain",
        condition=_is(State.COMPLETED),
        meaning="connected",
        proves="the cookie was valid, and the kernel made the server's socket (cookie_vX_check)",
        cannot_prove="whether the server has accepted it, or will answer",
        advice="nothing to do",
    ),
    Rule(
        name="recovered",
        stuck=False,
        certainty="certain",
        condition=_is(State.RECOVERED),
        meaning="was stuck; its own packet connected it",
        proves="the server knows the connection now",
        cannot_prove="whether the client's application still waits for it",
        advice="nothing to do for this connection; its earlier verdict names the cause",
    ),
    Rule(
        name="rescued",
        stuck=False,
        certainty="certain",
        condition=_is(State.RESCUED),
        meaning="was stuck; our repeated SYN-ACK connected it",
        proves="the server knows the connection now, by the bare ACK that came after our SYN-ACK",
        cannot_prove="whether the client's application still waits for it",
        advice="nothing to do for this connection; its earlier verdict names the cause",
    ),
    Rule(
        name="ack-missing",
        stuck=True,
        certainty="likely",
        condition=lambda report: report.state in (State.SILENT, State.UNANSWERED),
        meaning="no ACK got here; client likely thinks it is connected",
        proves="no ACK, RST or further SYN of this client reached TCP on this host in time",
        cannot_prove=(
            "that the client is real: a spoofed or dead client looks the same; nor where its ACK "
            "was lost: drops in native XDP, in another network namespace of this host, before a "
            "DNAT, in the network and in the client's own stack are not visible here"
        ),
        advice=(
            "look for what drops ACKs on the way to this host: a firewall that sees one direction "
            "only, native XDP on this host, the client's own outgoing rules. "
            "Many from one unknown source: probably a SYN flood; no action needed"
        ),
        needs=_SILENCE_PROBES,
    ),
    Rule(
        name="ack-filtered",
        stuck=True,
        certainty="certain",
        condition=_is(State.ACK_FILTERED),
        meaning="ACK came to this host, dropped before TCP",
        proves="an ACK of this handshake came to this host and was dropped before TCP",
        cannot_prove="whether the client's application still waits",
        advice="look at what the evidence names, in the kernel's words",
    ),
    Rule(
        name="accept-queue-full",
        stuck=True,
        certainty="certain",
        condition=_dropped(by_full_queue=True),
        meaning="ACK came, dropped: accept queue full",
        proves="a valid ACK arrived and was dropped because the accept queue was full",
        cannot_prove="whether the client's application still waits",
        advice=(
            f"find out why the server does not accept (paused? out of threads?); {RAISE_BACKLOG}. "
            "On clients, a read time-out, or TCP keep-alive with an idle time above 120 s, turns "
            "the hang into an error"
        ),
        needs=COOKIE_CHECKS,
    ),
    Rule(
        name="ack-failed",
        stuck=True,
        certainty="certain",
        condition=_dropped(by_full_queue=False),
        meaning="ACK came, dropped by this host for another reason",
        proves="an ACK arrived and cookie_vX_check dropped it without an answer",
        cannot_prove=(
            "which of memory, route, security module, bind or the client's own request in the SYN "
            "queue refused it"
        ),
        advice=(
            "look at dmesg for denials and memory pressure (net.ipv4.tcp_mem, cgroup limits), and "
            "at the route back to the client"
        ),
        needs=COOKIE_CHECKS,
    ),
    Rule(
        name="cookie-rejected",
        stuck=False,
        certainty="certain",
        condition=_is(State.REJECTED),
        meaning="cookie refused, RST sent: the client gets an error",
        proves="an ACK arrived, and the listener answers it with an RST",
        cannot_prove="that the RST reaches the client",
        advice=(
            "if the ACK is late, look for delay between client and server: a cookie lives 60 to "
            "120 s; if net.ipv4.tcp_syncookies was changed, set it back to 1"
        ),
    ),
    Rule(
        name="no-listener",
        stuck=False,
        certainty="certain",
        condition=_is(State.NO_LISTENER),
        meaning="the listener is gone, RST sent: the client gets an error",
        proves="a segment of the client found no socket, and the kernel answers it with an RST",
        cannot_prove="that the RST reaches the client",
        advice=(
            "the server closed its listening socket between the SYN-ACK and this segment (a "
            "restart?): nothing to do for this client, it gets ECONNRESET and may connect again"
        ),
    ),
    Rule(
        name="namespace-gone",
        stuck=False,
        certainty="likely",
        condition=_is(State.NAMESPACE_GONE),
        meaning="was stuck; its server's network namespace is gone",
        proves=(
            "no process, name or mount leads to that network namespace any more, or another "
            "namespace has its number by now"
        ),
        cannot_prove=(
            "that no open file or socket still holds it (a segment that arrives there revokes this "
            "verdict), nor whether the client has noticed"
        ),
        advice=(
            "no action needed here: the container or namespace of this server was removed. A "
            "client that waits for a greeting goes on waiting; let it connect again"
        ),
    ),
    Rule(
        name="client-reset",
        stuck=False,
        certainty="certain",
        condition=_is(State.RESET),
        meaning="the client's address sent an RST: no connection wanted",
        proves="an RST came from the client's address and port",
        cannot_prove="whether the client closed, or never sent the SYN (spoofed source)",
        advice="a few: nothing to do; many: look for spoofed SYNs or impatient health checks",
    ),
    Rule(
        name="synack-missing",
        stuck=False,
        certainty="certain",
        condition=_is(State.REPEATING),
        meaning="client repeats its SYN: it sees no SYN-ACK, and knows",
        proves="the client repeats its SYN, and none of its ACKs reached TCP on this host",
        cannot_prove="where the SYN-ACKs are lost, nor whether the last of them got through",
        advice=(
            "look at the path back to the client: outgoing iptables/nft rules, route, rp_filter at "
            f"its end. If SYNs were dropped here: {RAISE_BACKLOG}"
        ),
        needs=COOKIE_CHECKS,
    ),
    Rule(
        name="data-lost",
        stuck=False,
        certainty="certain",
        condition=_is(State.DATA_LOST),
        meaning="connected, but the server missed the first bytes",
        proves=(
            "the segment that validated the cookie was not the client's first: the server's "
            "socket starts at the wrong byte of the stream, and neither end gets an error"
        ),
        cannot_prove="what the bytes were; the last of them may have been a FIN and no data",
        advice=(
            "close that connection on the server: the server misses the beginning of the stream, "
            "and neither end gets an error. Then find out what drops the client's first segments: "
            "rules that drop ACKs before TCP, or a full accept queue"
        ),
    ),
)


def _never(_report: FlowReport) -> bool:
    """No handshake that a server saw: `client.waits` gives these verdicts."""
    return False


CLIENT_RULES: tuple[Rule, ...] = (
    Rule(
        name="greeting-missing",
        stuck=True,
        certainty="likely",
        condition=_never,
        meaning="connected, and not a byte either way",
        proves=(
            "this host's kernel has the connection as ESTABLISHED, and neither side has sent a "
            "byte on it for longer than the time-out"
        ),
        cannot_prove=(
            "that the server has no record of the connection: a slow or paused server looks the "
            "same, and so does an idle connection of a protocol in which the client speaks first "
            "(HTTP)"
        ),
        advice=(
            "to end the hang, let the tool mend it or ask the server (--rescue, as root), end the "
            "connection on this host (ss -K), or restart the process: it then connects again. "
            "Whoever can see the server may look there for the connection "
            "(ss): if the server has none, it has forgotten it; if it has, find out why it does "
            "not speak. For the future, give the client a time-out that covers the greeting"
        ),
    ),
    Rule(
        name="client-spoke",
        stuck=False,
        certainty="certain",
        condition=_never,
        meaning="was reported; then the client itself sent data",
        proves="the client's kernel has sent or queued data of the application",
        cannot_prove="whether the server has the connection: if it has not, the client gets an RST",
        advice=(
            "nothing to do for this connection; if its protocol lets the client speak first, leave "
            "that port out"
        ),
    ),
    Rule(
        name="server-forgot",
        stuck=False,
        certainty="certain",
        condition=_never,
        meaning="was stuck; the server had no record: RST, so an error now",
        proves=(
            "an RST came in answer to our question: nobody at the server's address has a record of "
            "the connection, and the application's error is ECONNRESET"
        ),
        cannot_prove=(
            "that the RST is the server's own: a firewall or a load balancer that lost the "
            "connection answers alike; nor why the connection was forgotten"
        ),
        advice=(
            "let the application connect again, which most do by themselves. Run tcpstuck-trace on "
            "the server to find out why it forgets connections, and give the client a read "
            "time-out that covers the greeting"
        ),
    ),
    Rule(
        name="server-slow",
        stuck=False,
        certainty="certain",
        condition=_never,
        meaning="still waits, but the server's kernel has the connection",
        proves=(
            "an ACK of the server's address came in answer to our question: its kernel had the "
            "connection then"
        ),
        cannot_prove=(
            "that the server's program has accepted the connection or will answer; nor, behind a "
            "load balancer or proxy that answers for it, that the server itself has it"
        ),
        advice=(
            "find out why the server does not speak: is it paused, out of threads, or blocked by "
            "a name server that it asks about each client? To bound the wait, give the client a "
            "time-out that covers the greeting"
        ),
    ),
    Rule(
        name="reset",
        stuck=False,
        certainty="certain",
        condition=_never,
        meaning="was silent still; ended here by us: an error now",
        proves=(
            "this host's kernel ended the connection because we asked it to; the application's "
            "error is ECONNABORTED"
        ),
        cannot_prove="whether the server had the connection: it gave no answer, or was not asked",
        advice=(
            "let the application connect again. Find out why the server does not answer: is it "
            "down, or does a firewall drop packets of old connections?"
        ),
    ),
)
"""The verdicts of `--client` alone; `recovered` and `rescued` are on both sides."""
ALL_RULES: tuple[Rule, ...] = (*RULES, *CLIENT_RULES)

VERDICT_NAMES: tuple[str, ...] = tuple(rule.name for rule in ALL_RULES)
"""All verdict names, for options that take one."""


def rule_for(report: FlowReport) -> Rule | None:
    """The rule that matches a flow; None for a state without a verdict (taken over, superseded)."""
    return next((rule for rule in RULES if rule.condition(report)), None)
