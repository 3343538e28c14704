"""What is written of the table is what is read of it, whatever was seen of it and in what order."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.model import Row, Sweep, SweepPart
from tcpstuck_bpf.recorded_table import RecordedTable
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


@given(rows, st.sampled_from(SweepPart))
def test_what_has_not_changed_is_written_as_numbers_only(
    seen: tuple[Row, ...], part: SweepPart
) -> None:
    table = RecordedTable()
    table.values_of(Sweep(at(0), seen, SweepPart.LAST))
    values = table.values_of(Sweep(at(1), seen, part))
    assert values["rows"] == []
    assert len(values["kept"]) == bool(seen)
