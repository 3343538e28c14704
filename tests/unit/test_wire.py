"""wire.py and the enums of model.py against what a C compiler makes of bpf/tcpstuck.h."""

from __future__ import annotations

import enum
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tcpstuck_bpf import wire
from tcpstuck_bpf.model import (
    Ending,
    Event,
    EventKind,
    FourTuple,
    Handshake,
    ListenerFacts,
    Moved,
    NetnsCount,
    TraceFilter,
    TraceSettings,
    address_bytes,
)
from tests.builders import four_tuple, handshake, repeated

HEADER = Path(__file__).parents[2] / "bpf" / "tcpstuck.h"
COMPILE_TIME_LIMIT_S = 60
RUN_TIME_LIMIT_S = 10

PROLOGUE = """
#include <stddef.h>
#include <stdio.h>
#include <string.h>
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
#include "tcpstuck.h"
"""
CProgram = Callable[[str], bytes]

FORMATS = {
    "handshake_key": wire.KEY.format,
    "handshake": wire.HANDSHAKE.format,
    "event": wire.EVENT.format,
    "netns_key": wire.NETNS_KEY.format,
    "netns_counts": wire.COUNTS.format,
    "trace_config": wire.CONFIG.format,
    "synack": wire.SYNACK.format,
    "known_client": wire.KNOWN_CLIENT.format,
    "listener_key": wire.LISTENER_KEY.format,
    "listener_facts": wire.LISTENER_FACTS.format,
}
ENUMS: dict[str, type[enum.IntEnum] | type[enum.IntFlag]] = {
    "COUNT_": NetnsCount,
    "EVENT_": EventKind,
    "ENDING_": Ending,
    "MOVED_": Moved,
}


@pytest.fixture
def run_c(tmp_path: Path) -> CProgram:
    """Compiles and runs the body of a main() that has the header; what it wrote to stdout."""
    compiler = shutil.which("cc")
    if compiler is None:
        reason = "no C compiler (cc) to ask for the header's layout: install gcc or clang"
        if os.environ.get("TCPSTUCK_FORCE_KERNEL_TESTS"):
            pytest.fail(reason)
        pytest.skip(reason)

    def run(body: str) -> bytes:
        source, program = tmp_path / "ask.c", tmp_path / "ask"
        source.write_text(f"{PROLOGUE}int main(void) {{\n{body}\nreturn 0;\n}}\n")
        subprocess.run(
            [compiler, "-Wall", "-Werror", f"-I{HEADER.parent}", "-o", program, source],
            check=True,
            timeout=COMPILE_TIME_LIMIT_S,
        )
        answer = subprocess.run(
            [program], check=True, capture_output=True, timeout=RUN_TIME_LIMIT_S
        )
        return answer.stdout

    return run


def header_text() -> str:
    """The header without its comments."""
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)


def members_in_header(name: str) -> list[str]:
    found = re.search(rf"struct {name} {{(.*?)}};", header_text(), flags=re.DOTALL)
    assert found is not None
    return re.findall(r"(\w+)(?:\[\w+\])?;", found[1])


def enumerators_in_header(prefix: str) -> list[str]:
    return re.findall(rf"\b{prefix}[A-Z_]+\b(?=\s*[=,])", header_text())


def offsets_in_format(text: str) -> Iterator[int]:
    """Where each value of a struct format begins, pad bytes left out."""
    offset = 0
    for number, code in re.findall(r"(\d*)([a-zA-Z])", text):
        repeats = 1 if code == "s" else int(number or 1)
        size = struct.calcsize(f"={number}s") if code == "s" else struct.calcsize(f"={code}")
        for _ in range(repeats):
            if code != "x":
                yield offset
            offset += size


OWN_TO_PROGRAMS = ("told_kind", "told_at")
"""Members of struct handshake that mean nothing to user space."""


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_are_the_compilers(name: str, run_c: CProgram) -> None:
    size = int(run_c(f'printf("%zu", sizeof(struct {name}));'))
    assert struct.calcsize(FORMATS[name]) == size


@pytest.mark.parametrize(
    "name", ["handshake_key", "handshake", "trace_config", "listener_key", "listener_facts"]
)
def test_offsets_are_the_compilers(name: str, run_c: CProgram) -> None:
    members = members_in_header(name)
    fields = [
        m for m in members if m not in ("padding", *OWN_TO_PROGRAMS) or name == "trace_config"
    ]
    body = "".join(f'printf("%zu\\n", offsetof(struct {name}, {field}));' for field in fields)
    expected = [int(line) for line in run_c(body).split()]
    offsets = list(offsets_in_format(FORMATS[name]))
    assert offsets == expected


def test_fields_are_named_and_ordered_as_in_the_header() -> None:
    own = [m for m in members_in_header("event") if m not in ("key", "handshake", "padding")]
    assert list(Event._fields[2:]) == own
    assert list(FourTuple._fields) == members_in_header("handshake_key")
    own_to_programs = [m for m in members_in_header("handshake") if m in OWN_TO_PROGRAMS]
    assert own_to_programs == list(OWN_TO_PROGRAMS)
    others = [m for m in members_in_header("handshake") if m not in OWN_TO_PROGRAMS]
    *before, device, socket = Handshake._fields
    assert [*before, "padding", device, socket] == others
    whose = ["server_address", "server_port"]
    assert ["netns", *whose, "socket"] == [*ListenerFacts._fields[:3], ListenerFacts._fields[-1]]
    figures = ListenerFacts._fields[3:-1]
    assert [*figures, *whose, "padding"] == members_in_header("listener_facts")


@pytest.mark.parametrize("prefix", ENUMS)
def test_enums_are_the_compilers(prefix: str, run_c: CProgram) -> None:
    names = enumerators_in_header(prefix)
    body = "".join(f'printf("%d\\n", {name});' for name in names)
    values = (int(line) for line in run_c(body).split())
    in_c = {name.removeprefix(prefix): value for name, value in zip(names, values)}
    members = ENUMS[prefix].__members__.items()
    in_python = {name: int(value) for name, value in members if name != Moved.NOTHING.name}
    assert in_python == in_c
    assert in_c


def test_netns_counts_are_all_there(run_c: CProgram) -> None:
    assert int(run_c('printf("%d", NETNS_COUNT_MAX);')) == len(NetnsCount)


def test_every_count_of_outside_segments_follows_its_counterpart() -> None:
    """The BPF program adds one to the count's number for a segment outside the filters."""
    outside = [count for count in NetnsCount if count.name.endswith("_OUTSIDE")]
    assert outside
    for count in outside:
        assert NetnsCount[count.name.removesuffix("_OUTSIDE")] == count - 1


def distinct_values(fields: tuple[str, ...], sizes: dict[str, int]) -> dict[str, int]:
    """Another value for every field, with another value in each of its bytes."""
    return {
        field: int.from_bytes(
            bytes((16 * number + byte + 1) % 256 for byte in range(sizes[field])), "big"
        )
        for number, field in enumerate(fields)
    }


def test_an_event_written_in_c_is_read_field_by_field(run_c: CProgram) -> None:
    own = Event._fields[2:]
    members = [*(f"handshake.{f}" for f in Handshake._fields), *own]
    body = "struct event event;" + "".join(
        f'printf("%zu\\n", sizeof(event.{member}));' for member in members
    )
    sizes = dict(zip(members, (int(line) for line in run_c(body).split())))
    values = distinct_values(tuple(members), sizes)
    key = four_tuple(7, family=6)
    body = "struct event event; memset(&event, 0xff, sizeof(event));"
    for name in ("client_address", "server_address"):
        octets = ",".join(map(str, getattr(key, name)))
        body += f"__u8 {name}[] = {{{octets}}}; memcpy(event.key.{name}, {name}, 16);"
    for name in ("client_port", "server_port"):
        on_the_wire = getattr(key, name).to_bytes(2, "big")
        body += f"event.key.{name} = {int.from_bytes(on_the_wire, sys.byteorder)};"
    body += f"event.key.netns = {key.netns}U;"
    body += "".join(f"event.{member} = {value}ULL;" for member, value in values.items())
    data = run_c(f"{body} fwrite(&event, sizeof(event), 1, stdout);")
    read = wire.decode_event(data)
    assert read.four_tuple == key
    assert read.handshake._asdict() == {f: values[f"handshake.{f}"] for f in Handshake._fields}
    assert {f: getattr(read, f) for f in own} == {f: values[f] for f in own}
    assert wire.decode_key(data[: wire.KEY.size]) == key
    assert wire.encode_key(key) == data[: wire.KEY.size]


def test_c_reads_the_settings_that_were_written(run_c: CProgram) -> None:
    listener = address_bytes("fd09::1")
    wanted = TraceFilter(ports=(3311,), family=6, listener_address=listener, netns=4_026_531_840)
    packed = wire.encode_config(TraceSettings(wanted, timeout_ns=4_000_000_000), 0x1234, 77)
    body = f"""
    static const __u8 bytes[] = {{{",".join(map(str, packed))}}};
    struct trace_config config;
    memcpy(&config, bytes, sizeof(config));
    printf("%llu %llu %llu %llu %u %u %u %u %u\\n", config.tell_completed_after_ns,
           config.tell_syn_again_after_ns, config.tell_ack_again_after_ns,
           config.per_cpu_offset_table, config.netns, config.most_repeats_unread,
           config.match_ports, config.match_listener, config.family);
    fwrite(config.listener_address, 16, 1, stdout);
    """
    numbers, _, address = run_c(body).partition(b"\n")
    again = (wire.TELL_SYN_AGAIN_AFTER_NS, wire.TELL_ACK_AGAIN_AFTER_NS)
    assert numbers.split()[1:3] == [str(interval).encode() for interval in again]
    assert numbers.split()[:1] + numbers.split()[3:] == [
        b"3000000000",
        b"4660",
        b"4026531840",
        b"77",
        b"1",
        b"1",
        b"6",
    ]
    assert address == listener


def test_every_wanted_port_has_its_bit() -> None:
    ports = {1, 63, 64, 3311, 65_535}
    words = wire.port_bits(ports)
    assert {
        64 * word + bit for word, bits in words.items() for bit in range(64) if bits >> bit & 1
    } == ports


def test_a_listeners_facts_are_of_its_socket_and_of_the_sockets_own_port(run_c: CProgram) -> None:
    figures = ListenerFacts._fields[3:-1]
    values = {name: number for number, name in enumerate(figures, 1)}
    address = address_bytes("192.0.2.7")
    body = f"""
    static const __u8 address[] = {{{",".join(map(str, address))}}};
    struct listener_key key;
    struct listener_facts facts;
    memset(&key, 0, sizeof(key));
    key.netns = 7;
    key.socket = 4000000001U;
    fwrite(&key, sizeof(key), 1, stdout);
    memcpy(facts.server_address, address, 16);
    facts.server_port = {int.from_bytes((3311).to_bytes(2, "big"), sys.byteorder)};
    """
    body += "".join(f"facts.{name} = {number};" for name, number in values.items())
    data = run_c(f"{body} fwrite(&facts, sizeof(facts), 1, stdout);")
    size = wire.LISTENER_KEY.size
    read = wire.decode_listener(data[:size], data[size:])
    assert read == ListenerFacts(7, address, 3311, *values.values(), socket=4_000_000_001)


def test_a_record_may_be_longer_than_the_event_and_not_shorter() -> None:
    record = bytes(wire.EVENT.size)
    assert wire.decode_event(record + b"\xff" * 7) == wire.decode_event(record)
    with pytest.raises(struct.error):
        wire.decode_event(record[:-1])


def test_rows_of_a_batch_stay_together() -> None:
    keys = [four_tuple(n, family) for n in range(3) for family in (4, 6)]
    entries = [repeated(handshake(n + 1), n + 5) for n in range(len(keys))]
    values = b"".join(wire.HANDSHAKE.pack(*entry) for entry in entries)
    rows = list(wire.decode_rows(b"".join(map(wire.encode_key, keys)), values))
    assert rows == list(zip(keys, entries))
    assert list(wire.decode_rows(b"", b"")) == []


def test_a_batch_whose_halves_do_not_match_is_refused() -> None:
    with pytest.raises(ValueError, match="do not match"):
        list(wire.decode_rows(bytes(wire.KEY.size), bytes(2 * wire.HANDSHAKE.size)))


def test_counts_are_read_by_name() -> None:
    data = wire.COUNTS.pack(*(count.value * 3 for count in NetnsCount))
    assert wire.decode_counts(data) == {count: count.value * 3 for count in NetnsCount}
