"""The lab's network namespaces: their inode numbers, and the helpers that pyroute2 forks."""

from __future__ import annotations

import os
import signal
from types import FrameType

import pytest
from pyroute2.process import ChildProcess

from lab.errors import LabError
from lab.network.topology import Namespace


def numbers_of(how_many: int, *, give_up: bool) -> list[int]:
    """The inode numbers of namespaces that are made and removed, one after the other."""
    if os.geteuid() != 0:
        pytest.skip("making a network namespace takes root")
    numbers = []
    for _ in range(how_many):
        try:
            made = Namespace(f"tcpstuck-{os.getpid()}-numbered")
        except LabError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        numbers.append(made.inode)
        if give_up:
            made.give_up_number()
        made.close()
    return numbers


def test_no_namespace_gets_the_number_of_one_that_is_gone() -> None:
    """Many in a row: the kernel takes a namespace down, and frees its number, a little later."""
    numbers = numbers_of(20, give_up=False)
    assert len(set(numbers)) == len(numbers)


def test_a_number_that_is_given_up_is_used_again() -> None:
    numbers = numbers_of(200, give_up=True)
    assert len(set(numbers)) < len(numbers)


def test_ending_a_helper_of_pyroute2_calls_no_handler_of_ours_in_the_copy(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The copy has this process's handlers, and its namespaces on the stack."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        os.write(1, b"called")
        os._exit(1)

    ready, begun = os.pipe()
    previous = signal.signal(signal.SIGTERM, handle)
    try:
        with ChildProcess(_wait_for_a_signal, [begun]) as helper:
            assert os.read(ready, 1) == b"!"
    finally:
        signal.signal(signal.SIGTERM, previous)
        os.close(ready)
        os.close(begun)
    assert capfd.readouterr().out == ""
    assert helper.exitcode == -signal.SIGTERM


def _wait_for_a_signal(begun: int) -> None:
    os.write(begun, b"!")
    signal.pause()
