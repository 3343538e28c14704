"""Every scenario, recorded once on a real kernel, still gives the committed verdicts and tables.

What is expected is written by `python3 -m lab golden --expect`, and the difference read; that the
verdicts are true was said by the lab's oracle when it was recorded, and is held here as well.
"""

from __future__ import annotations

import ipaddress
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path
from typing import Any

import pytest

from lab.errors import LabError
from lab.golden import NOBODY_IS_NAMED, RECORDINGS
from lab.golden_files import (
    DIRECTORY,
    LINES,
    SCREEN,
    SUFFIXES,
    TABLE,
    kept_file,
    kept_recording,
    kept_truth,
    replayed,
)
from lab.guests.kernel_tests import REPOSITORY
from lab.network.topology import (
    CLIENT_ADDRESS,
    LOCAL_SOURCES,
    PREFIX_LENGTH,
    SERVER_ADDRESS,
    SILENT_SOURCES,
)
from lab.records import VERDICTS_OF_STUCK, compare
from lab.scenarios.catalogue import SCENARIOS
from lab.scenarios.tracer import clients_in_groups
from tcpstuck_bpf.kernel.probes import PROBES, WHY_PROBES
from tcpstuck_bpf.model import address_bytes
from tcpstuck_bpf.recording.replay import Replay

NETWORKS = [
    ipaddress.ip_network(network, strict=False)
    for family in (4, 6)
    for network in (
        f"{SERVER_ADDRESS[family]}/{PREFIX_LENGTH[family]}",
        f"{CLIENT_ADDRESS[family]}/{PREFIX_LENGTH[family]}",
        LOCAL_SOURCES[family],
        SILENT_SOURCES[family],
    )
]
ADDRESS_BYTES = len(address_bytes("::"))
NAMES_IN_THE_LAB = re.compile(r"tcpstuck-\d+-\d+-(server|client)|host|own")
OWNERS_IN_THE_LAB = re.compile(r"(python3?(\.\d+)?|mariadbd) \(pid \d+\)")
ADDRESSES_IN_WORDS = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}|[0-9a-f]{1,4}(?::[0-9a-f]{0,4}){2,7}")
LIMIT_S = 100
"""For one process that replays all recordings."""
MOST_BYTES = 1 << 20
"""Limit for all that is kept here."""


@pytest.fixture(params=RECORDINGS)
def name(request: pytest.FixtureRequest) -> str:
    """One that is there."""
    try:
        kept_recording(request.param)
    except LabError as error:
        pytest.fail("\n".join(error.lines()))
    return str(request.param)


def parts(value: Any) -> Iterator[Any]:
    """A value and all that it holds."""
    yield value
    if isinstance(value, dict):
        for item in value.items():
            yield from parts(item)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from parts(one)


def in_the_lab(address: str) -> bool:
    found = ipaddress.ip_address(address)
    plain = getattr(found, "ipv4_mapped", None) or found
    return plain.is_unspecified or any(plain in network for network in NETWORKS)


def test_a_replay_prints_what_is_committed(name: str) -> None:
    printed = replayed(name, kept_recording(name))
    for suffix, text in zip((LINES, TABLE, SCREEN), printed):
        kept = kept_file(name, suffix).read_text(encoding="utf-8")
        changed = "\n".join(unified_diff(kept.splitlines(), text.splitlines(), n=0, lineterm=""))
        assert text == kept, f"if this is right: python3 -m lab golden --expect\n{changed}"


def test_what_is_committed_is_true(name: str) -> None:
    truth = kept_truth(name)
    lines = kept_file(name, LINES).read_text(encoding="utf-8").splitlines()
    comparison = compare(truth, map(json.loads, lines))
    assert comparison.agrees, comparison
    assert (len(truth.expected) == 0) == (truth.scenario == NOBODY_IS_NAMED)


def test_every_scenario_is_recorded() -> None:
    recorded = {one.scenario for one in RECORDINGS.values() if one.family == "4"}
    assert recorded >= SCENARIOS.keys(), "see RECORDINGS in lab/golden.py"
    expected = {kept_file(name, suffix).name for name in RECORDINGS for suffix in SUFFIXES}
    kept = {path.name for path in DIRECTORY.iterdir() if path.name.endswith(SUFFIXES)}
    missing, left_over = sorted(expected - kept), sorted(kept - expected)
    again = " ".join(sorted({file.split(".")[0] for file in missing}))
    assert not missing, f"record what is missing: python3 -m lab golden {again}"
    assert not left_over, "no recording in lab/golden.py is named so: remove them"


def test_all_of_it_is_small() -> None:
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir() if path.is_file()) < MOST_BYTES


def test_every_address_is_of_the_lab(name: str, tmp_path: Path) -> None:
    recording = kept_recording(name)
    (tmp_path / name).write_bytes(recording)
    replay = Replay(str(tmp_path / name))
    addresses = {
        one
        for one in parts([replay.header.settings.trace_filter.listener_address, *replay.steps()])
        if isinstance(one, bytes)
    }
    assert addresses
    assert {len(address) for address in addresses} == {ADDRESS_BYTES}
    told = [str(ipaddress.IPv6Address(address)) for address in addresses]
    words = [one for one in parts(decoded(recording)) if isinstance(one, str)]
    told += [address for text in words for address in ADDRESSES_IN_WORDS.findall(text)]
    assert [address for address in told if not in_the_lab(address)] == []


def test_nothing_tells_of_the_machine_it_was_made_on(name: str) -> None:
    """It is a guest's, and holds no path, no process but the lab's, and not this machine's name."""
    recording = kept_recording(name)
    named = decoded(recording)[0]["netns_names"].values()
    assert all(NAMES_IN_THE_LAB.fullmatch(one) for one in named)
    words = {one for one in parts(decoded(recording)) if isinstance(one, str)} - set(named)
    assert not [text for text in words if "/" in text]
    owners = {text for text in words if "(pid " in text}
    assert all(OWNERS_IN_THE_LAB.fullmatch(owner) for owner in owners)
    machine = re.compile(rf"\b{re.escape(platform.node())}\b")
    assert not [text for text in words - owners if machine.search(text)]


def decoded(recording: bytes) -> list[Any]:
    return [json.loads(line) for line in recording.splitlines()]


WORD = re.compile(r"`(\w+)`").findall
PRINT_ALL = """
from lab.golden_files import kept_recording, replayed
import sys
for name in sys.argv[1:]:
    sys.stdout.buffer.write("".join(replayed(name, kept_recording(name))).encode())
"""


def test_the_screen_and_its_answer_count_the_clients_that_the_oracle_saw_hanging(name: str) -> None:
    truth, screen = kept_truth(name), kept_file(name, SCREEN).read_text(encoding="utf-8")
    stuck = sum(verdict in VERDICTS_OF_STUCK for verdict in truth.expected.values())
    answer = re.search(r"^(\d+) clients? of .*(\n.*)? (is|are)\sstuck: ", screen, re.M)
    assert (int(answer[1]) if answer else 0) == stuck
    if stuck:
        assert clients_in_groups(screen) == stuck
    assert all(len(line) <= 80 for line in screen.splitlines())


def test_the_screen_of_the_readme_is_a_real_one() -> None:
    screen = kept_file("mariadb-stall", SCREEN).read_text(encoding="utf-8")
    assert screen in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_client_of_the_page_that_explains_it_all_is_a_real_one() -> None:
    page = (REPOSITORY / "docs/how-it-works.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```\n(\d\d:\d\d:\d\d .*?)^```$", page, re.M | re.S)
    assert shown in kept_file("overflow", TABLE).read_text(encoding="utf-8")
    named = {word for words in re.findall(r"^\| (`.*?) \|", page, re.M) for word in WORD(words)}
    probes = {probe.function for probe in (*PROBES, *WHY_PROBES)}
    assert named == probes
    for file in re.findall(r"^\| ((?:bpf|tcpstuck_bpf)/\S+) \|", page, re.M):
        assert (REPOSITORY / file).exists()


@pytest.mark.parametrize(
    "beside",
    [
        {"TZ": "Pacific/Kiritimati", "COLUMNS": "40", "PYTHONHASHSEED": "1"},
        {"LC_ALL": "tr_TR.ISO-8859-9", "PYTHONUTF8": "0", "PYTHONHASHSEED": "2"},
    ],
    ids=["elsewhere", "another-language"],
)
def test_who_replays_makes_no_difference(beside: dict[str, str]) -> None:
    """Neither zone, terminal and locale matter, nor the order that a hash seed gives to sets."""
    again = subprocess.run(
        [sys.executable, "-c", PRINT_ALL, *RECORDINGS],
        cwd=REPOSITORY,
        env={**os.environ, **beside},
        capture_output=True,
        timeout=LIMIT_S,
    )
    assert again.stderr == b""
    expected = [
        kept_file(name, suffix).read_bytes()
        for name in RECORDINGS
        for suffix in (LINES, TABLE, SCREEN)
    ]
    assert again.stdout == b"".join(expected)
