"""One way, and testable without a kernel: who may import what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "tcpstuck_bpf"
ROOT = Path(__file__).parents[2]
IMPORT_TIME_LIMIT_S = 60

PURE = (
    "handshake.correlate",
    "judge.verdict",
    "output.render",
    "output.export",
    "wire",
    "model",
    "errors",
    "json_text",
    "terminal",
    "recording.replay",
    "output.explain",
    "handshake.flood",
    "rescue.planner",
    "synack",
    "judge.backlog_knobs",
    "judge.backlog",
    "judge.backlog_history",
    "host.ruleset_text",
)
OF_THE_KERNEL_SIDE = {
    "typeinfo.btf",
    "doctor.machine_report",
    "typeinfo.dwarf",
    "kernel.features",
    "doctor.kernel_report",
    "typeinfo.graph",
    "kernel.layout",
    "host.netfilter_hooks",
    "kernel.probes",
    "host.ruleset_child",
    "host.ruleset_reader",
    "kernel.softirqs",
    "kernel.source",
    "typeinfo.unpacking",
    "typeinfo.vmlinux",
}
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
        f"{PACKAGE}.{name}"
        for name in (
            "rescue.turns",
            "rescue.candidate",
            "rescue.planner",
            "rescue.policy",
            "rescue.rescuer",
            "rescue.raw_socket",
        )
    ),
    # --doctor, --build and --vmlinux:
    *(
        f"{PACKAGE}.{name}"
        for name in (
            "doctor.command",
            "doctor.machine_report",
            "typeinfo.dwarf",
            "typeinfo.vmlinux",
        )
    ),
    "elftools",
    # The table at the end of a run:
    "html",
    "tabulate",
    # The compiler, which is a process of its own:
    "bcc",
    # What modules of the standard library draw in, and nobody here means to:
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


@pytest.mark.parametrize("name", PURE)
def test_what_judges_and_prints_needs_no_machine(name: str) -> None:
    for module in closure(name):
        assert module not in OF_THE_KERNEL_SIDE
        assert not module.startswith("kernel.")
        imported = {full.split(".")[0] for full in imports_of(modules()[module])}
        assert not imported & TALKS_TO_THE_MACHINE, f"{module}.py"


def test_a_start_imports_nothing_that_only_some_runs_need() -> None:
    """What a run without --rescue imports until the programs are attached."""
    lines = (
        "import sys",
        f"import {PACKAGE}.cli, {PACKAGE}.kernel.source",
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


def test_the_walk_sees_imports_of_every_form(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import a.b\nfrom tcpstuck_bpf import wire\nfrom .model import Row\n"
        "def f():\n    from bcc import BPF\n"
    )
    assert imports_of(path) >= {"a.b", "bcc", "tcpstuck_bpf.model", "tcpstuck_bpf.wire"}
    assert within_package(path) == {"wire", "model"}


DOORS = {
    "cli._print",
    "cli._complain",
    "options.error",
    "output.writers.findings",
    "output.writers.attempts",
    "output.writers.summary",
    "output.writers.status",
    "output.writers._clear",
    "output.writers._put",
    "recording.replay._write_line",
}
"""Where text leaves: each passes it through `terminal` or `json_text`."""
OTHER_WRITERS = {
    "kernel.compiler",
    "kernel.kept_files",
    "files",
    "host.ruleset_child",
    "typeinfo.unpacking",
}
"""Their bytes are for programs, or their standard error is read by the process that traces."""


WRITING = re.compile(r"print|(?!self\.recorder).*\.(print_usage|write|writelines)")


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


def test_the_data_flows_one_way() -> None:
    """No earlier stage knows a later one."""
    for early, later in (
        ("handshake.correlate", "judge.verdict"),
        ("judge.verdict", "output.render"),
        ("wire", "handshake.correlate"),
    ):
        assert later not in closure(early)


@pytest.mark.parametrize("name", PURE)
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
