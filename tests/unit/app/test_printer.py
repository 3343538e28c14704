"""What waits to be printed: in order, little at a time, never without bound."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.printer import MAX_WAITING, PRINTED_AT_ONCE, Printer
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import ATTEMPT_SENT, Attempt, HandshakeId
from tcpstuck_bpf.steps import Advanced, Swept, TallyTaken
from tcpstuck_bpf.summary import Status, Summary
from tests.builders import at, four_tuple, handshake, header, sweep, tally


class Lines:
    """An output that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list[Finding | Attempt]] = []

    def findings(self, findings: list[Finding]) -> None:
        self.given.append([*findings])

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        self.given.append([*attempts])

    def status(self, _status: Status) -> None:
        raise BrokenPipeError

    def summary(self, summary: Summary) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def attempt(number: int = 1) -> Attempt:
    return Attempt(HandshakeId(four_tuple(), at(0)), at(4), number, ATTEMPT_SENT)


def finding() -> Finding:
    analysis = Analysis(header())
    analysis.take(TallyTaken(tally(at(0))))
    analysis.take(Swept(sweep(at(4), handshake())))
    (found,) = analysis.take(Advanced(at(4)))
    return found


def test_the_order_is_kept_and_neighbours_of_a_kind_go_together() -> None:
    output, found = Lines(), finding()
    printer = Printer(output)
    printer.add([found, found])
    printer.add([attempt()])
    printer.add([found])
    printer.print_all()
    assert output.given == [[found, found], [attempt()], [found]]
    assert not printer.has_waiting


@pytest.mark.parametrize(
    ("waiting", "printed"),
    [
        (1, 1),
        (PRINTED_AT_ONCE, PRINTED_AT_ONCE),
        (MAX_WAITING, PRINTED_AT_ONCE),
        (MAX_WAITING + 100, 100),
    ],
)
def test_some_are_few_unless_too_many_wait(waiting: int, printed: int) -> None:
    output = Lines()
    printer = Printer(output)
    printer.add(attempt(number) for number in range(waiting))
    printer.print_some()
    assert output.given == [[attempt(number) for number in range(printed)]]
    assert printer.has_waiting == (printed < waiting)


def test_an_output_that_fails_is_remembered() -> None:
    printer = Printer(Lines())
    printer.print_all()
    assert not printer.failed
    analysis = Analysis(header())
    analysis.take(TallyTaken(tally(at(0))))
    with pytest.raises(BrokenPipeError):
        printer.status(analysis.status({}, at(1)))
    assert printer.failed
