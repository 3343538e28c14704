from __future__ import annotations

import platform

import pytest

from tcpstuck_bpf.host.grace_period import await_grace_period


def test_an_architecture_whose_call_is_unknown_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert await_grace_period()
    monkeypatch.setattr(platform, "machine", lambda: "sparc64")
    assert not await_grace_period()
