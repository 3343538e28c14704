"""Artifacts: what is made can be read, and nothing else is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.kernel import artifact
from tcpstuck_bpf.kernel.artifact import MAGIC, Artifact, DamagedError, MapShape, Program

MAPS = (MapShape("awaiting_ack", 1, 40, 136, 1), MapShape("events", 27, 0, 0, 4096, 0))
EXIT = struct.pack("<BBhi", 0x95, 0, 0, 0)
RETURN_0 = struct.pack("<BBhi", 0xB7, 0, 0, 0)


def load_map(number: int) -> bytes:
    """`r1 = the table with that number`: a load of 64 bits, two instructions long."""
    return struct.pack("<BBhiBBhi", 0x18, 1 << 4 | 1, 0, number, 0, 0, 0, 0)


CODE = load_map(1) + RETURN_0 + EXIT
MADE = Artifact(
    identity="ab" * 32,
    made_for="6.1.0-50-amd64",
    compiler="BCC 0.26.0",
    mode="fentry",
    architecture="x86_64",
    programs=(
        Program(artifact.FENTRY, "tcp_conn_request", CODE),
        Program(artifact.FEXIT, "tcp_conn_request", load_map(0) + EXIT),
        Program(artifact.RAW_TRACEPOINT, "packet_freed", RETURN_0 + EXIT),
    ),
    maps=MAPS,
)


def with_head(**changed: Any) -> bytes:
    """The artifact with other values in its head, and a checksum that matches them."""
    data = artifact.encode(MADE)
    start = len(MAGIC) + 4
    (length,) = struct.unpack_from("<I", data, len(MAGIC))
    head = {**json.loads(data[start : start + length]), **changed}
    text = json.dumps(head).encode()
    body = MAGIC + struct.pack("<I", len(text)) + text + data[start + length : -32]
    return body + hashlib.sha256(body).digest()


def with_code(code: bytes) -> bytes:
    programs = (Program(artifact.KPROBE, "only", code),)
    return artifact.encode(dataclasses.replace(MADE, programs=programs))


def test_what_was_made_is_read_again() -> None:
    assert artifact.decode(artifact.encode(MADE)) == MADE
    assert artifact.decode(with_head()) == MADE
    assert artifact.encode(MADE) == artifact.encode(MADE)


def test_every_cut_is_refused() -> None:
    data = artifact.encode(MADE)
    for length in range(len(data)):
        with pytest.raises(DamagedError):
            artifact.decode(data[:length])
    with pytest.raises(DamagedError):
        artifact.decode(data + b"\0")


def test_ten_thousand_flipped_bits_are_refused() -> None:
    data = artifact.encode(MADE)
    chosen = random.Random(3311)
    for _ in range(10_000):
        bit = chosen.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError):
            artifact.decode(bytes(flipped))


@given(st.binary(max_size=300))
def test_whatever_follows_the_magic_number_is_refused_in_words(data: bytes) -> None:
    """With and without a checksum that matches, so that the parsing itself is reached."""
    body = MAGIC + data
    for candidate in (body, body + hashlib.sha256(body).digest()):
        with pytest.raises(DamagedError):
            artifact.decode(candidate)


@pytest.mark.parametrize(
    "changed",
    [
        {"programs": [["fentry", "tcp_conn_request", len(CODE)]]},
        {"programs": [["fentry", "x", 1 << 40]]},
        {"programs": [["fentry", "x", -8]]},
        {"programs": [["lsm", "x", len(CODE)]]},
        {"programs": [["fentry", "../x", len(CODE)]]},
        {"programs": [["fentry", "x"]]},
        {"programs": [["fentry", "x", True]]},
        {"programs": {}},
        {"programs": [["fentry", "x", 0]] * 65},
        {"maps": [["events", 27, 0, 0, 4096, 0]]},
        {"maps": [["events", 27, 0, 0, 1 << 32, 0]] * 2},
        {"maps": [["events", 27, 0, 0, 4096, 0]] * 2},
        {"maps": [["events", 27, 0, 0, 4096.0, 0], ["config", 2, 4, 48, 1, 0]]},
        {"maps": None},
        {"identity": 7},
        {"made_for": "\x1b[2J"},
        {"mode": "x" * 201},
    ],
)
def test_a_head_that_lies_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(DamagedError):
        artifact.decode(with_head(**changed))


@pytest.mark.parametrize(
    "code",
    [
        b"",
        EXIT[:-1],
        load_map(len(MAPS)),
        load_map(-1),
        load_map(0)[:8],
        struct.pack("<BBhiBBhi", 0x18, 2 << 4, 0, 0, 0, 0, 0, 0),  # a value in a table
        struct.pack("<BBhi", 0x85, 1 << 4, 0, 1),  # a call of another program
        struct.pack("<BBhi", 0x85, 2 << 4, 0, 1),  # a call of a kernel function
    ],
)
def test_bytecode_that_would_need_another_loader_is_refused(code: bytes) -> None:
    with pytest.raises(DamagedError):
        artifact.decode(with_code(code))


def test_tables_get_their_numbers_wherever_they_stand() -> None:
    code = load_map(0) + RETURN_0 + load_map(1) + load_map(0) + EXIT
    expected = load_map(7) + RETURN_0 + load_map(9) + load_map(7) + EXIT
    assert artifact.with_map_values(code, {0: 7, 1: 9}) == expected
    with pytest.raises(DamagedError):
        artifact.with_map_values(code, {0: 7})


def test_a_64_bit_number_that_looks_like_an_instruction_is_left_alone() -> None:
    """The second half of a 64-bit load is no instruction, whatever it holds."""
    constant = struct.pack("<BBhi", 0x18, 1, 0, 5) + load_map(1)[:8]
    code = constant + load_map(1) + EXIT
    assert artifact.with_map_values(code, {1: 9}) == constant + load_map(9) + EXIT
