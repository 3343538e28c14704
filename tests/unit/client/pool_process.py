"""An application with a pool of connections to a MariaDB: SQLAlchemy's QueuePool, with PyMySQL.

`Pool` starts it in a namespace. Each use of the pool takes all its connections at once, as an
application does under load. No time-out bounds a read, which is PyMySQL's default.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from lab.patience import START_S, patient
from lab.processes.child import Child, End, Failure, channel_of_child


class Open(NamedTuple):
    """Make the pool; no connection is opened yet."""

    address: str
    port: int
    size: int


class Use(NamedTuple):
    """Begin to take every connection, each in a thread, and to run a query on it."""


class Answers(NamedTuple):
    """Answer with what the queries said, once all have ended and the connections are given back."""

    limit_s: float


class Answer(NamedTuple):
    """What the server said on one connection."""

    connection: int
    """The server's number of the connection."""
    product: int


class Pool(Child):
    """The application's process; a context manager."""

    def __init__(self, end: End, address: str, port: int, size: int) -> None:
        super().__init__(end, __name__)
        self.ask(Open(address, port, size), START_S)

    def __enter__(self) -> Pool:
        return self

    def use(self) -> None:
        """Begin to use all connections; returns at once."""
        self.ask(Use())

    def answers(self, limit_s: float) -> list[Answer]:
        """What the queries of the last `use` said. Raises LabError if any failed or hangs."""
        limit_s = patient(limit_s)
        return list(self.ask(Answers(limit_s), 2 * limit_s))


class Application:
    """The pool, and what is under way."""

    def __init__(self, order: Open) -> None:
        # Only the child needs it.
        import sqlalchemy

        url = sqlalchemy.URL.create("mysql+pymysql", "root", None, order.address, order.port)
        self._sql = sqlalchemy
        self._engine = sqlalchemy.create_engine(
            url, poolclass=sqlalchemy.QueuePool, pool_size=order.size, max_overflow=0
        )
        self._size = order.size
        self._all_have_one = threading.Barrier(order.size)
        self._threads = ThreadPoolExecutor(order.size)
        self._queries: list[Future[Answer]] = []

    def use(self) -> None:
        self._queries = [self._threads.submit(self._query, number) for number in range(self._size)]

    def _query(self, number: int) -> Answer:
        with self._engine.connect() as connection:
            text = self._sql.text("SELECT CONNECTION_ID(), :number * 3")
            row = connection.execute(text, {"number": number}).one()
            self._all_have_one.wait()
        return Answer(int(row[0]), int(row[1]))

    def answers(self, limit_s: float) -> list[Answer]:
        return [one.result(limit_s) for one in self._queries]


def main() -> None:
    """Answer requests until the parent closes the channel."""
    channel = channel_of_child()
    application: Application | None = None
    while True:
        try:
            request = channel.recv()
        except (EOFError, ConnectionResetError):
            # Threads that hang in a read must not keep the process.
            os._exit(0)
        try:
            if isinstance(request, Open):
                application = Application(request)
                channel.send(True)
            elif isinstance(request, Use) and application is not None:
                application.use()
                channel.send(True)
            elif isinstance(request, Answers) and application is not None:
                channel.send(application.answers(request.limit_s))
            else:
                channel.send(Failure(f"cannot obey {request!r} now"))
        except Exception as error:
            channel.send(Failure(repr(error)))
