"""One way, and testable without a kernel: who may import what."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "tcpstuck_bpf"
ROOT = Path(__file__).parents[2]
IMPORT_TIME_LIMIT_S = 60

FLOORS = (
    ("__main__",),
    ("cli",),
    ("joining",),
    ("run", "doctor"),
    ("view", "client"),
    ("preflight", "heartbeat", "narrowing", "exporter", "conversions", "interrupts"),
    ("options", "kernel", "app"),
    ("rescue", "output", "typeinfo", "analysis", "option_values", "recording_part"),
    ("host", "summary"),
    ("console", "ending", "recording", "judge", "usage"),
    ("synack", "errors", "handshake", "steps", "json_text", "wire"),
    ("model", "rulesets", "terminal", "files", "threads"),
)
"""The rooms, and the modules that are in none, top floor first. A room imports from lower floors
alone: so there is no circle, and what is below can be read without what is above."""
PURE_ROOMS = ("handshake", "judge", "recording", "output")
PURE = (
    *("analysis", "errors", "json_text", "model", "narrowing", "rulesets", "steps", "summary"),
    *("recording_part", "synack", "terminal", "usage", "wire"),
    *(f"rescue.{name}" for name in ("accept_queues", "candidate", "pace", "planner", "policy")),
    *("host.netns_numbers", "host.nftables_text", "host.ruleset_text", "host.xtables_text"),
    *(
        f"client.{name}"
        for name in ("actions", "diag", "export", "facts", "planner", "rows", "summary", "waits")
    ),
    *(f"view.{name}" for name in ("frame", "rows", "snapshot", "state")),
    *(f"conversions.{name}" for name in ("describe", "handshakes", "layout", "looks", "picture")),
    *(f"conversions.{name}" for name in ("queues", "symbols")),
    *(f"conversions.{name}" for name in ("packets", "pcapng", "stories")),
    *(f"client.{name}" for name in ("analysis", "challenge", "codecs", "recorded_sockets")),
    *(f"client.{name}" for name in ("recording", "steady", "steps", "words")),
    *(f"joining.{name}" for name in ("export", "match", "result", "sides", "words")),
)
"""Pure modules in rooms that are not, or in none."""
TOUCH_THE_KERNEL = ("kernel", "typeinfo", "host", "doctor")
# What talks to the machine: none of it is needed to judge what others have observed.
TALKS_TO_THE_MACHINE = {
    "bcc",
    "ctypes",
    "elftools",
    "fcntl",
    "mmap",
    "multiprocessing",
    "pyroute2",
    "resource",
    "select",
    "signal",
    "socket",
    "subprocess",
    "threading",
}

ONLY_SOME_RUNS_NEED = {
    # --rescue:
    *(
        f"{PACKAGE}.rescue.{name}"
        for name in ("accept_queues", "candidate", "planner", "policy", "raw_socket", "rescuer")
    ),
    # --doctor, --build and --vmlinux:
    *(f"{PACKAGE}.doctor.{name}" for name in ("command", "machine_report", "render")),
    *(f"{PACKAGE}.typeinfo.{name}" for name in ("dwarf", "vmlinux")),
    "elftools",
    # --metrics and --metrics-file:
    *(f"{PACKAGE}.exporter.{name}" for name in ("export", "exposition", "server", "textfile")),
    *(f"{PACKAGE}.output.{name}" for name in ("metric_families", "metric_listeners", "metrics")),
    "http.server",
    "prometheus_client",
    # --live:
    *(f"{PACKAGE}.view.{n}" for n in ("command", "frame", "output", "rows", "screen", "snapshot")),
    "curses",
    # --client, and --rescue with it:
    *(f"{PACKAGE}.client.{n}" for n in ("borrowed_socket", "mender", "planner", "socket_reset")),
    *(f"{PACKAGE}.client.{n}" for n in ("command", "diag", "owners", "rows", "sockets", "watch")),
    *(f"{PACKAGE}.client.{n}" for n in ("playback", "recording")),
    # --plot:
    *(f"{PACKAGE}.conversions.{name}" for name in ("command", "describe", "drawing", "picture")),
    "matplotlib",
    # --pcap:
    *(f"{PACKAGE}.conversions.{n}" for n in ("capture", "frames", "packets", "pcapng", "stories")),
    # --print-bpf:
    f"{PACKAGE}.kernel.printed_text",
    # The table at the end of a run:
    "html",
    "tabulate",
    # The compiler, which is a process of its own:
    "bcc",
    # What modules of the standard library draw in; here only conversions.frames means to:
    "importlib.resources",
    "tempfile",
    "zipfile",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name within it."""
    folder = ROOT / PACKAGE
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): path
        for path in folder.rglob("*.py")
    }


def room_of(module: str) -> str:
    """The folder a module is in; its own name where it is in none."""
    return module.partition(".")[0]


def pure_modules() -> list[str]:
    """Whatever judges, remembers or prints."""
    return sorted({*PURE, *(name for name in modules() if room_of(name) in PURE_ROOMS)})


def imports_of(path: Path) -> set[str]:
    """All that a module imports, wherever in it: full dotted names, `from` targets included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"{PACKAGE}.{base}".rstrip(".")
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def within_package(path: Path) -> set[str]:
    """The modules of the package that a module imports."""
    names = {n.partition(".")[2] for n in imports_of(path) if n.startswith(f"{PACKAGE}.")}
    return names & set(modules())


def closure(name: str) -> set[str]:
    """A module and all of the package that it pulls in."""
    reached: set[str] = set()
    waiting = {name}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting |= within_package(modules()[module]) - reached
    return reached


def test_only_the_compiler_imports_bcc_and_nobody_imports_the_compiler() -> None:
    importers = {
        name
        for name, path in modules().items()
        if any(imported.split(".")[0] == "bcc" for imported in imports_of(path))
    }
    assert importers == {"kernel.compiler"}
    assert not [
        name for name, path in modules().items() if "kernel.compiler" in within_package(path)
    ]


def test_a_room_imports_from_lower_floors_alone() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    assert set(floor) == {room_of(name) for name in modules()} - {"__init__"}
    upward = {
        (name, imported)
        for name, path in modules().items()
        for imported in within_package(path)
        if room_of(name) != room_of(imported) and floor[room_of(name)] >= floor[room_of(imported)]
    }
    assert upward == set()


def test_within_a_room_there_is_no_circle() -> None:
    order = graphlib.TopologicalSorter(
        {
            name: {other for other in within_package(path) if room_of(other) == room_of(name)}
            for name, path in modules().items()
        }
    )
    order.prepare()


@pytest.mark.parametrize("name", pure_modules())
def test_what_judges_and_prints_needs_no_machine(name: str) -> None:
    for module in closure(name):
        assert module in PURE or room_of(module) not in TOUCH_THE_KERNEL
        imported = {full.split(".")[0] for full in imports_of(modules()[module])}
        assert not imported & TALKS_TO_THE_MACHINE, f"{module}.py"


def test_a_start_imports_nothing_that_only_some_runs_need() -> None:
    """What a run without --rescue imports until the programs are attached."""
    lines = (
        "import sys",
        f"import {PACKAGE}.cli, {PACKAGE}.run, {PACKAGE}.kernel.open_source",
        "print(*sorted(sys.modules))",
    )
    child = subprocess.run(
        # Without site-packages' start-up files, which import what they like.
        [sys.executable, "-S", "-c", "\n".join(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=IMPORT_TIME_LIMIT_S,
    )
    assert (child.returncode, child.stderr) == (0, "")
    loaded = set(child.stdout.split())
    assert f"{PACKAGE}.output.render" in loaded
    assert sorted(loaded & ONLY_SOME_RUNS_NEED) == []


def test_the_client_s_side_imports_neither_bcc_nor_what_traces() -> None:
    lines = (
        "import sys",
        "sys.modules['bcc'] = None",
        f"import {PACKAGE}.cli, {PACKAGE}.client.command",
        "print(*sorted(sys.modules))",
    )
    child = subprocess.run(
        [sys.executable, "-S", "-c", "\n".join(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=IMPORT_TIME_LIMIT_S,
    )
    assert (child.returncode, child.stderr) == (0, "")
    rooms = {
        room_of(one.partition(".")[2]) for one in child.stdout.split() if one[:8] == PACKAGE[:8]
    }
    assert "client" in rooms
    assert rooms & {"kernel", "run", "typeinfo", "rescue", "analysis"} == set()


@pytest.mark.parametrize(
    "word", ["--help", "--version", "--prot", "--port=70000", "--explain", "--explain=ack-missing"]
)
def test_what_is_answered_at_once_imports_neither_a_run_nor_the_machine(word: str) -> None:
    lines = (
        "import contextlib, io, sys",
        f"from {PACKAGE}.cli import main",
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):",
        f"    main([{word!r}])",
        "print(*sorted(sys.modules))",
    )
    child = subprocess.run(
        [sys.executable, "-S", "-c", "\n".join(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=IMPORT_TIME_LIMIT_S,
    )
    assert child.returncode == 0
    loaded = set(child.stdout.split())
    assert f"{PACKAGE}.options" in loaded
    ours = {name.partition(".")[2] for name in loaded if name.startswith(f"{PACKAGE}.")}
    rooms = {room_of(name) for name in ours} - {"host", "output"}
    assert rooms & {"run", "app", "analysis", "kernel", "recording", "narrowing"} == set()
    assert {name for name in ours if name.startswith(("host.", "output."))} <= {
        "host.known_names",
        "output.explain",
    }
    machine = TALKS_TO_THE_MACHINE - {"signal"}
    assert loaded & (machine | {"hashlib", "json", "tabulate"}) == set()


def test_the_walk_sees_imports_of_every_form(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import a.b\nfrom tcpstuck_bpf import wire\nfrom .model import Row\n"
        "def f():\n    from bcc import BPF\n"
    )
    assert imports_of(path) >= {"a.b", "bcc", "tcpstuck_bpf.model", "tcpstuck_bpf.wire"}
    assert within_package(path) == {"wire", "model"}


DOORS = {
    "console.print_lines",
    "console.print_source",
    "console._write",
    "output.writers.findings",
    "output.writers.attempts",
    "output.writers.summary",
    "output.writers.status",
    "output.writers._clear",
    "output.writers._put",
    "client.output.status",
    "client.output._put",
    "recording.lines.write_line",
}
"""Where text leaves: each passes it through `terminal` or `json_text`."""
OTHER_WRITERS = {
    *("kernel.compiler", "kernel.kept_files", "files"),
    *("host.ruleset_child", "typeinfo.decompression", "exporter.server"),
    *("conversions.capture", "conversions.frames"),
    "client.option_guard",
}
"""Their bytes are for programs, or their standard error is read by the process that traces."""


WRITING = re.compile(r"print|(?!self\.recorder).*\.(write|writelines)")


def writers_of(module: str, path: Path) -> set[str]:
    """The functions in which text is printed or written."""
    return {
        f"{module}.{function.name}"
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and WRITING.fullmatch(ast.unparse(node.func))
    }


def test_text_leaves_by_few_doors() -> None:
    found = {
        writer
        for name, path in modules().items()
        if name not in OTHER_WRITERS
        for writer in writers_of(name, path)
    }
    assert found <= DOORS


@pytest.mark.parametrize("name", pure_modules())
def test_imports_work_where_bcc_cannot_be_imported(name: str) -> None:
    lines = ("import sys", "sys.modules['bcc'] = None", f"import {PACKAGE}.{name}")
    child = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=IMPORT_TIME_LIMIT_S,
    )
    assert (child.returncode, child.stderr) == (0, "")
