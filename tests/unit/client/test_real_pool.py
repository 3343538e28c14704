"""A real connection pool that hangs on a real MariaDB, and is healed from its own host.

All of the pool's connections hang at once, by the firewall rule of Evan Jones, A TCP "stuck"
connection mystery (2011). The oracle: the answers of the database, and `ss` at both ends. Needs
root, mariadbd, SQLAlchemy and PyMySQL.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lab.network.faults import ack_rule, dropping
from lab.network.topology import SERVER_ADDRESS, Topology
from lab.patience import SETTLE_S, Deadline
from lab.processes.servers import MARIADB_BINARY, MariaDb
from tests.unit.client.pool_process import Pool
from tests.unit.client.test_native import known_to_the_server, told, topology
from tests.unit.client.test_rescue_native import of_type, started

__all__ = ["topology"]

SIZE, PORT = 50, 3306


def ports_of_the_pool(topology: Topology) -> set[tuple[str, int]]:
    """The pool's ends of its connections, as `ss` lists them."""
    rows = topology.client.sockets("established", "dport", "=", f":{PORT}")
    return {(row.local_ip, row.local_port) for row in rows}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stamps", ["1", "0"], ids=["timestamps", "plain"])
def test_a_pool_that_hangs_is_healed_and_every_connection_works(
    topology: Topology, stamps: str
) -> None:
    for name in ("sqlalchemy", "pymysql"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    if not Path(MARIADB_BINARY).exists():
        pytest.skip("MariaDB is not installed")
    topology.client.pin({"net/ipv4/tcp_timestamps": stamps})
    address = SERVER_ADDRESS[4]
    with (
        MariaDb(topology.server, address, PORT, backlog=SIZE),
        Pool(topology.client, address, PORT, SIZE) as pool,
    ):
        with dropping(topology.server, ack_rule(PORT), 4):
            pool.use()
            deadline = Deadline(SETTLE_S)
            while len(hung := ports_of_the_pool(topology)) < SIZE:
                assert not deadline.passed()
            assert known_to_the_server(topology, PORT) == set()
        with started(topology, PORT, "--rescue") as tracer:
            tracer.start()
            first = pool.answers(SETTLE_S)
            assert tracer.await_lines(3 * SIZE)
            tracer.stop()
        assert known_to_the_server(topology, PORT) == ports_of_the_pool(topology) == hung
        pool.use()
        second = pool.answers(SETTLE_S)
        assert known_to_the_server(topology, PORT) == ports_of_the_pool(topology) == hung
    for answers in (first, second):
        assert [one.product for one in answers] == [3 * number for number in range(SIZE)]
    numbers = {one.connection for one in first}
    assert len(numbers) == SIZE
    assert {one.connection for one in second} == numbers
    assert {who[:2] for who in told(tracer.lines)} == hung
    assert all(each == ["greeting-missing", "rescued"] for each in told(tracer.lines).values())
    (summary,) = of_type(tracer.lines, "summary")
    assert (summary["verdicts"], summary["stuck"]) == ({"rescued": SIZE}, 0)
