"""The referee: the kernel's own counters beside what was traced, per namespace.

Pure. What the filters left out was counted too (COUNT_*_OUTSIDE), so that the sum can be compared
exactly with a kernel that knows no filters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tcpstuck_bpf.model import Coverage, NetnsCount, NetnsCounts, Tally
from tcpstuck_bpf.report import Reconciled

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


def count_difference(start: NetnsCounts, end: NetnsCounts) -> dict[int, dict[NetnsCount, int]]:
    """What was counted between two readings, by namespace."""
    none: Mapping[NetnsCount, int] = {}
    return {
        netns: {
            which: value - start.get(netns, none).get(which, 0) for which, value in counts.items()
        }
        for netns, counts in end.items()
    }


def _kernel_interval(
    start: Tally, end: Tally, netns: int, counter: str
) -> tuple[tuple[int, int] | None, str]:
    """Lowest and highest increase that the readings around the traced period allow.

    A namespace that was not there at the start began at zero. Where the increase would be
    negative, the inode number was used again for another namespace.
    """
    if netns not in end.kernel_before or netns not in end.kernel_after:
        return None, "this namespace's counters could not be read at the end"
    if counter not in end.kernel_after[netns]:
        return None, "this kernel has no such counter"
    known_before = netns in start.kernel_before
    first = start.kernel_before[netns].get(counter, 0) if known_before else 0
    later = start.kernel_after.get(netns, {}).get(counter, first)
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
    traced_by_netns = count_difference(start.traced, end.traced)
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
    return tuple(rows)


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
    return f"{did_not_run} on that CPU: what it cost cannot be told from the counters"
