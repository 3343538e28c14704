"""Data that a server misses because a SYN cookie forgives a late sequence number.

The oracle is the stream that the client sent and what the server's application read of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab.scenarios.tracer import Tracer
from tests.kernel.conftest import told_by
from tests.kernel.handmade import Client, Site, site, told

pytestmark = pytest.mark.kernel

STREAM = b"abcdefg"


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def where(request: pytest.FixtureRequest) -> Iterator[Site]:
    with site(request.param) as made:
        yield made


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_the_bytes_that_the_application_did_not_get_are_told(
    either_tracer: Tracer, where: Site, lost: int
) -> None:
    client = Client(where)
    client.connect()
    client.lose((0, b""), (0, STREAM[:lost]))
    client.send(lost, STREAM[lost:])
    read = client.read_by_server(len(STREAM) - lost)
    assert STREAM.endswith(read)
    line = told(either_tracer, where.netns, client.four_tuple, "data-lost")
    assert line["bytes_missed"] == len(STREAM) - len(read) == lost
    assert (line["stuck"], line["certainty"]) == (False, "certain")


def test_a_repeated_syn_does_not_hide_it(either_tracer: Tracer, where: Site) -> None:
    client = Client(where)
    client.connect(times=2)
    client.lose((0, b""), (0, STREAM[:2]))
    client.send(2, STREAM[2:])
    read = client.read_by_server(len(STREAM) - 2)
    line = told(either_tracer, where.netns, client.four_tuple, "data-lost")
    assert line["bytes_missed"] == len(STREAM) - len(read)
    assert line["syn_count"] == 2


def test_one_byte_more_than_the_mss_index_is_refused(either_tracer: Tracer, where: Site) -> None:
    """The arithmetic of the docs: an index of 1 forgives one byte, not two."""
    client = Client(where)
    client.connect(mss_index=1)
    client.lose((0, b""), (0, STREAM[:2]))
    client.send(2, STREAM[2:])
    client.await_reset()
    line = told(either_tracer, where.netns, client.four_tuple, "cookie-rejected")
    assert line["bytes_missed"] == 0


def test_a_server_that_waits_for_what_is_never_sent_is_told(
    either_tracer: Tracer, where: Site
) -> None:
    """A keep-alive probe validates where the MSS index can be one higher, as IPv6's 1440 is."""
    early, sound = Client(where), Client(where)
    early.connect(mss_index=2)
    early.send(-1)
    served, _ = where.listener.accept()
    with served:
        early.send(0, STREAM)
        # What is sent after it arrives, and so has it.
        sound.connect()
        sound.send(0, STREAM)
        assert sound.read_by_server(len(STREAM)) == STREAM
        served.setblocking(False)
        with pytest.raises(BlockingIOError):
            served.recv(len(STREAM))
    line = told(either_tracer, where.netns, early.four_tuple, "data-lost")
    assert line["bytes_missed"] == -1
    assert sound.four_tuple not in {who for _, who, _ in told_by(either_tracer, where.netns)}


def test_a_stream_that_is_read_whole_is_not_accused(either_tracer: Tracer, where: Site) -> None:
    """Neither one whose third ACK is lost, nor one that nothing happened to."""
    late, sound, sentinel = (Client(where) for _ in range(3))
    late.connect()
    late.lose((0, b""))
    late.send(0, STREAM)
    assert late.read_by_server(len(STREAM)) == STREAM
    sound.connect()
    sound.send(0)
    sound.send(0, STREAM)
    assert sound.read_by_server(len(STREAM)) == STREAM
    # One that is told shows that the tool has worked off the others.
    sentinel.connect()
    sentinel.send(1, STREAM[1:])
    told(either_tracer, where.netns, sentinel.four_tuple, "data-lost")
    lost = {
        who for _, who, verdict in told_by(either_tracer, where.netns) if verdict == "data-lost"
    }
    assert lost == {sentinel.four_tuple}
