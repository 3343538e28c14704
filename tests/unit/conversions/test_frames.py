"""Frames come back in the order of their time, however many there are."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tcpstuck_bpf.conversions.frames import A_SYN, FROM_CLIENT, FROM_SERVER, Frame, Frames
from tests.builders import four_tuple


def frame(time_ns: int, rank: int = FROM_CLIENT, **changes: object) -> Frame:
    made = Frame(
        time_ns,
        four_tuple(time_ns % 7, 4 + time_ns % 2 * 2),
        rank,
        1,
        40,
        b"p" * 40,
        ("a", "caf\xe9"),
    )
    return made._replace(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_runs_are_merged_and_no_file_is_left(at_once: int, tmp_path: Path) -> None:
    times = list(range(100))
    random.Random(7).shuffle(times)
    frames = Frames(str(tmp_path), at_once)
    for time_ns in times:
        frames.add(frame(time_ns))
    assert list(tmp_path.iterdir()) == []
    assert list(frames) == [frame(time_ns) for time_ns in range(100)]
    assert list(frames) == list(frames)
    frames.close()
    assert list(tmp_path.iterdir()) == []


def test_a_syn_is_before_the_syn_ack_of_its_time() -> None:
    frames = Frames()
    for rank in (FROM_SERVER, A_SYN):
        frames.add(frame(1, rank))
    assert [one.rank for one in frames] == [A_SYN, FROM_SERVER]


@pytest.mark.parametrize("at_once", [1, 1000])
def test_a_packet_of_two_handshakes_is_there_once_with_both_comments(at_once: int) -> None:
    """A SYN begins a handshake, and tells that the one before was given up."""
    frames = Frames(at_once=at_once)
    frames.add(frame(1, A_SYN, data=b"p" * 44, length=44, comments=("b",)))
    frames.add(frame(1, A_SYN, comments=("a",)))
    frames.add(frame(1, A_SYN, sequence=2))
    first, second = frames
    assert first == frame(1, A_SYN, data=b"p" * 44, length=44, comments=("a", "b"))
    assert second.sequence == 2


def test_where_there_is_no_room_an_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Frames(str(tmp_path / "missing"), at_once=1).add(frame(1))
