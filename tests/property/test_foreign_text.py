"""Whatever strangers call themselves: no control character but ours, no exception, valid JSON."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.doctor import render
from tcpstuck_bpf.doctor.machine_report import Check, MachineReport, Trial
from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.handshake.timeline import TimelineEntry
from tcpstuck_bpf.json_text import json_text
from tcpstuck_bpf.judge.reconcile import Reconciled
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.kernel.kernel_report import Change, FunctionFact, KernelReport
from tcpstuck_bpf.kernel.probes import PROBES
from tcpstuck_bpf.model import Attempt, CoverageGap
from tcpstuck_bpf.output.render import TableRenderer
from tcpstuck_bpf.output.writers import JsonOutput, Selection, TableOutput
from tcpstuck_bpf.recording.replay import Recorder, Replay
from tcpstuck_bpf.steps import Ended, TallyTaken
from tcpstuck_bpf.summary import RescueTotals, Status, Summary
from tcpstuck_bpf.terminal import CLEAR_LINE, line, never_fail, printable
from tests.builders import at, four_tuple, handshake, header, identity, tally
from tests.unit.judge.test_listener import judged, overflown
from tests.unit.output.test_render import CLOCK, finding

ENCODINGS = ("ascii", "latin-1", "utf-8")
HOSTILE = (
    "\x1b[2J\x1b]0;root\x07",
    "\x9b2J",
    "\u202etxt.exe\u202c",
    "a\u2028b\u2029c\u0085d\x0be\x1cf\r\ng",
    "\x7f\x00\u200b\ufeff\u2066",
    "\udcff\udc9b",
    "\ud800",
    "caf\xe9 \u20ac \U0001f600",
    "\x1b[0m\x1b[31;1m",
)
OWN = re.compile(r"\r\x1b\[K|\x1b\[(?:31;1|1|0)m|\n")

# As they come in: file names and arguments, other bytes, and what is read back from a recording.
names = st.one_of(
    st.binary(min_size=1, max_size=40).map(os.fsdecode),
    st.binary(min_size=1, max_size=16).map(lambda name: name.decode("utf-8", "backslashreplace")),
    st.text(st.characters(exclude_categories=()), min_size=1, max_size=40),
    st.sampled_from(HOSTILE),
)


def foreign_finding(name: str) -> Finding:
    """A verdict in which every word that is not ours is that one."""
    entry = TimelineEntry(at(1), name, name)
    return finding(four_tuple())._replace(timeline=(entry,), evidence=(name,), meaning=name)


def foreign_summary(name: str) -> Summary:
    """A summary of such words."""
    analysis = Analysis(header())
    analysis.take(TallyTaken(tally(at(0))))
    listener = judged(overflown(syns_refused=3), silent=20, owner=f"{name} (pid 7)")
    return analysis.summary(Ended(at(9), {name: 3}, (name,)))._replace(
        watched=name,
        mode=name,
        gaps=(CoverageGap(name, name, name),),
        reconciliation=(Reconciled(7, name, 1, 0, (1, 1), False, name),),
        filtered=True,
        rescue=RescueTotals(1, 0, {name: 1}, 1, {name: 2}),
        listeners=(listener._replace(netns=7, advice=(name,)),),
    )


def told(output: TableOutput | JsonOutput, name: str) -> None:
    """Everything that an output can be given."""
    output.status(Status(name, 1, 1, 1, 1, 1, 1))
    output.findings([foreign_finding(name)])
    output.attempts([Attempt(identity(handshake()), at(1), 1, f"failed: {name}")])
    output.status(Status(name, 1, 1, 1, 1, 1, 1))
    output.summary(foreign_summary(name))


def stream_of(encoding: str, *, terminal: bool = False) -> io.TextIOWrapper:
    class Raw(io.BytesIO):
        def isatty(self) -> bool:
            return terminal

    # Strict, as Python opens standard output outside the C locale.
    stream = io.TextIOWrapper(Raw(), encoding=encoding, errors="strict", newline="\n")
    never_fail(stream)
    return stream


def content(stream: io.TextIOWrapper) -> bytes:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue()


def assert_harmless(shown: str) -> None:
    for part in OWN.split(shown):
        assert part.isprintable(), ascii(part)


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(name=names, width=st.integers(40, 200), narrow_names=st.booleans(), verbose=st.booleans())
def test_the_table_has_no_control_character_but_ours(
    encoding: str, name: str, width: int, narrow_names: bool, verbose: bool
) -> None:
    stream = stream_of(encoding, terminal=True)
    who = four_tuple().netns
    renderer = TableRenderer(
        clock=CLOCK,
        width=width,
        colour=True,
        verbose=verbose,
        own_netns=1,
        netns_names={7: name} if narrow_names else {7: name, who: name},
    )
    with mock.patch.dict(os.environ, TERM="xterm"):
        told(TableOutput(stream, renderer, Selection([], nothing=False)), name)
    shown = content(stream).decode(encoding)
    assert_harmless(shown)
    assert shown.count(CLEAR_LINE) >= 3
    assert "1 more" not in shown


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(name=names)
def test_json_is_utf8_and_holds_no_character_that_is_none(encoding: str, name: str) -> None:
    stream = stream_of(encoding)
    told(JsonOutput(stream, CLOCK, Selection([], nothing=False)), name)
    assert_harmless(content(stream).decode("utf-8"))
    lines = content(stream).decode("utf-8").splitlines()
    found = [json.loads(one) for one in lines]
    assert [one["type"] for one in found] == ["verdict", "rescue", "listener", "summary"]
    # Raises where a surrogate is left.
    json.dumps(found, ensure_ascii=False).encode("utf-8")
    if not any(0xD800 <= ord(one) < 0xE000 for one in name):
        assert found[-1]["watched"] == name


@given(name=names)
def test_a_recording_is_utf8_and_replays_whatever_the_names(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    path = tmp_path_factory.mktemp("names") / "run"
    start = replace(header(netns_names={7: name}), watched=name)
    recorder = Recorder(str(path), start)
    recorder.write(TallyTaken(tally(at(0))))
    recorder.write(Ended(at(9), {}, (name,)))
    recorder.close()
    assert recorder.failure is None
    for one in path.read_bytes().splitlines():
        json.dumps(json.loads(one.decode("utf-8")), ensure_ascii=False).encode("utf-8")
    again = Replay(str(path))
    assert printable(again.header.watched) == printable(name)
    assert len(list(again.steps())) == 2


def foreign_reports(name: str) -> tuple[MachineReport, KernelReport]:
    """What the doctor may find, in words that are not ours."""
    fact = FunctionFact(PROBES[0], None, name)
    kernel = KernelReport(name, name, (fact,), (), {name: 1}, {name: 1}, (), name)
    checks = (Check(name, "NO", name, name, name),)
    trials = {"fentry": Trial(frozenset(), (), name)}
    return MachineReport(kernel, checks, trials, True, {7: {}}, {7: name}), kernel


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(name=names, width=st.integers(40, 200))
def test_the_doctor_and_errors_have_no_control_character(
    encoding: str, name: str, width: int
) -> None:
    machine, kernel = foreign_reports(name)
    lines = [
        *render.machine_lines(machine, width, True),
        *render.kernel_lines(kernel, width, True),
        *render.change_lines(kernel, kernel, [Change(name, name, name)], width),
        *UsageError(name, name, name).lines(),
    ]
    assert all(one.isprintable() for one in lines)
    stream = stream_of(encoding)
    stream.writelines(map(line, lines))
    shown = content(stream).decode(encoding)
    assert_harmless(shown)
    assert shown.count("\n") == len(lines)
    for one in (
        *render.machine_json(machine),
        *render.kernel_json(kernel),
        *render.change_json(kernel, kernel, [Change(name, name, name)]),
    ):
        json.dumps(json.loads(one), ensure_ascii=False).encode("utf-8")
        assert one.isascii()
        # The door changes nothing of it: an escape that is not JSON's would break it.
        assert line(one) == f"{one}\n"


@given(name=names)
def test_what_is_escaped_is_one_line_and_is_not_escaped_twice(name: str) -> None:
    shown = printable(name)
    assert shown.isprintable()
    assert printable(shown) == shown
    assert len(line(name).splitlines()) == 1


@given(st.binary(max_size=40))
def test_bytes_that_are_no_utf8_look_the_same_however_they_came(name: bytes) -> None:
    assert printable(os.fsdecode(name)) == printable(name.decode("utf-8", "backslashreplace"))


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), names),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=8,
)


@given(st.dictionaries(names, values, max_size=3))
def test_json_text_changes_nothing_but_lone_surrogates(whole: dict[str, Any]) -> None:
    plain = json.dumps(whole, ensure_ascii=False)
    again = json.loads(json_text(whole))
    if not any(0xD800 <= ord(one) < 0xE000 for one in plain):
        assert again == whole
    json.dumps(again, ensure_ascii=False).encode("utf-8")


def test_what_strangers_wrote_is_told_as_it_is_meant() -> None:
    assert printable("\x1b[2J\x9b\x7f\n") == "\\x1b[2J\\x9b\\x7f\\x0a"
    assert printable("\u202e\u2028\udcff\ud800") == "\\u202e\\u2028\\xff\\ud800"
    assert printable("\U000e0041") == "\\U000e0041"
    assert printable("caf\xe9 \u20ac") == "caf\xe9 \u20ac"
    assert json.loads(json_text({"name": "\x1b \udcff \ud800"})) == {"name": "\x1b \\xff \\ud800"}
