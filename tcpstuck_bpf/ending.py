"""The end of a run: what was taken is let go, and nothing that fails there replaces the answer.

By then the verdicts are told and the exit status is known. So a failure to detach, to close or to
remove is a note, whatever its kind; the next thing is let go all the same, and an error that ended
the run goes on to whoever tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType

from tcpstuck_bpf.errors import words_of


class Ending:
    """A context that lets go, when it is left, of all that was added; the last of it first.

    `note` is told what failed, in one line; it raises nothing.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._closings: list[tuple[str, Callable[[], object]]] = []

    def add(self, what: str, close: Callable[[], object]) -> None:
        """Have this called at the end; `what` names it where that fails."""
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
            except Exception as failure:  # of whatever kind: the run has its answer
                self._note(f"{what}: {words_of(failure)}")


def close_all(closings: Iterable[Callable[[], object]]) -> None:
    """Call every one of them, then raise the first failure, if there was any."""
    first: Exception | None = None
    for close in closings:
        try:
            close()
        except Exception as failure:  # raised below
            first = first or failure
    if first is not None:
        raise first
