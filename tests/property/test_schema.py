"""docs/schema: it allows every line that the tool prints, and no key that docs/json.md lacks."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.golden import RECORDINGS
from lab.golden_files import LINES, kept_file
from tcpstuck_bpf.app.playback import run_replay
from tcpstuck_bpf.doctor import render
from tcpstuck_bpf.judge.rules import VERDICT_NAMES
from tcpstuck_bpf.judge.verdict import judge
from tcpstuck_bpf.kernel.kernel_report import Change, MemberFact
from tcpstuck_bpf.kernel.layout import Member
from tcpstuck_bpf.model import Attempt
from tcpstuck_bpf.output.export import FORMAT, attempt_line, verdict_line
from tcpstuck_bpf.output.writers import JsonOutput, Selection
from tcpstuck_bpf.recording.replay import Replay
from tcpstuck_bpf.typeinfo.graph import MemberPlace
from tests.builders import at, handshake, header, identity
from tests.property.test_correlate import _watched, world_steps
from tests.property.test_foreign_text import foreign_reports, foreign_summary, names
from tests.replay.test_json_keys import IN_THE_SUMMARY, sections
from tests.replay.test_replay import recorded
from tests.unit.output.test_render import CLOCK

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "schema" / "tcpstuck.schema.json").read_text("ascii"))
DEFINITIONS = SCHEMA["$defs"]
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
Line = dict[str, Any]


def assert_valid(line: Line) -> None:
    error = jsonschema.exceptions.best_match(VALIDATOR.iter_errors(line))
    assert error is None, f"{list(error.absolute_path)}: {error.message}"


def shapes(schema: Any) -> Iterator[Mapping[str, Any]]:
    """The schema and every one within it."""
    if isinstance(schema, dict):
        yield schema
        for one in schema.values():
            yield from shapes(one)
    elif isinstance(schema, list):
        for one in schema:
            yield from shapes(one)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[Line]:
    """A run's lines, of every kind."""
    path = recorded(tmp_path_factory.mktemp("run") / "run")
    stream = io.StringIO()
    replay = Replay(str(path))
    run_replay(replay, JsonOutput(stream, replay.header.clock, Selection([], nothing=False)))
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def doctors(name: str = "name") -> list[Line]:
    """What the doctor prints, of every kind."""
    machine, kernel = foreign_reports(name)
    member = Member("a", "b", "u32", name, name)
    members = (MemberFact(member, None), MemberFact(member, MemberPlace(0, 4, 0)))
    kernel = replace(kernel, members=members)
    lines = (
        *render.machine_json(machine),
        *render.kernel_json(kernel),
        *render.change_json(kernel, kernel, [Change(name, name, name)]),
    )
    found = [json.loads(line) for line in lines]
    for line in found:
        if line["type"] == "check":
            line["level"] = "NO"
    return found


def test_it_is_a_schema_in_which_every_key_has_a_meaning() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    objects = [shape for shape in shapes(SCHEMA) if "properties" in shape]
    assert objects
    for shape in objects:
        assert shape["additionalProperties"] is False
        assert shape["required"] == [*shape["properties"]]
        for key, value in shape["properties"].items():
            told = value.get("description") or value == {"const": True}
            referred = DEFINITIONS.get(value.get("$ref", "").rpartition("/")[2], {})
            assert told or referred.get("description"), key


def test_it_is_of_this_version() -> None:
    assert DEFINITIONS["format"]["const"] == FORMAT
    assert DEFINITIONS["verdict_name"]["enum"] == [*VERDICT_NAMES]


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_golden_line_is_valid(name: str) -> None:
    lines = kept_file(name, LINES).read_text("utf-8").splitlines()
    assert lines
    for line in lines:
        assert_valid(json.loads(line))


def test_a_run_s_lines_are_valid(printed: list[Line]) -> None:
    assert {line["type"] for line in printed} == {"verdict", "rescue", "listener", "summary"}
    for line in printed:
        assert_valid(line)


def test_a_key_more_or_less_is_not(printed: list[Line]) -> None:
    for line in (*printed, *doctors()):
        assert not VALIDATOR.is_valid({**line, "surplus": 1}), line["type"]
        for key in line:
            less = copy.deepcopy(line)
            del less[key]
            assert not VALIDATOR.is_valid(less), (line["type"], key)


def test_every_kind_of_line_is_tried(printed: list[Line]) -> None:
    tried = {line["type"] for line in (*printed, *doctors())}
    kinds = {
        shape["properties"]["type"]["const"]
        for shape in shapes(SCHEMA)
        if "const" in shape.get("properties", {}).get("type", {})
    }
    # Those of --join are tried in tests/replay/test_join.py.
    assert kinds == tried | {"joined", "joined_summary"}


@given(names)
def test_names_of_strangers_are_valid(name: str) -> None:
    summary = foreign_summary(name)._replace(mode="fentry")
    stream = io.StringIO()
    JsonOutput(stream, CLOCK, Selection([], nothing=False)).summary(summary)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    attempt = Attempt(identity(handshake()), at(1), 1, f"failed: {name}")
    lines.append(json.loads(attempt_line(attempt, CLOCK)))
    for line in (*lines, *doctors(name)):
        assert_valid(line)


@given(world_steps, st.lists(st.booleans(), max_size=50), st.booleans())
def test_whatever_happens_to_a_handshake_its_lines_are_valid(
    steps: list[tuple[int, str, int] | str], lost: list[bool], tell_healthy: bool
) -> None:
    world = _watched(steps, lost, tell_healthy)
    coverage = header().coverage
    for report in world.reported:
        finding = judge(report, coverage)
        if finding is not None:
            assert_valid(json.loads(verdict_line(finding, CLOCK)))


def keys_of(definition: str) -> set[str]:
    shape = DEFINITIONS[definition]
    return {key for one in shape.get("oneOf", [shape]) for key in one["properties"]}


@pytest.mark.parametrize(
    ("heading", "definition"),
    [
        ("verdict", "verdict"),
        ("drop", "drop"),
        ("rescue", "rescue"),
        ("summary", "summary"),
        (IN_THE_SUMMARY, "rescue_totals"),
        ("reconciliation", "reconciled"),
    ],
)
def test_docs_and_schema_list_the_same_keys(heading: str, definition: str) -> None:
    documented = dict(sections((DOCS / "json.md").read_text("utf-8")))
    assert keys_of(definition) == documented[heading]


@pytest.mark.parametrize(
    ("key", "definition"), [("stuck_groups", "stuck_group"), ("coverage_gaps", "gap")]
)
def test_docs_and_schema_list_the_same_keys_within_a_key(key: str, definition: str) -> None:
    text = (DOCS / "json.md").read_text("utf-8")
    cell = re.search(rf"^\| `{key}` \| (.*) \|$", text, re.MULTILINE)
    assert cell is not None
    assert set(re.findall(r"`(\w+)`", cell[1])) - {"stuck"} == keys_of(definition)


def test_docs_and_schema_list_the_same_keys_of_a_listener() -> None:
    documented = dict(sections((DOCS / "listeners.md").read_text("utf-8")))["The keys"]
    assert keys_of("listener") == documented | {"type", "format"}


def test_docs_and_schema_list_the_same_keys_of_the_doctor() -> None:
    table = (DOCS / "json.md").read_text("utf-8").partition("## Lines of `--doctor --json`")[2]
    documented: dict[str, set[str]] = {}
    for kinds, told in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*) \|$", table, re.MULTILINE):
        keys = set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", told)))
        for kind in re.findall(r"\w+", kinds):
            documented[kind] = keys
    del documented["type"]
    assert documented.pop("counters") == documented.pop("drop_reasons") == {"indices", "values"}
    assert keys_of("counters") | keys_of("drop_reasons") == {"type", "indices", "values"}
    assert set(documented) == {
        "kernel",
        "function",
        "member",
        "check",
        "netns",
        "doctor",
        "change",
        "changes",
    }
    for kind, keys in documented.items():
        assert keys_of("namespace" if kind == "netns" else kind) == keys | {"type"}, kind
