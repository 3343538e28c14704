"""Records of the kernel's log, and which handshakes they concern."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.handshake.flow import TimelineEntry
from tcpstuck_bpf.host.kernel_log import (
    RECORDS_AT_ONCE,
    KernelLog,
    open_kernel_log,
    warning_of,
)
from tcpstuck_bpf.judge.kernel_warnings import CONCERNED_NS, WarningHistory
from tcpstuck_bpf.model import EventKind, KernelWarning, ListenerSeen, address_bytes
from tcpstuck_bpf.steps import Advanced, Listened, Logged, Observed, Swept
from tests.builders import ack_dropped, at, event, four_tuple, handshake, header, sweep
from tests.unit.judge.test_listener import facts

NOW_NS = at(10)
SINCE_NS = at(7)
# As printed by 5.10, 6.1 and later kernels.
RECORDS = {
    "Possible SYN flooding on port 3311. Sending cookies.  Check SNMP counters.": None,
    "Possible SYN flooding on port 0.0.0.0:3311. Sending cookies.": "0.0.0.0",
    "Possible SYN flooding on port 192.0.2.1:3311. Dropping request.": "192.0.2.1",
    "Possible SYN flooding on port [::]:3311. Sending cookies.": "::",
    "Possible SYN flooding on port [2001:db8::1]:3311. Sending cookies.": "2001:db8::1",
    "Possible SYN flooding on port [::ffff:10.0.0.1]:3311. Sending cookies.": "10.0.0.1",
}


def record(text: str, stamp_ns: int = NOW_NS) -> bytes:
    return f"6,339,{stamp_ns // 1000},-;TCP: request_sock_TCP: {text}\n".encode()


@pytest.mark.parametrize(("text", "address"), RECORDS.items())
def test_each_kernels_words_are_understood(text: str, address: str | None) -> None:
    assert warning_of(record(text) + b" SUBSYSTEM=net\n", SINCE_NS, NOW_NS) == KernelWarning(
        NOW_NS, 3311, None if address is None else address_bytes(address), text
    )


@pytest.mark.parametrize(
    "other",
    [
        b"",
        b"6,1,2,-;eth0: link is up\n",
        b"6,1,2,-;Possible SYN flooding on port 3311\n",
        b"6,1,x,-;Possible SYN flooding on port 3311. Sending cookies.\n",
        b"6,1,2,-;eth0: up\n NOTE=Possible SYN flooding on port 3311. Sending cookies.\n",
    ],
)
def test_other_records_are_passed_over(other: bytes) -> None:
    assert warning_of(other, SINCE_NS, NOW_NS) is None


def test_an_address_that_is_none_is_not_believed() -> None:
    text = "Possible SYN flooding on port 1.2.3:3311. Sending."
    warning = warning_of(record(text), SINCE_NS, NOW_NS)
    assert warning is not None
    assert (warning.address, warning.port) == (None, 3311)


@pytest.mark.parametrize(
    ("stamp_ns", "time_ns"),
    [
        (SINCE_NS, SINCE_NS),
        (at(8), at(8)),
        (NOW_NS, NOW_NS),
        (SINCE_NS - 1000, SINCE_NS),
        (NOW_NS + 1000, NOW_NS),
    ],
)
def test_a_stamp_is_exact_unless_the_record_cannot_be_of_that_time(
    stamp_ns: int, time_ns: int
) -> None:
    (text, *_) = RECORDS
    warning = warning_of(record(text, stamp_ns), SINCE_NS, NOW_NS)
    assert warning is not None
    assert warning.time_ns == time_ns


def reading(
    monkeypatch: pytest.MonkeyPatch,
    *results: bytes | OSError,
    clock_ns: Callable[[], int] = lambda: NOW_NS,
) -> KernelLog:
    """The log, each of whose reads gives the next of these; then there is nothing more."""
    left = list(results)
    log = KernelLog(clock_ns, os.devnull)

    def read(_descriptor: int, _length: int) -> bytes:
        result = left.pop(0) if left else BlockingIOError()
        if isinstance(result, OSError):
            raise result
        return result

    monkeypatch.setattr("tcpstuck_bpf.host.kernel_log.os.read", read)
    return log


def test_warnings_are_read_once_and_overwritten_records_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = list(RECORDS)[:2]
    overwritten = OSError(errno.EPIPE, "Broken pipe")
    log = reading(monkeypatch, record(texts[0]), overwritten, b"6,1,2,-;up\n", record(texts[1]))
    assert [warning.text for warning in log.warnings()] == texts
    assert log.warnings() == ()
    assert log.overruns == 1


def test_a_record_was_written_between_the_last_look_at_the_logs_end_and_its_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process may not run for seconds, also between two looks at the clock."""
    (text, *_) = RECORDS
    early, late = record(text, at(0) - 1000), record(text, at(1000))
    ends = early, late, BlockingIOError(), early, late
    # The clock reads 0 s when the log is opened, then 1 s before the first read, and so on.
    log = reading(monkeypatch, *ends, clock_ns=map(at, itertools.count()).__next__)
    assert [warning.time_ns for warning in log.warnings()] == [at(0), at(4)]
    # The log's end was seen at 5 s.
    assert [warning.time_ns for warning in log.warnings()] == [at(5), at(9)]


def test_a_log_that_cannot_be_read_any_more_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    log = reading(monkeypatch, OSError(errno.EIO, "Input/output error"))
    assert log.warnings() == ()
    assert log.overruns == 1


def test_a_kernel_that_does_not_stop_talking_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (text, *_) = RECORDS
    log = reading(monkeypatch, *[record(text)] * (RECORDS_AT_ONCE + 1))
    assert len(log.warnings()) == RECORDS_AT_ONCE
    assert len(log.warnings()) == 1


def test_a_log_that_may_not_be_read_is_a_gap(tmp_path: Path) -> None:
    path = str(tmp_path / "kmsg")
    log, (gap,) = open_kernel_log(lambda: NOW_NS, path)
    assert log is None
    assert gap.why == f"{path}: No such file or directory"


def shown(warning: KernelWarning, first_syn_ns: int = at(0)) -> bool:
    """Whether it is in the timeline of client 0, whose verdict came after 3 s."""
    history = WarningHistory()
    history.take((warning,))
    syn = TimelineEntry(first_syn_ns, "SYN", "")
    timeline = history.added_to(
        (syn,), four_tuple().server, first_syn_ns, first_syn_ns + at(3) - at(0)
    )
    assert syn in timeline
    assert list(timeline) == sorted(timeline)
    return [entry.detail for entry in timeline if entry != syn] == [warning.text]


@pytest.mark.parametrize("address", [None, "0.0.0.0", "::", "192.0.2.1"])
def test_a_warning_of_the_listener_is_shown(address: str | None) -> None:
    listening = None if address is None else address_bytes(address)
    warning = KernelWarning(at(0.001), 3311, listening, "Possible SYN flooding")
    assert shown(warning)
    assert not shown(warning._replace(port=3312))


def test_a_warning_of_another_address_is_not_shown() -> None:
    assert not shown(KernelWarning(at(0), 3311, address_bytes("192.0.2.2"), "warning"))
    assert not shown(KernelWarning(at(0), 3311, address_bytes("2001:db8::1"), "warning"))


def test_a_warning_is_shown_from_a_minute_before_the_syn_up_to_the_verdict() -> None:
    warning = KernelWarning(at(0) - CONCERNED_NS, 3311, None, "warning")
    assert shown(warning)
    assert not shown(warning._replace(time_ns=warning.time_ns - 1))
    assert shown(warning._replace(time_ns=at(3)))
    assert not shown(warning._replace(time_ns=at(3) + 1))


def test_a_warning_names_the_port_that_the_listener_has_not_that_of_the_packets() -> None:
    """Under TPROXY they differ; the kernel's line has the socket's (tcp_syn_flood_action)."""
    stuck = ack_dropped(handshake(socket=9016), at(0.002))
    proxy = facts(socket=9016, server_port=3129)
    warning = KernelWarning(at(0.001), 3129, address_bytes("127.0.0.1"), "Possible SYN flooding")
    analysis = Analysis(header())
    seen = ListenerSeen(proxy, (), (), {}, address_bytes("127.0.0.1"))
    analysis.take(Listened((seen,)))
    analysis.take(Logged((warning, warning._replace(port=3311))))
    analysis.take(Observed((event(EventKind.ACK_DROPPED, stuck, at(0.002)),)))
    analysis.take(Swept(sweep(at(4), stuck)))
    (finding,) = analysis.take(Advanced(at(9)))
    assert finding.listener_socket == 9016
    assert [one.what for one in finding.timeline].count("kernel's log") == 1
