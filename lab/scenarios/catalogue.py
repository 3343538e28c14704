"""The scenarios: handshakes that fail in known ways, each with an oracle.

Each function plays one scenario from an empty topology to the end, and returns an Outcome. The
scenarios do not know the tracer; a caller starts and stops a tracer in the hook `Settings.after`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lab.errors import LabError
from lab.network.faults import ack_rule, dropping, held_back, repeated_syn_rule, synack_rule
from lab.network.syns import send_syns
from lab.network.topology import LOCAL_SOURCES, SILENT_SOURCES
from lab.patience import LOAD_S
from lab.processes.clients import WAITING
from lab.processes.servers import MariaDb
from lab.records import FourTuple, Outcome
from lab.scenarios.scene import FAMILIES, PORT, Scene, Settings, Stage, go_on

SMALL_BACKLOG = 50
LARGE_BACKLOG = 4096
HEALTHY_IN_FLIGHT = 100
SYNS_PER_CLIENT = 3
COOKIE_LIFE_S = 125.0
"""The kernel rejects a cookie whose age is two ticks of the minute counter, at most 120 s after
its creation (MAX_SYNCOOKIE_AGE in include/net/tcp.h). A few seconds allow for the kernel's clock
tick."""


def mariadb_stall(settings: Settings) -> Outcome:
    """More clients than its backlog connect to a paused MariaDB, then MariaDB resumes.

    The SYNs arrive at once. The first SYNs fill the SYN queue; the kernel answers the others with
    cookies. The SYN-ACKs reach the clients in one batch. The first ACKs fill the accept queue; the
    kernel drops the other ACKs. After SIGCONT the server greets the connections that it has.
    """
    with (
        Scene("mariadb-stall", settings, syncookies=1) as scene,
        MariaDb(
            scene.topology.server, scene.listen_ip, settings.port, backlog=SMALL_BACKLOG
        ) as server,
    ):
        server.pause()
        scene.ready()
        connect_in_one_batch(scene)
        server.resume()
        stuck = _stuck_once_all_is_quiet(scene)
        return scene.done(
            dict.fromkeys(stuck, "accept-queue-full"),
            accepted=dict.fromkeys(scene.known_to_server()),
        )


def overflow(settings: Settings) -> Outcome:
    """As `mariadb-stall`, but with the lab's own server, which is paused with a backlog of 50.

    The packets are those of `mariadb-stall`. The scenario also runs with IPv6, and with IPv4
    clients of an IPv6 listener.
    """
    with Scene("overflow", settings, syncookies=1) as scene:
        server = scene.greeter(SMALL_BACKLOG)
        scene.ready()
        connect_in_one_batch(scene)
        server.resume()
        stuck = _stuck_once_all_is_quiet(scene)
        return scene.done(
            dict.fromkeys(stuck, "accept-queue-full"), accepted=scene.accepted_by(server)
        )


def ack_dropped(settings: Settings) -> Outcome:
    """A firewall drops bare ACKs: each client gets its SYN-ACK, but no bare ACK arrives.

    The kernel answers every SYN with a cookie. The rule is removed before the scenario ends. The
    clients wait for a greeting from a running server that has no record of them.
    """
    with Scene("ack-dropped", settings, syncookies=2) as scene:
        server = scene.greeter(LARGE_BACKLOG)
        server.resume()
        scene.ready()
        expected = _connect_without_acks(scene)
        return scene.done(expected, accepted=scene.accepted_by(server))


def ack_lost(settings: Settings) -> Outcome:
    """As `ack-dropped`, but the ACKs are lost before they reach the server's host.

    A firewall rule at the client stands in for the network; the server cannot see the difference.
    """
    with Scene("ack-lost", settings, syncookies=2) as scene:
        server = scene.greeter(LARGE_BACKLOG)
        server.resume()
        scene.ready()
        rule = ack_rule(settings.port)
        with dropping(scene.topology.client, rule, scene.ip_version, "OUTPUT"):
            scene.connect()
            scene.clients.await_counts(settled=settings.clients)
            expected = dict.fromkeys(scene.verified_stuck(), "ack-missing")
        return scene.done(expected, accepted=scene.accepted_by(server))


def late_fin(settings: Settings) -> Outcome:
    """As `ack-dropped`; then the stuck clients give up and close.

    Their FIN carries ACK and the sequence number after the ISN, so the cookie is valid. The server
    accepts a connection that its client has already closed.
    """
    with Scene("late-fin", settings, syncookies=2) as scene:
        server = scene.greeter(LARGE_BACKLOG)
        server.resume()
        scene.ready()
        expected = _connect_without_acks(scene)
        scene.stuck(expected)
        scene.clients.close_sockets(WAITING)
        server.await_accepted(settings.clients)
        accepted = scene.accepted_by(server)
        return scene.done(dict.fromkeys(accepted, "recovered"), accepted=accepted)


def cookie_expired(settings: Settings) -> Outcome:
    """As `ack-dropped`; after the cookies expire (two minutes), the stuck clients send data.

    A healthy client connects just before and renews the listener's timestamp of the last overflow.
    The kernel therefore checks the cookies and finds them too old. The server answers each stuck
    client with RST.
    """
    with Scene("cookie-expired", settings, syncookies=2) as scene:
        server = scene.greeter(LARGE_BACKLOG)
        server.resume()
        scene.ready()
        expected = _connect_without_acks(scene)
        scene.stuck(expected)
        if scene.clients.reach(COOKIE_LIFE_S, ended=1):
            raise LabError(
                "a client ended before its cookie expired", scene.clients.summary(), "play it again"
            )
        scene.clients.connect(1, scene.server_ip, settings.port)
        scene.clients.await_counts(greeted=1)
        scene.clients.send(b"anyone there?\n", WAITING)
        scene.clients.await_counts(ended=settings.clients)
        reset = [r.four_tuple for r in scene.clients.records() if r.error == "ECONNRESET"]
        return scene.done(
            dict.fromkeys(reset, "cookie-rejected"), accepted=scene.accepted_by(server)
        )


def healthy(settings: Settings) -> Outcome:
    """Thousands of clients connect by cookie, get the greeting and close; none fails.

    At most a hundred clients are active at a time, so that the accept queue never fills.
    """
    with Scene("healthy", settings, syncookies=2, watched=False) as scene:
        server = scene.greeter(LARGE_BACKLOG)
        server.resume()
        scene.ready()
        scene.connect(in_flight=HEALTHY_IN_FLIGHT, then_close=True)
        scene.clients.await_counts(LOAD_S, ended=settings.clients)
        return scene.done({}, accepted=scene.accepted_by(server))


def spoofed(settings: Settings) -> Outcome:
    """SYNs come from addresses that no host owns, so no SYN-ACK gets an answer."""
    with Scene("spoofed", settings, syncookies=2) as scene:
        scene.greeter(LARGE_BACKLOG).resume()
        scene.ready()
        sent = _send_syns_from(scene, SILENT_SOURCES)
        return scene.done(dict.fromkeys(sent, "ack-missing"))


def client_reset(settings: Settings) -> Outcome:
    """SYNs come from addresses that the client owns, but without a socket.

    The client's kernel has no socket for the SYN-ACK and answers with RST.
    """
    with Scene("client-reset", settings, syncookies=2) as scene:
        scene.greeter(LARGE_BACKLOG).resume()
        scene.ready()
        sent = _send_syns_from(scene, LOCAL_SOURCES)
        scene.watch.until(
            lambda: scene.watch.count(lambda record: record.client_resets > 0) == len(sent),
            "an RST for every SYN-ACK",
        )
        return scene.done(dict.fromkeys(sent, "client-reset"))


def synack_dropped(settings: Settings) -> Outcome:
    """No SYN-ACK reaches the clients, so they retransmit their SYNs after 1 s and 3 s.

    The scenario ends when each client has sent three SYNs; no client is connected by then.
    """
    with Scene("synack-dropped", settings, syncookies=2) as scene:
        scene.greeter(LARGE_BACKLOG).resume()
        scene.ready()
        with dropping(scene.topology.client, synack_rule(settings.port), scene.ip_version):
            scene.connect()
            scene.watch.until(
                lambda: (
                    scene.watch.count(lambda record: record.syns >= SYNS_PER_CLIENT)
                    == settings.clients
                ),
                f"{SYNS_PER_CLIENT} SYNs of each client",
            )
            return scene.done(dict.fromkeys(scene.watch.records, "synack-missing"))


@dataclass(frozen=True)
class Scenario:
    """A scenario by its name on the command line."""

    play: Callable[[Settings], Outcome]
    clients: int
    """Default number of clients or SYNs."""
    slow: bool = False
    """Whether the scenario takes minutes on any machine, because it waits for a kernel timer."""
    families: tuple[str, ...] = FAMILIES

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.play.__doc__ or "").strip().splitlines()[0]


SCENARIOS: Mapping[str, Scenario] = {
    "mariadb-stall": Scenario(mariadb_stall, 200, families=("4", "6")),
    "overflow": Scenario(overflow, 200),
    "ack-dropped": Scenario(ack_dropped, 50),
    "ack-lost": Scenario(ack_lost, 50),
    "late-fin": Scenario(late_fin, 50),
    "healthy": Scenario(healthy, 5000),
    "spoofed": Scenario(spoofed, 1000),
    "client-reset": Scenario(client_reset, 200),
    "synack-dropped": Scenario(synack_dropped, 50),
    "cookie-expired": Scenario(cookie_expired, 20, slow=True),
}


def play(
    name: str,
    *,
    clients: int | None = None,
    family: str = "4",
    port: int = PORT,
    after: Callable[[Stage], None] = go_on,
) -> Outcome:
    """Play a scenario by name; `clients` defaults to the scenario's own number.

    Raises LabError if there is no such scenario, if the scenario cannot use that family (MariaDB
    opens its IPv6 socket for IPv6 only), or if the scenario fails.
    """
    scenario = SCENARIOS.get(name)
    if scenario is None:
        raise LabError(
            f"no scenario {name}", "the name is unknown", f"use one of {', '.join(SCENARIOS)}"
        )
    if family not in scenario.families:
        raise LabError(
            f"cannot play {name} in family {family}",
            "its server does not listen in that family",
            f"use one of {', '.join(scenario.families)}",
        )
    return scenario.play(Settings(clients or scenario.clients, family, port, after))


def connect_in_one_batch(scene: Scene) -> None:
    """Connect all clients, with all SYNs in one batch and all answers in another.

    Requests in a SYN queue that is more than half full live for 7 s (reqsk_timer_handler). Opening
    all sockets may take longer, so the SYNs are held until all sockets are open.

    A rule drops SYN retransmissions. The first ACKs free slots in the SYN queue. If a client
    retransmitted its SYN before its cookie arrived, the kernel would put the SYN into the queue.
    The client's ACK would then be dropped because of that request, not because of the accept queue.

    Raises LabError if a request expires nevertheless.
    """
    clients = scene.settings.clients
    repeated = repeated_syn_rule(scene.settings.port)
    # Add the rule before packets are held back, because adding a rule may take seconds.
    with dropping(scene.topology.client, repeated, scene.ip_version, "OUTPUT"):
        with held_back(scene.topology.server):
            with held_back(scene.topology.client):
                scene.connect()
                scene.clients.await_counts(opened=clients)
            scene.watch.until(
                lambda: len(scene.watch.records) == clients and scene.syns_answered() >= clients,
                "an answer to every SYN",
            )
        scene.clients.await_counts(settled=clients)
    if expired := scene.moved("SyncookiesFailed"):
        raise LabError(
            f"{expired} requests left the SYN queue before their clients' ACKs arrived",
            "this machine took more than 7 s to release the SYN-ACKs",
            "play the scenario again on a less busy machine",
        )


def _stuck_once_all_is_quiet(scene: Scene) -> frozenset[FourTuple]:
    """Wait until the server has greeted all its connections; the other clients are stuck."""

    def quiet() -> bool:
        if not scene.server_is_idle():
            return False
        greeted = {r.four_tuple for r in scene.clients.records() if r.greeted_ns is not None}
        return greeted == scene.known_to_server()

    scene.watch.until(quiet, "the server to greet all its connections")
    return scene.verified_stuck()


def _connect_without_acks(scene: Scene) -> dict[FourTuple, str]:
    """Connect all clients while the firewall drops their ACKs; the server has no record of any."""
    with dropping(scene.topology.server, ack_rule(scene.settings.port), scene.ip_version):
        connect_in_vain(scene)
    return dict.fromkeys(scene.verified_stuck(), "ack-filtered")


def connect_in_vain(scene: Scene) -> None:
    """Connect all clients and wait until each has sent the ACK that will be dropped."""
    clients = scene.settings.clients
    scene.connect()
    scene.clients.await_counts(settled=clients)
    scene.watch.until(
        lambda: scene.watch.count(lambda record: record.acks > 0) == clients,
        "the ACK of each client",
    )


def _send_syns_from(scene: Scene, prefixes: Mapping[int, str]) -> set[FourTuple]:
    return send_syns(
        scene.topology.client,
        scene.watch,
        prefixes[scene.ip_version],
        scene.server_ip,
        scene.settings.port,
        scene.settings.clients,
    )
