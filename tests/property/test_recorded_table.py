"""What is written of the table is what is read of it, whatever was seen of it and in what order."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.model import Row, Sweep, SweepPart
from tcpstuck_bpf.recording.table import RecordedTable
from tests.builders import at, four_tuple, handshake, repeated

ENTRIES = (handshake(), repeated(handshake(), at(1)), handshake(at(2)))

rows = st.dictionaries(st.integers(0, 9), st.sampled_from(ENTRIES), max_size=10).map(
    lambda table: tuple(Row(four_tuple(number), entry) for number, entry in table.items())
)
sweeps = st.lists(
    st.builds(Sweep, st.integers(0, 2**64 - 1), rows, st.sampled_from(SweepPart)), max_size=12
)


@given(sweeps)
def test_batches_come_back_as_they_were(seen: list[Sweep]) -> None:
    writer, reader = RecordedTable(), RecordedTable()
    for sweep in seen:
        line = json.dumps(writer.values_of(sweep))
        read = reader.sweep_of(json.loads(line))
        assert (read.time_ns, read.part) == (sweep.time_ns, sweep.part)
        assert sorted(read.rows) == sorted(sweep.rows)


def reader_of(seen: tuple[Row, ...]) -> RecordedTable:
    """A reader that has read a sweep of these rows."""
    reader = RecordedTable()
    line = json.dumps(RecordedTable().values_of(Sweep(at(0), seen)))
    reader.sweep_of(json.loads(line))
    return reader


# More than are there, in any order: what a recorder never writes.
runs = st.lists(st.lists(st.integers(-1, 12), min_size=1, max_size=3), max_size=5)


@given(rows, runs)
def test_runs_give_each_row_once_or_are_refused(
    seen: tuple[Row, ...], runs: list[list[int]]
) -> None:
    reader = reader_of(seen)
    values = {"sweep": 1, "part": "last", "rows": [], "kept": runs}
    try:
        read = reader.sweep_of(values).rows
    except ValueError:
        return
    assert len(set(read)) == len(read) <= len(seen)
    assert len(read) == sum(last - first + 1 for first, last in runs)


@pytest.mark.parametrize("run", [[0, 1 << 63], [3, 2], [0, 10], [-1, 2], [0, 9, 9]])
def test_a_run_that_nobody_wrote_is_refused(run: list[int]) -> None:
    reader = reader_of(tuple(Row(four_tuple(number), handshake()) for number in range(10)))
    for kept in ([run], [[0, 9], [9, 9]], [[0, 9]] * 100_000):
        with pytest.raises(ValueError, match=r"run|unpack|integer"):
            reader.sweep_of({"sweep": 1, "part": "last", "rows": [], "kept": kept})


@given(rows, st.sampled_from(SweepPart))
def test_what_has_not_changed_is_written_as_numbers_only(
    seen: tuple[Row, ...], part: SweepPart
) -> None:
    table = RecordedTable()
    table.values_of(Sweep(at(0), seen, SweepPart.LAST))
    values = table.values_of(Sweep(at(1), seen, part))
    assert values["rows"] == []
    assert len(values["kept"]) == bool(seen)
