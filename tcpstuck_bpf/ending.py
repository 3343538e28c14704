"""The end of a run: everything is released, and no failure there replaces the answer.

By then the verdicts are printed and the exit status is known. So a failure to detach, close or
remove something only becomes a note, and the rest is still released. An error that ended the run
propagates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType

from tcpstuck_bpf.errors import words_of


class Ending:
    """A context that calls all added functions on exit, the last one first.

    `note` is called with one line for each failure, and must not raise.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._closings: list[tuple[str, Callable[[], object]]] = []

    def add(self, what: str, close: Callable[[], object]) -> None:
        """Add a function to call at the end; `what` describes its failure."""
        self._closings.append((what, close))

    def __enter__(self) -> Ending:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._closings:
            what, close = self._closings.pop()
            try:
                close()
            except Exception as failure:  # any kind; it must not replace the answer
                self._note(f"{what}: {words_of(failure)}")


def close_all(closings: Iterable[Callable[[], object]]) -> None:
    """Call every function, then raise the first failure, if any."""
    first: Exception | None = None
    for close in closings:
        try:
            close()
        except Exception as failure:  # raised below
            first = first or failure
    if first is not None:
        raise first
