"""The demo, as far as it goes without a kernel that allows tracing."""

from __future__ import annotations

import argparse

import pytest

from lab import demo
from lab.guests.run import TIMEOUT_STATUS, GuestResult


def test_a_demo_that_is_cut_off_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_off = GuestResult(
        TIMEOUT_STATUS, b"", b"", timed_out=True, native=False, kernel_log="", boot_s=1, total_s=280
    )
    monkeypatch.setattr(demo, "tracing_refusal", lambda: "locked")
    monkeypatch.setattr(demo, "run_in_guest", lambda *_args, **_options: cut_off)
    assert demo.run(argparse.Namespace(here=False)) == TIMEOUT_STATUS
    assert "cut off after 280 s" in capsys.readouterr().out
