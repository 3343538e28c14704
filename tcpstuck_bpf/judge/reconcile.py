"""The referee: compares what was traced with the kernel's own counters, per namespace.

Pure. The programs also count what the filters exclude (COUNT_*_OUTSIDE), because the kernel's
counters cover everything.
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
    """One kernel counter of one namespace and the programs' count of it, in the traced period."""

    netns: int
    counter: str
    """TcpExt name, for example SyncookiesSent."""
    traced: int
    """The programs' count inside the filters."""
    outside: int
    """The programs' count of what the filters exclude."""
    kernel: tuple[int, int] | None
    """Lowest and highest possible increase of the kernel's counter; None if unknown."""
    agrees: bool | None
    """Whether both agree; None if unknown."""
    note: str
    """Why the row is unknown, differs, or is a lower bound; else empty."""


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


_GONE_NOTE = "the kernel's counters of removed namespaces are gone"
_CROWDED_NOTE = "counts of namespaces without an entry of their own: the table was full"


def total_counted(start: NetnsCounts, end: NetnsCounts) -> Counter[NetnsCount]:
    """Counts between two readings, over all network namespaces."""
    counted: Counter[NetnsCount] = Counter()
    for counts in end.values():
        counted.update(counts)
    for counts in start.values():
        counted.subtract(counts)
    return counted


def _is_another(start: Tally, end: Tally, netns: int) -> bool:
    """Whether an inode number has passed to another namespace since the start, if known."""
    before = start.kernel_after.get(netns, {}).get(NETNS_COOKIE, 0)
    now = end.kernel_before.get(netns, {}).get(NETNS_COOKIE, 0)
    return bool(before and now) and before != now


def _traced_between(start: Tally, end: Tally) -> dict[int, Counter[NetnsCount]]:
    """Counts between two readings, by namespace.

    If a namespace has been removed since the first reading, its first counts are subtracted from
    those of GONE_NETNS, which include them at the second.
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

    A namespace that did not exist at the start began at zero. If the cookie is unknown and the
    increase would be negative, another namespace has reused the inode number.
    """
    if netns in (GONE_NETNS, CROWDED_NETNS):
        return None, _GONE_NOTE if netns == GONE_NETNS else _CROWDED_NOTE
    if netns not in end.kernel_before or netns not in end.kernel_after:
        return None, "this namespace's counters could not be read at the end"
    if counter not in end.kernel_after[netns]:
        return None, "this kernel has no such counter"
    cookies = [one[netns].get(NETNS_COOKIE, 0) for one in (end.kernel_before, end.kernel_after)]
    if cookies[0] != cookies[1]:
        return None, "another namespace has this number by now"
    known_before = netns in start.kernel_before and not _is_another(start, end, netns)
    first = start.kernel_before[netns].get(counter, 0) if known_before else 0
    later = start.kernel_after.get(netns, {}).get(counter, first) if known_before else 0
    low = end.kernel_before[netns].get(counter, 0) - later
    high = end.kernel_after[netns][counter] - first
    if low < 0 or high < low:
        return None, "the kernel's counter went backwards: another namespace by now"
    return (low, high), ""


def unseen_acks(start: Tally, end: Tally, coverage: Coverage) -> dict[int, int]:
    """Valid cookie ACKs that the kernel counted and no program saw, at least, by namespace.

    The kernel skips a kprobe program while another one, or a bpf(2) system call, runs on the same
    CPU (trace_call_bpf in kernel/trace/bpf_trace.c). It counts the skips only from 6.7 on, but its
    counter of ACKs shows the difference on every kernel. If a probe is missing, the difference
    means nothing.
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
    """Compare every counter of every namespace in which either side counted anything."""
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
    """Smallest number of events that the kernel counted and the programs did not."""
    if row.agrees is not False or row.kernel is None:
        return 0
    return max(0, row.kernel[0] - row.traced - row.outside)


def _made_up_for(rows: list[Reconciled]) -> Iterator[Reconciled]:
    """The rows, with missing counts explained by counts of namespaces without an entry."""
    spare: Counter[str] = Counter()
    for row in rows:
        spare[row.counter] += row.traced + row.outside if row.netns == CROWDED_NETNS else 0
        spare[row.counter] -= _lacking(row)
    crowded = {row.counter for row in rows if row.netns == CROWDED_NETNS}
    for row in rows:
        if _lacking(row) and row.counter in crowded and spare[row.counter] >= 0:
            note = "this namespace had no entry in the full table: its counts may be in that row"
            yield row._replace(agrees=None, note=note)
        else:
            yield row


def missed_runs_note(number: int, rows: Iterable[Reconciled]) -> str:
    """What it means that the kernel skipped our programs `number` times; empty for 0.

    The kernel counts only cookies, their ACKs and full accept queues. Other facts that a program
    would have seen have no counter: a repeated SYN, an RST, the drop site of an ACK.
    """
    if not number:
        return ""
    times = "once" if number == 1 else f"{number} times"
    skipped = f"the kernel skipped our programs {times}, because another one ran on that CPU"
    bounds = [(row, row.kernel and row.kernel[1] - row.traced - row.outside) for row in rows]
    if any(row.agrees is False and ahead is not None and ahead > 0 for row, ahead in bounds):
        return f"{skipped}: that may be why the kernel counted more than was traced"
    if all(row.agrees and ahead == 0 for row, ahead in bounds):
        return (
            f"{skipped}: no cookie and no ACK was missed, because the kernel's counters agree "
            "exactly; a repeated SYN, an RST or a drop site may be missing"
        )
    return f"{skipped}: the counters do not show what was missed"
