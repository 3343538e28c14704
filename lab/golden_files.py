"""The files of the golden recordings in tests/golden.

Each recording is stored with the oracle's truth and with the output of its replay. A replay is
compared with both: its earlier output, and what really happened.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from lab.errors import LabError
from lab.guests.kernel_tests import REPOSITORY
from lab.records import FourTuple, Outcome, compare
from lab.scenarios.play import comparison_text
from tcpstuck_bpf.cli import main
from tcpstuck_bpf.errors import EXIT_NOTHING_STUCK, EXIT_STUCK

DIRECTORY = REPOSITORY / "tests" / "golden"
RECORDING, TRUTH, LINES, TABLE, SCREEN = SUFFIXES = (
    *(".tcpstuck.gz", ".truth.json"),
    *(".jsonl", ".txt", ".screen.txt"),
)


class Printed(NamedTuple):
    """What a replay of a recording prints."""

    lines: str
    """With --json."""
    table: str
    """With -v, 100 columns wide."""
    screen: str
    """Without options, 80 columns wide."""

    def decoded(self) -> list[dict[str, Any]]:
        """The JSON lines."""
        return [json.loads(line) for line in self.lines.splitlines()]


def kept_file(name: str, suffix: str, directory: Path = DIRECTORY) -> Path:
    """The path of one of a recording's files."""
    return directory / f"{name}{suffix}"


def keep(name: str, recording: bytes, truth: Outcome, directory: Path = DIRECTORY) -> None:
    """Write all files. Raises LabError if the replay contradicts the truth."""
    printed = checked_replay(name, recording, truth)
    directory.mkdir(exist_ok=True)
    kept_file(name, RECORDING, directory).write_bytes(gzip.compress(recording, mtime=0))
    kept_file(name, TRUTH, directory).write_text(truth_text(truth), encoding="ascii")
    _write_printed(name, printed, directory)


def expect_again(name: str, directory: Path = DIRECTORY) -> None:
    """Write the recording's current replay output. Raises LabError if it contradicts the truth."""
    recording, truth = kept_recording(name, directory), kept_truth(name, directory)
    _write_printed(name, checked_replay(name, recording, truth), directory)


def kept_recording(name: str, directory: Path = DIRECTORY) -> bytes:
    """The recording as the tool wrote it. Raises LabError if it does not exist."""
    try:
        return gzip.decompress(kept_file(name, RECORDING, directory).read_bytes())
    except OSError as error:
        raise _missing(name, error) from error


def kept_truth(name: str, directory: Path = DIRECTORY) -> Outcome:
    """The oracle's truth at recording time. Raises LabError if it does not exist."""
    try:
        values = json.loads(kept_file(name, TRUTH, directory).read_text(encoding="ascii"))
    except OSError as error:
        raise _missing(name, error) from error
    expected = {FourTuple(*key): verdict for *key, verdict in values["expected"]}
    return Outcome(values["scenario"], values["family"], values["netns"], expected=expected)


def truth_text(truth: Outcome) -> str:
    """The stored part of an outcome, as JSON with one line per connection."""
    values: Mapping[str, Any] = {
        "scenario": truth.scenario,
        "family": truth.family,
        "netns": truth.netns,
    }
    told = ",".join(
        f"\n{json.dumps([*key, verdict])}" for key, verdict in sorted(truth.expected.items())
    )
    return f'{json.dumps(values)[:-1]}, "expected": [{told}]}}\n'


def checked_replay(name: str, recording: bytes, truth: Outcome) -> Printed:
    """A replay's output. Raises LabError if verdicts are wrong or the recording is truncated."""
    printed = replayed(name, recording)
    if printed.decoded()[-1]["cut_off_time"] is not None:
        raise LabError(
            f"the recording {name} is truncated",
            "the tool was killed, or the guest's disk was full",
            f"record it again: python3 -m lab golden {name}",
        )
    comparison = compare(truth, printed.decoded())
    if not comparison.agrees:
        raise LabError(
            f"the recording {name} replays to wrong verdicts",
            "; ".join(line.strip() for line in comparison_text(comparison, {}).splitlines()[1:]),
            "fix the tool, or record the scenario again",
        )
    return printed


def replayed(name: str, recording: bytes) -> Printed:
    """Replay a recording in this process. Raises LabError if the tool rejects it."""
    with tempfile.TemporaryDirectory(prefix="tcpstuck-golden-") as scratch:
        path = Path(scratch) / name
        path.write_bytes(recording)
        replay = (name, "--replay", str(path))
        with _printing_alike(columns=100):
            lines, table = _run(*replay, "--json"), _run(*replay, "-v")
        with _printing_alike(columns=80):
            return Printed(lines, table, screen=_run(*replay))


@contextlib.contextmanager
def _printing_alike(columns: int) -> Iterator[None]:
    """Make printed output independent of the caller's time zone and terminal width."""
    try:
        with patch.dict(os.environ, {"TZ": "UTC", "COLUMNS": str(columns)}):
            time.tzset()
            yield
    finally:
        time.tzset()


def _run(name: str, *words: str) -> str:
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        status = main(words)
    if status not in (EXIT_NOTHING_STUCK, EXIT_STUCK) or complained.getvalue():
        raise LabError(
            f"the recording {name} cannot be replayed",
            " ".join(complained.getvalue().split()) or f"exit status {status}",
            f"record it again: python3 -m lab golden {name}",
        )
    return said.getvalue()


def _write_printed(name: str, printed: Printed, directory: Path) -> None:
    for suffix, text in zip((LINES, TABLE, SCREEN), printed):
        kept_file(name, suffix, directory).write_text(text, encoding="utf-8")


def _missing(name: str, error: OSError) -> LabError:
    return LabError(
        f"there is no golden recording {name}",
        str(error.strerror or error),
        f"record it: python3 -m lab golden {name}",
    )
