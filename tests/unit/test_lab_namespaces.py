"""The lab's network namespaces can be told apart by their inode numbers."""

from __future__ import annotations

import os

import pytest

from lab.errors import LabError
from lab.topology import Namespace


def test_no_namespace_gets_the_number_of_one_that_is_gone() -> None:
    """Many in a row: the kernel takes a namespace down, and frees its number, a little later."""
    if os.geteuid() != 0:
        pytest.skip("making a network namespace takes root")
    numbers = []
    for _ in range(20):
        try:
            made = Namespace(f"tcpstuck-{os.getpid()}-numbered")
        except LabError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        numbers.append(made.inode)
        made.close()
    assert len(set(numbers)) == len(numbers)
