"""The referee: the kernel's own counters beside what was traced, per namespace.

Pure. What the filters left out was counted too (COUNT_*_OUTSIDE), so that the sum can be compared
exactly with a kernel that knows no filters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from tcpstuck_bpf.model import (
    CROWDED_NETNS,
    GONE_NETNS,
    NETNS_COOKIE,
    Coverage,
    NetnsCount,
    NetnsCounts,
    Tally,
)


class Reconciled(NamedTuple):
    """One kernel counter of one namespace beside what was traced of it, in the traced period."""

    netns: int
    counter: str
    """TcpExt name, for example SyncookiesSent."""
    traced: int
    """Inside the filters."""
    outside: int
    """Seen by the probes, left out by the filters."""
    kernel: tuple[int, int] | None
    """Lowest and highest figure the kernel's counter allows; None where it is unknown."""
    agrees: bool | None
    """None where it cannot be told."""
    note: str
    """Why it is unknown, differs, or is a lower bound; empty where there is nothing to say."""


_PAIRS: tuple[tuple[str, NetnsCount, NetnsCount, tuple[str, ...]], ...] = (
    (
        "SyncookiesSent",
        NetnsCount.COOKIES_SENT,
        NetnsCount.COOKIES_SENT_OUTSIDE,
        ("cookie_v4_init_sequence", "cookie_v6_init_sequence"),
    ),
    (
        "SyncookiesRecv",
        NetnsCount.COOKIES_RECEIVED,
        NetnsCount.COOKIES_RECEIVED_OUTSIDE,
        ("cookie_v4_check", "cookie_v6_check", "kernel counters"),
    ),
    (
        "SyncookiesFailed",
        NetnsCount.COOKIES_FAILED,
        NetnsCount.COOKIES_FAILED_OUTSIDE,
        ("cookie_v4_check", "cookie_v6_check", "kernel counters"),
    ),
    (
        "ListenOverflows",
        NetnsCount.LISTEN_OVERFLOWS,
        NetnsCount.LISTEN_OVERFLOWS_OUTSIDE,
        ("tcp_check_req", "cookie_v4_check", "cookie_v6_check", "kernel counters"),
    ),
)


_GONE_NOTE = "the kernel's counters of namespaces that are gone went with them"
_CROWDED_NOTE = "counted in namespaces that had no place of their own: there was no room"


def total_counted(start: NetnsCounts, end: NetnsCounts) -> Counter[NetnsCount]:
    """What was counted between two readings in all network namespaces together."""
    counted: Counter[NetnsCount] = Counter()
    for counts in end.values():
        counted.update(counts)
    for counts in start.values():
        counted.subtract(counts)
    return counted


def _is_another(start: Tally, end: Tally, netns: int) -> bool:
    """Whether an inode number is known to be another namespace's than it was at the start."""
    before = start.kernel_after.get(netns, {}).get(NETNS_COOKIE, 0)
    now = end.kernel_before.get(netns, {}).get(NETNS_COOKIE, 0)
    return bool(before and now) and before != now


def _traced_between(start: Tally, end: Tally) -> dict[int, Counter[NetnsCount]]:
    """What was counted between two readings, by namespace.

    What was counted before the first one in a namespace that has gone since is among the figures of
    those that are gone at the second.
    """
    found = {netns: Counter(counts) for netns, counts in end.traced.items()}
    for netns, counts in start.traced.items():
        is_gone = netns not in found or _is_another(start, end, netns)
        place = GONE_NETNS if is_gone else netns
        if place in found:
            found[place].subtract(counts)
    return found


def _kernel_interval(
    start: Tally, end: Tally, netns: int, counter: str
) -> tuple[tuple[int, int] | None, str]:
    """Lowest and highest increase that the readings around the traced period allow.

    A namespace that was not there at the start began at zero. Where its cookie is not known and the
    increase would be negative, the inode number was used again for another namespace.
    """
    if netns in (GONE_NETNS, CROWDED_NETNS):
        return None, _GONE_NOTE if netns == GONE_NETNS else _CROWDED_NOTE
    if netns not in end.kernel_before or netns not in end.kernel_after:
        return None, "this namespace's counters could not be read at the end"
    if counter not in end.kernel_after[netns]:
        return None, "this kernel has no such counter"
    cookies = [one[netns].get(NETNS_COOKIE, 0) for one in (end.kernel_before, end.kernel_after)]
    if cookies[0] != cookies[1]:
        return None, "another namespace has its number by now"
    known_before = netns in start.kernel_before and not _is_another(start, end, netns)
    first = start.kernel_before[netns].get(counter, 0) if known_before else 0
    later = start.kernel_after.get(netns, {}).get(counter, first) if known_before else 0
    low = end.kernel_before[netns].get(counter, 0) - later
    high = end.kernel_after[netns][counter] - first
    if low < 0 or high < low:
        return None, "the kernel's counter went backwards: another namespace by now"
    return (low, high), ""


def unseen_acks(start: Tally, end: Tally, coverage: Coverage) -> dict[int, int]:
    """By namespace: valid ACKs of cookies that the kernel counted and no program saw, at the least.

    The kernel runs no kprobe program on a CPU where another one, or a system call of bpf(2), is at
    work (trace_call_bpf in kernel/trace/bpf_trace.c), and counts that from 6.7 on only; its own
    counter of the ACKs shows it everywhere. Where a probe is missing the difference says nothing.
    """
    return {
        row.netns: row.kernel[0] - row.traced - row.outside
        for row in reconcile(start, end, coverage)
        if row.counter == "SyncookiesRecv"
        and row.agrees is False
        and row.kernel is not None
        and row.traced + row.outside < row.kernel[0]
    }


def reconcile(start: Tally, end: Tally, coverage: Coverage) -> tuple[Reconciled, ...]:
    """Every counter of every namespace in which either side saw anything."""
    rows = []
    missing = {gap.probe for gap in coverage.gaps}
    traced_by_netns = _traced_between(start, end)
    none: Mapping[NetnsCount, int] = {}
    for netns in sorted({*traced_by_netns, *end.kernel_after, *end.kernel_before}):
        traced_counts = traced_by_netns.get(netns, none)
        for counter, inside, outside, probes in _PAIRS:
            traced, beside = traced_counts.get(inside, 0), traced_counts.get(outside, 0)
            kernel, note = _kernel_interval(start, end, netns, counter)
            if not traced and not beside and (kernel is None or kernel[1] == 0):
                continue
            agrees = None if kernel is None else kernel[0] <= traced + beside <= kernel[1]
            gaps = [probe for probe in probes if probe in missing]
            if gaps:
                note = f"traced is a lower bound without {', '.join(gaps)}"
                agrees = agrees or None
            elif kernel is not None and not agrees:
                bound = kernel[0] if traced + beside < kernel[0] else kernel[1]
                note = f"differs by {traced + beside - bound:+d}"
            rows.append(Reconciled(netns, counter, traced, beside, kernel, agrees, note))
    return tuple(_made_up_for(rows))


def _lacking(row: Reconciled) -> int:
    """By how much less was traced than the kernel counted, at the least."""
    if row.agrees is not False or row.kernel is None:
        return 0
    return max(0, row.kernel[0] - row.traced - row.outside)


def _made_up_for(rows: list[Reconciled]) -> Iterator[Reconciled]:
    """The rows, where what namespaces lack may be what was counted for no namespace of its own."""
    spare: Counter[str] = Counter()
    for row in rows:
        spare[row.counter] += row.traced + row.outside if row.netns == CROWDED_NETNS else 0
        spare[row.counter] -= _lacking(row)
    crowded = {row.counter for row in rows if row.netns == CROWDED_NETNS}
    for row in rows:
        if _lacking(row) and row.counter in crowded and spare[row.counter] >= 0:
            note = "this namespace had no place of its own: its part may be counted elsewhere"
            yield row._replace(agrees=None, note=note)
        else:
            yield row


def missed_runs_note(number: int, rows: Iterable[Reconciled]) -> str:
    """What it means that the kernel skipped a program so many times; empty where it never did.

    Its own counters tell of cookies, their ACKs and full accept queues only. What else the program
    would have seen has no counter: a repeated SYN, an RST, the place where an ACK was dropped.
    """
    if not number:
        return ""
    times = "once" if number == 1 else f"{number} times"
    did_not_run = f"{times} the kernel did not run a program of ours, another one being at work"
    bounds = [(row, row.kernel and row.kernel[1] - row.traced - row.outside) for row in rows]
    if any(row.agrees is False and ahead is not None and ahead > 0 for row, ahead in bounds):
        return f"{did_not_run} on that CPU: that may be why the kernel counted more than was traced"
    if all(row.agrees and ahead == 0 for row, ahead in bounds):
        return (
            f"{did_not_run} on that CPU: it cost no cookie and no ACK, the kernel's counters agree "
            "exactly; a repeated SYN, an RST or the place of a drop may be missing"
        )
    return f"{did_not_run} on that CPU: the counters do not show what it cost"
