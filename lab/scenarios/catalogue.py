"""The scenarios: handshakes that go wrong in known ways, each with an oracle.

Every function plays one scenario from an empty topology to its end and returns its Outcome. No
scenario knows the tracer; a caller that wants one watching starts and stops it in the hook
`Settings.after`.
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
"""A cookie is refused once its minute is the last but one, at most 120 s after it was made
(MAX_SYNCOOKIE_AGE in include/net/tcp.h); some seconds more for the kernel's clock tick."""


def mariadb_stall(settings: Settings) -> Outcome:
    """A paused MariaDB, more clients than its backlog, then it goes on.

    The SYNs arrive at once: the first fill the SYN queue, the others are answered by cookies.
    The SYN-ACKs reach the clients in one batch, their ACKs fill the accept queue, and the
    kernel throws away the ACKs of the rest. After SIGCONT the server greets whom it knows.
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
    """The same without MariaDB: our own server sleeps with a backlog of 50, then goes on.

    On the wire as in `mariadb-stall`; also for IPv6, and IPv4 clients of an IPv6 listener.
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
    """A firewall drops bare ACKs: every client gets its SYN-ACK, and no bare ACK arrives.

    Every SYN is answered by a cookie. The rule is gone again when the scenario ends; the
    clients wait for a greeting from a server that is awake and knows nothing of them.
    """
    with Scene("ack-dropped", settings, syncookies=2) as scene:
        server = scene.greeter(LARGE_BACKLOG)
        server.resume()
        scene.ready()
        expected = _connect_without_acks(scene)
        return scene.done(expected, accepted=scene.accepted_by(server))


def ack_lost(settings: Settings) -> Outcome:
    """As `ack-dropped`, but no ACK gets as far as the server's host: it is lost on the way.

    The client's own rule stands for the network: the server cannot tell the one from the other.
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
    """As `ack-dropped`; then the stuck applications lose patience and close.

    Their FIN carries ACK and the sequence number after the ISN: the cookie validates, the
    server accepts a connection that its client has already left.
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
    """As `ack-dropped`; after the cookies' two minutes the stuck clients send data.

    One healthy client just before renews the listener's note of a recent overflow, so that the
    cookies are examined and found too old. The server answers each with RST.
    """
    with Scene("cookie-expired", settings, syncookies=2) as scene:
        server = scene.greeter(LARGE_BACKLOG)
        server.resume()
        scene.ready()
        expected = _connect_without_acks(scene)
        scene.stuck(expected)
        if scene.clients.reach(COOKIE_LIFE_S, ended=1):
            raise LabError(
                "a client ended before its cookie did", scene.clients.summary(), "play it again"
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
    """Thousands of connections by cookie: connect, greeting, close; nothing goes wrong.

    At most a hundred at a time, so that the accept queue never fills.
    """
    with Scene("healthy", settings, syncookies=2, watched=False) as scene:
        server = scene.greeter(LARGE_BACKLOG)
        server.resume()
        scene.ready()
        scene.connect(in_flight=HEALTHY_IN_FLIGHT, then_close=True)
        scene.clients.await_counts(LOAD_S, ended=settings.clients)
        return scene.done({}, accepted=scene.accepted_by(server))


def spoofed(settings: Settings) -> Outcome:
    """SYNs from addresses that nobody owns: the SYN-ACKs go to where nobody answers."""
    with Scene("spoofed", settings, syncookies=2) as scene:
        scene.greeter(LARGE_BACKLOG).resume()
        scene.ready()
        sent = _send_syns_from(scene, SILENT_SOURCES)
        return scene.done(dict.fromkeys(sent, "ack-missing"))


def client_reset(settings: Settings) -> Outcome:
    """SYNs from addresses that the client owns, but without a socket.

    The client's kernel knows nothing of the SYN-ACK and answers it by RST.
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
    """No SYN-ACK gets through to the clients, so they repeat their SYNs, after 1 s and 3 s.

    It ends when each client has sent three; none of them believes to be connected.
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
    """How many by default."""
    slow: bool = False
    """Takes minutes everywhere, because a kernel timer has to run out."""
    families: tuple[str, ...] = FAMILIES

    @property
    def summary(self) -> str:
        """The first line of what happens."""
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
    """Play a scenario by its name, by default with its own number of clients.

    Raises LabError where there is no such scenario, it cannot be played in that family (MariaDB
    opens its IPv6 socket for IPv6 only), or it does not go as it should.
    """
    scenario = SCENARIOS.get(name)
    if scenario is None:
        raise LabError(
            f"no scenario {name}", "it is not one of the lab's", f"one of {', '.join(SCENARIOS)}"
        )
    if family not in scenario.families:
        raise LabError(
            f"cannot play {name} in family {family}",
            "its server does not listen so",
            f"one of {', '.join(scenario.families)}",
        )
    return scenario.play(Settings(clients or scenario.clients, family, port, after))


def connect_in_one_batch(scene: Scene) -> None:
    """All clients connect, their SYNs reach the server together, and so do its answers them.

    The requests in a SYN queue that is more than half full live for 7 s (reqsk_timer_handler), and
    to open the sockets may take longer than that: so the SYNs are held until all are open.

    No SYN is repeated, however long that takes. The first ACKs make room in the SYN queue, and a
    SYN that came before its client has heard of the cookie would be taken into it: that client's
    ACK would be dropped because of its own request, not because of the accept queue.

    Raises LabError where a request has expired all the same.
    """
    clients = scene.settings.clients
    repeated = repeated_syn_rule(scene.settings.port)
    # The rule is there before anything is held back: to make one may take seconds.
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
            f"{expired} requests left the SYN queue before their clients' ACKs came",
            "this machine took more than 7 s to let the SYN-ACKs go",
            "play it again on an idler machine",
        )


def _stuck_once_all_is_quiet(scene: Scene) -> frozenset[FourTuple]:
    """Wait until the server has greeted everyone it knows; the others are stuck."""

    def quiet() -> bool:
        if not scene.server_is_idle():
            return False
        greeted = {r.four_tuple for r in scene.clients.records() if r.greeted_ns is not None}
        return greeted == scene.known_to_server()

    scene.watch.until(quiet, "the server to greet everyone it knows")
    return scene.verified_stuck()


def _connect_without_acks(scene: Scene) -> dict[FourTuple, str]:
    """All clients connect while the firewall drops their ACKs; none is known to the server."""
    with dropping(scene.topology.server, ack_rule(scene.settings.port), scene.ip_version):
        connect_in_vain(scene)
    return dict.fromkeys(scene.verified_stuck(), "ack-filtered")


def connect_in_vain(scene: Scene) -> None:
    """All clients connect, and every one's ACK is on its way to where it is dropped."""
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
