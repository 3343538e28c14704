"""What every kernel test needs: root, a kernel that allows tracing, and the tool beside a scenario.

The oracle is the clients' own record and the kernel's counters, read by the lab, never the tool.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab.guests.programs import PROGRAMS_VARIABLE, hand_over
from lab.guests.shares import COLLECTED_VARIABLE, ENDED_VARIABLE
from lab.guests.trial import tracing_refusal
from lab.network.topology import Namespace, Topology
from lab.patience import COMMAND_S, patient
from lab.processes.preloaded import start_tool
from lab.processes.servers import GREETING
from lab.records import Comparison, FourTuple, Outcome, compare
from lab.scenarios.catalogue import play
from lab.scenarios.scene import PORT, READY, Stage
from lab.scenarios.tracer import READY_PLACEHOLDER, Tracer
from tcpstuck_bpf.kernel.kept_files import cache_directory
from tests.hung_tests import HungTests

FORCE = "TCPSTUCK_FORCE_KERNEL_TESTS"
TOOL = (sys.executable, "-m", "tcpstuck_bpf", "-p", "3311", "--json")
COUNTERS = ("SyncookiesSent", "SyncookiesRecv", "SyncookiesFailed", "ListenOverflows")


class _AtOnce:
    """Writes down what happens when it happens: a guest that dies takes pytest's account along."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._ended = os.environ.get(ENDED_VARIABLE)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.getplugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write_line("")
            terminal.write_line(report.longreprtext)
        if self._ended and report.when == "teardown":
            with Path(self._ended).open("a") as ended:
                ended.write(f"{report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_AtOnce(config))
    config.pluginmanager.register(HungTests())
    Namespace.forks = True
    if compiled := os.environ.get(PROGRAMS_VARIABLE):
        hand_over(Path(compiled), cache_directory())


def _mode_of_shared_tracer(item: pytest.Item) -> str:
    """Empty for a test that does not use it."""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("session_tracer", "")) if callspec else ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests of the same shared tracer follow one another, after all that use none.

    So it starts once, and runs beside no test that has a tracer of its own or counts probes. A test
    that leaves thousands of clients to it comes last: each sweep reads them all. Otherwise the
    order stays as it is: by chance.
    """

    def order(item: pytest.Item) -> tuple[str, bool]:
        return _mode_of_shared_tracer(item), item.get_closest_marker("leaves_many") is not None

    items.sort(key=order)


def _sharing(item: pytest.Item) -> str:
    """A name for what a test shares with others and takes long to set up; its own if nothing."""
    if mode := _mode_of_shared_tracer(item):
        return f"tracer by {mode}"
    # No public attribute has it.
    fixtures: Any = getattr(item, "_fixtureinfo")  # noqa: B009
    definitions = fixtures.name2fixturedefs.values()
    if any(one[-1].scope == "module" for one in definitions):
        return item.nodeid.partition("::")[0]
    return item.nodeid


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tell the lab, where it asks, which tests there are and what they share."""
    if wanted := os.environ.get(COLLECTED_VARIABLE):
        collected = {item.nodeid: _sharing(item) for item in session.items}
        Path(wanted).write_text(json.dumps(collected))


@pytest.fixture(scope="session", autouse=True)
def _kernel_allows_tracing() -> None:
    refusal = tracing_refusal()
    if refusal is not None and os.environ.get(FORCE):
        pytest.fail(f"{FORCE} is set, and this kernel does not let us trace: {refusal}")
    if refusal is not None:
        pytest.skip(f"this kernel does not let us trace: {refusal}")


@dataclass(frozen=True)
class Traced:
    """A scenario, what the tool said of it, and the two compared."""

    outcome: Outcome
    comparison: Comparison
    verdicts: list[dict[str, Any]]
    listeners: list[dict[str, Any]]
    summary: dict[str, Any]
    exit_status: int | None

    def reconciled(self) -> dict[str, tuple[int, Any, bool]]:
        """Traced and kernel figure of each counter, by the tool, for the server's namespace."""
        return {
            row["counter"]: (row["traced"] + row["outside_filter"], row["kernel"], row["agrees"])
            for row in self.summary["reconciliation"]
            if row["netns"] == self.outcome.netns
        }

    def assert_reconciled(self) -> None:
        """The tool's figures equal the movement that the lab itself read of each counter."""
        found = self.reconciled()
        moved = {name: self.outcome.moved(name) for name in COUNTERS}
        expected = {name: (count, count, True) for name, count in moved.items() if count}
        assert found == expected


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Whatever uses the session's tracer does so in both modes.

    By kprobe only with the slow tests where what is tested does not depend on the mode.
    """
    if "session_tracer" in metafunc.fixturenames:
        marks = [pytest.mark.slow] if "either_tracer" in metafunc.fixturenames else []
        modes = ["fentry", pytest.param("kprobe", marks=marks)]
        metafunc.parametrize("session_tracer", modes, indirect=True, scope="session")


@pytest.fixture(scope="session")
def session_tracer(request: pytest.FixtureRequest) -> Iterator[Tracer]:
    """One run of the tool in a mode, for all tests that need no other options."""
    words = [*TOOL, "--probe-mode", request.param, "--ready-file", READY_PLACEHOLDER]
    with Tracer(words, start_tool) as tracer:
        tracer.start()
        yield tracer
        tracer.stop()


@pytest.fixture
def shared_tracer(session_tracer: Tracer) -> Tracer:
    """One run of the tool per mode, beside many scenarios: starting it is what takes long.

    Each scenario has its own network namespaces, by which its verdicts are told apart, also those
    that come after its end (`namespace-gone`).
    """
    assert session_tracer.running, "the tool that the tests share has ended"
    session_tracer.forget_lines()
    return session_tracer


@pytest.fixture
def either_tracer(shared_tracer: Tracer) -> Tracer:
    """The same, where the program that is tested does not depend on the mode."""
    return shared_tracer


@pytest.fixture
def compared(shared_tracer: Tracer) -> Callable[..., tuple[Outcome, Comparison]]:
    """Play a scenario beside the shared tracer; the outcome, and what the tool said compared."""

    def run(name: str, clients: int, family: str = "4") -> tuple[Outcome, Comparison]:
        def hook(stage: Stage) -> None:
            if stage.name != READY:
                shared_tracer.await_reported(stage.expected, stage.netns)

        outcome = play(name, clients=clients, family=family, after=hook)
        return outcome, compare(outcome, shared_tracer.lines)

    return run


@pytest.fixture
def traced() -> Callable[..., Traced]:
    """Play a scenario beside the tool, with these options besides -p and --json."""

    def run(name: str, *options: str, clients: int | None = None, family: str = "4") -> Traced:
        words = [*TOOL, *options, "--ready-file", READY_PLACEHOLDER]
        with Tracer(words, start_tool) as tracer:
            outcome = play(name, clients=clients, family=family, after=tracer.after)
        lines = [dict(line) for line in tracer.lines]
        verdicts = [line for line in lines if line["type"] == "verdict"]
        listeners = [line for line in lines if line["type"] == "listener"]
        (summary,) = (line for line in lines if line["type"] == "summary")
        compared = compare(outcome, lines)
        return Traced(outcome, compared, verdicts, listeners, summary, tracer.exit_status)

    return run


@contextlib.contextmanager
def listening(server: Namespace, *ports: int) -> Iterator[tuple[socket.socket, ...]]:
    """Listeners in a namespace, for every address of both families; port 3311 if none is named.

    Nobody accepts by itself: who wants a connection served calls `be_greeted`.
    """

    def listen(port: int) -> socket.socket:
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)

    with contextlib.ExitStack() as opened:
        listeners = [opened.enter_context(server.run(listen, port)) for port in ports or (PORT,)]
        for listener in listeners:
            listener.settimeout(patient(COMMAND_S))
        yield tuple(listeners)


def be_greeted(
    topology: Topology, listener: socket.socket, server_ip: str, client_port: int = 0
) -> FourTuple:
    """A real client connects, is accepted and reads the greeting; both ends close."""
    limit_s = patient(COMMAND_S)
    port = int(listener.getsockname()[1])
    client = topology.client.run(
        socket.create_connection, (server_ip, port), limit_s, source_address=("", client_port)
    )
    with client, listener.accept()[0] as served:
        served.sendall(GREETING)
        assert client.recv(len(GREETING), socket.MSG_WAITALL) == GREETING
        client_ip, client_port = client.getsockname()[:2]
    return FourTuple(client_ip, client_port, server_ip, port)


@contextlib.contextmanager
def tracing(*runs: Sequence[str]) -> Iterator[tuple[Tracer, ...]]:
    """The tool, once for each list of options and all at the same time; each is ready."""
    words = (sys.executable, "-m", "tcpstuck_bpf", "--json", "--ready-file", READY_PLACEHOLDER)
    with contextlib.ExitStack() as opened, ThreadPoolExecutor() as threads:
        tracers = tuple(
            opened.enter_context(Tracer([*words, *options], start_tool)) for options in runs
        )
        list(threads.map(Tracer.start, tracers))
        yield tracers


def summary_of(tracer: Tracer) -> dict[str, Any]:
    """The summary with which a tracer ended."""
    (summary,) = (dict(line) for line in tracer.lines if line["type"] == "summary")
    return summary


def told_by(tracer: Tracer, netns: int | None = None) -> list[tuple[int, FourTuple, str]]:
    """Every verdict a tracer told, in order: namespace, 4-tuple and verdict."""
    return [
        (
            line["netns"],
            FourTuple(
                line["client_ip"], line["client_port"], line["server_ip"], line["server_port"]
            ),
            line["verdict"],
        )
        for line in tracer.lines
        if line["type"] == "verdict" and netns in (None, line["netns"])
    ]
