"""The drawing: a valid file, the same bytes each time, and whatever strangers call themselves."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings

from lab.golden import RECORDINGS
from lab.golden_files import kept_recording, kept_truth
from tcpstuck_bpf.cli import main
from tcpstuck_bpf.conversions.picture import FLOOD, MOST_LANES, Count, MarkKind, Picture
from tcpstuck_bpf.errors import EXIT_NOTHING_STUCK, EXIT_STUCK
from tcpstuck_bpf.judge.rules import RULES
from tcpstuck_bpf.model import address_bytes
from tcpstuck_bpf.output.page import endpoint
from tcpstuck_bpf.recording.replay import Replay
from tcpstuck_bpf.terminal import printable
from tests.builders import four_tuple
from tests.exported import needs_matplotlib
from tests.property.test_foreign_text import names
from tests.unit.conversions.scene import Scene, crowd, picture_of
from tests.unit.judge.test_listener import overflown

SVG = "{http://www.w3.org/2000/svg}"
LIMIT_S = 100
HOSTILE = (
    "$x_1$ and $$",
    r"\frac{a}{b} \$5 $",
    r"a\n$\alpha$b",
    "\x1b[2J\x07",
    "\U0001f600 \u4e2d\u6587 <&\"'>]]>",
    "\ud800\udcff\ufffe\x00",
    "_nolegend_",
    "x" * 3000,
    "%s %(a)s {0}",
)


@pytest.fixture(autouse=True)
def _library() -> None:
    needs_matplotlib()


def drawn(picture: Picture, form: str = "svg") -> bytes:
    from tcpstuck_bpf.conversions.drawing import drawn as draw

    return draw(picture, form)


def texts(svg: bytes) -> list[str]:
    """The texts of an SVG file, which must be valid XML."""
    root = ElementTree.fromstring(svg)
    return ["".join(one.itertext()) for one in root.iter(f"{SVG}text")]


def plotted(path: Path, target: Path, *words: str) -> bytes:
    """What the command draws. It prints as without --plot, and complains of nothing."""
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        status = main(["--replay", str(path), "--json", "--plot", str(target), *words])
    assert status in (EXIT_NOTHING_STUCK, EXIT_STUCK)
    assert complained.getvalue() == ""
    with contextlib.redirect_stdout(io.StringIO()) as without:
        main(["--replay", str(path), "--json", *words])
    assert said.getvalue() == without.getvalue()
    return target.read_bytes()


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_golden_recording_is_drawn_and_shows_what_the_oracle_saw(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    path.write_bytes(kept_recording(name))
    replay = Replay(str(path))
    picture = picture_of(replay.header, replay.steps())
    truth = kept_truth(name).expected
    expected = {endpoint(who.client_ip, who.client_port): verdict for who, verdict in truth.items()}
    last = {lane.label: lane.verdicts[-1].verdict for lane in picture.lanes}
    assert last == expected
    shown = texts(plotted(path, tmp_path / "run.svg"))
    for verdict, number in Counter(expected.values()).items():
        assert f"{verdict}: {number}" in shown
    assert set(expected) <= set(shown)
    assert "time since the first SYN (s)" in shown
    assert picture.subtitle[0] in shown


def test_all_verdicts_and_packets_have_their_words() -> None:
    picture = crowd(12).picture()
    every = (*(rule.name for rule in RULES), FLOOD, "")
    counts = tuple(Count(name, n + 2, 1, n % 2, stuck=bool(n % 3)) for n, name in enumerate(every))
    lane = picture.lanes[0]
    marks = tuple(lane.marks[0]._replace(kind=kind) for kind in MarkKind)
    verdicts = tuple(lane.verdicts[0]._replace(verdict=name) for name in every[:-1])
    lanes = (lane._replace(marks=marks, verdicts=verdicts), *picture.lanes[1:])
    shown = texts(drawn(picture._replace(counts=counts, lanes=lanes)))
    for name in every[:-1]:
        assert [text for text in shown if text.startswith(f"{name}: ")]
    assert [text for text in shown if text.startswith("no verdict yet: ")]
    assert {kind.value for kind in MarkKind} <= set(shown)
    assert "accept-queue-full: 7, at the end 1" in shown
    assert [text for text in shown if text.endswith("none drawn")]


@pytest.mark.parametrize("number", [0, 1, 20, 41, 500])
@pytest.mark.parametrize("form", ["svg", "png", "pdf"])
def test_the_same_picture_gives_the_same_bytes(number: int, form: str) -> None:
    scene = crowd(number) if number else Scene()
    if not number:
        scene.end(3)
    picture = scene.picture()
    first = drawn(picture, form)
    assert first == drawn(picture, form)
    begin = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[form]
    assert first.startswith(begin)
    assert len(first) < 2_000_000


ELSEWHERE = """
import sys
from tcpstuck_bpf.cli import main
status = main(sys.argv[1:])
assert "matplotlib.pyplot" not in sys.modules
sys.exit(status)
"""


def test_who_draws_makes_no_difference(tmp_path: Path) -> None:
    """Neither zone, hash seed, locale, display, home nor a matplotlibrc matters."""
    path = crowd(60).record(tmp_path / "run")
    here = plotted(path, tmp_path / "here.svg")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\nbackend: TkAgg\n")
    beside = {
        "TZ": "Pacific/Kiritimati",
        "PYTHONHASHSEED": "1",
        "LC_ALL": "C",
        "DISPLAY": "nowhere:7",
        "HOME": "/nonexistent",
        "MPLBACKEND": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    words = ["--replay", str(path), "--json", "--plot", "there.svg"]
    again = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *words],
        cwd=tmp_path,
        env={**os.environ, **beside},
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (again.returncode, again.stderr) == (EXIT_STUCK, b"")
    assert (tmp_path / "there.svg").read_bytes() == here


def named(name: str) -> Picture:
    """A picture in which all that strangers can name has this name."""
    scene = Scene(netns_names={four_tuple().netns: name}, watched=name)
    scene.play(1, "syn", 0)
    scene.listener(overflown(), name)
    scene.look(6)
    scene.end(7)
    picture = scene.picture()
    lane = picture.lanes[0]._replace(label=printable(name))
    return picture._replace(lanes=(lane,), caption=(*picture.caption, printable(name)))


@pytest.mark.parametrize("name", HOSTILE)
def test_foreign_names_are_shown_as_they_are(name: str) -> None:
    picture = named(name)
    for form in ("svg", "png", "pdf"):
        assert drawn(picture, form)
    shown = " ".join(texts(drawn(picture)))
    if len(name) < 50:
        assert " ".join(printable(name).split()) in shown


@settings(max_examples=8, deadline=None)
@given(names)
def test_no_foreign_name_breaks_the_picture(name: str) -> None:
    shown = texts(drawn(named(name)))
    assert all(text.isprintable() for text in shown)


def test_an_address_of_many_letters_has_room_beside_the_axes() -> None:
    picture = crowd(3).picture()
    longest = "2001:db8:1111:2222:3333:4444:5555:6666"
    assert address_bytes(longest)
    lanes = tuple(lane._replace(label=f"[{longest}]:65535") for lane in picture.lanes)
    wide, narrow = drawn(picture._replace(lanes=lanes)), drawn(picture)
    assert f"[{longest}]:65535" in texts(wide)
    assert wide != narrow


def test_the_largest_picture_stays_small() -> None:
    lanes = crowd(50).picture().lanes
    many = tuple(lanes[number % 50] for number in range(MOST_LANES))
    svg = drawn(crowd(50).picture()._replace(lanes=many))
    assert len(svg) < 4_000_000
    assert "10.0.0.1:40000" not in texts(svg)


def test_the_file_is_its_owner_s_and_replaces_an_older_one(tmp_path: Path) -> None:
    path, target = crowd(4).record(tmp_path / "run"), tmp_path / "run.PNG"
    target.write_text("older")
    assert plotted(path, target).startswith(b"\x89PNG")
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["run", "run.PNG"]  # noqa: PTH208
