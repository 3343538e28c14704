"""The programs insert again into a table that was full once there may be room in it."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from tcpstuck_bpf.kernel.tables import Tables
from tests.builders import four_tuple, identity
from tests.builders import handshake as entry
from tests.fake_maps import FakeMap

FLAGS = 4
"""Number of tables with a flag: `enum table` in bpf/tcpstuck.bpf.c."""


def full_flags() -> FakeMap:
    """Every table's flag, set as by a failed insert."""
    flags = FakeMap(FLAGS)
    for table in range(FLAGS):
        flags.update(struct.pack("=I", table), struct.pack("=I", 1))
    return flags


def are_set(flags: FakeMap) -> list[int]:
    return [struct.unpack("=I", value)[0] for (value,) in flags.held.values()]


@pytest.mark.parametrize(
    "makes_room",
    [
        lambda tables: list(tables.sweep()),
        lambda tables: tables.forget([identity(entry())]),
        lambda tables: tables.free([four_tuple().netns], {}),
    ],
    ids=["a sweep", "entries that leave", "namespaces that are gone"],
)
def test_the_flags_are_cleared_by_what_makes_room(makes_room: Callable[[Tables], object]) -> None:
    flags = full_flags()
    maps = {
        name: FakeMap(16)
        for name in ("awaiting_ack", "counts", "crowded_out", "listeners", "chosen", "synacks")
    }
    tables = Tables({**maps, "table_is_full": flags}, 16, in_batches=False, rescue=True)
    assert are_set(flags) == [1] * FLAGS
    makes_room(tables)
    assert are_set(flags) == [0] * FLAGS
