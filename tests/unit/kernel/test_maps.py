"""Tables of the kernel's own, which bpf(2) makes wherever it is allowed to, without any program."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from tcpstuck_bpf.host import bpf_syscall
from tcpstuck_bpf.host.bpf_syscall import RefusedError, last_lines
from tcpstuck_bpf.kernel import maps
from tcpstuck_bpf.kernel.artifact import MapShape
from tcpstuck_bpf.kernel.maps import NOEXIST, BpfMap

HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY = 1, 2, 5, 6

Make = Callable[..., BpfMap]


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as opened:

        def one(kind: int, value_bytes: int, entries: int) -> BpfMap:
            try:
                file = bpf_syscall.create_map(kind, 4, value_bytes, entries)
            except RefusedError as error:
                if error.number != errno.EPERM:
                    raise
                pytest.skip(f"this machine lets us make no tables: {error}")
            made = BpfMap(file, MapShape("trial", kind, 4, value_bytes, entries))
            return opened.enter_context(closing(made))

        yield one


def key(number: int) -> bytes:
    return struct.pack("=I", number)


def value(number: int) -> bytes:
    return struct.pack("=IQ", number, number << 40)


def test_what_was_put_in_is_found_and_taken_out(make: Make) -> None:
    table = make(HASH, 12, 8)
    assert table.lookup(key(1)) is None
    assert table.update(key(1), value(1))
    assert not table.update(key(1), value(2), NOEXIST)
    assert table.lookup(key(1)) == value(1)
    assert table.update(key(1), value(3))
    assert table.take(key(1)) == value(3)
    assert table.take(key(1)) is None
    assert table.update(key(2), value(2), NOEXIST)
    assert (table.delete(key(2)), table.delete(key(2))) == (True, False)
    assert bpf_syscall.map_shape(table.file) == (HASH, 4, 12, 8, 0)


def test_a_full_table_refuses_in_words(make: Make) -> None:
    table = make(HASH, 12, 2)
    for number in range(2):
        table.update(key(number), value(number))
    with pytest.raises(RefusedError, match="E2BIG"):
        table.update(key(2), value(2))


@pytest.mark.parametrize("most", [1500, 64 * 1024])
def test_batches_together_are_the_whole_table(make: Make, most: int) -> None:
    """`most` has to be room for the fullest bucket, and less than all: more than one batch."""
    number = 5000
    table = make(HASH, 12, 2 * number)
    for one in range(number):
        table.update(key(one), value(one))
    batches = list(table.batches(most))
    assert (len(batches) > 1) == (most < number)
    found = {}
    for keys, values in batches:
        assert len(keys) // 4 == len(values) // 12
        found.update(
            {
                keys[4 * at : 4 * at + 4]: values[12 * at : 12 * at + 12]
                for at in range(len(keys) // 4)
            }
        )
    assert found == {key(one): value(one) for one in range(number)}
    assert set(table.keys(2 * number)) == found.keys()


def test_an_empty_table_has_no_keys_and_one_empty_batch(make: Make) -> None:
    table = make(HASH, 12, 8)
    assert list(table.keys(16)) == []
    assert list(table.batches(8)) == [(b"", b"")]


def test_looking_for_keys_ends_although_entries_go_meanwhile(make: Make) -> None:
    table = make(HASH, 12, 64)
    for one in range(64):
        table.update(key(one), value(one))
    seen = 0
    for found in table.keys(100):
        seen += 1
        table.delete(found)
        table.update(key(seen + 1000), value(0))
    assert seen <= 100


@pytest.mark.parametrize("kind", [PERCPU_HASH, PERCPU_ARRAY])
def test_each_possible_cpu_has_its_own_value(make: Make, kind: int) -> None:
    """Each is padded to 8 bytes in what the kernel takes and gives, and only there."""
    table = make(kind, 12, 4)
    cpus = maps.possible_cpus()
    each = [value(cpu + 1) for cpu in range(cpus)]
    table.update(key(0), b"".join(one.ljust(16, b"\0") for one in each))
    assert table.per_cpu(key(0)) == each
    missing = table.per_cpu(key(3))
    assert missing == ([] if kind == PERCPU_HASH else [bytes(12)] * cpus)


def test_an_array_has_all_its_entries(make: Make) -> None:
    table = make(ARRAY, 12, 4)
    assert table.lookup(key(3)) == bytes(12)
    assert list(table.keys(8)) == [key(one) for one in range(4)]


def test_what_the_verifier_says_is_in_the_refusal() -> None:
    """r0 is never set: a program that no kernel takes."""
    refusal = bpf_syscall.tracing_refusal()
    if refusal is not None:
        pytest.skip(f"this machine lets us load no programs: {refusal}")
    code = struct.pack("=BBhi", 0x95, 0, 0, 0)
    with pytest.raises(RefusedError, match="R0 !read_ok"):
        bpf_syscall.load_program(bpf_syscall.PROGRAM_KPROBE, "trial", code)


def test_a_verifier_s_log_ends_with_its_reasons() -> None:
    log = "0: (bf) r1 = r10\n1: (95) exit\nR0 !read_ok\nprocessed 2 insns (limit 1000000)\n"
    assert last_lines(log) == "0: (bf) r1 = r10; 1: (95) exit; R0 !read_ok"
    assert last_lines("") == ""
