"""A test that hangs while it cleans up ends pytest, which says where every thread was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hung_tests import CLEAN_UP_S

LIMIT_S = 60
SOON_S = 4.0
"""Only tests that hang get this limit: on a busy machine, a healthy end can take longer."""
CONFTEST = """
from tests.hung_tests import HungTests

def pytest_configure(config):
    config.pluginmanager.register(HungTests(clean_up_s={}))
"""
CLEAN_UP_HANGS = """
import threading

def test_that_takes_too_long():
    try:
        threading.Event().wait()
    finally:
        clean_up()

def clean_up():
    threading.Event().wait()
"""
TEARDOWN_HANGS = """
import pytest, threading

@pytest.fixture
def left():
    yield
    clean_up()

def clean_up():
    while True:
        try:
            threading.Event().wait()
        except BaseException:
            pass

def test_that_leaves_something(left):
    pass
"""
END_HANGS = """
import threading

def wait_for_ever():
    threading.Event().wait()

def test_that_leaves_a_thread():
    threading.Thread(target=wait_for_ever).start()
"""
HEALTHY = """
import pytest

@pytest.fixture
def broken():
    yield
    assert False

def test_that_fails():
    assert False

def test_whose_clean_up_fails(broken):
    pass

def test_that_passes():
    pass
"""


def run_pytest(
    tmp_path: Path, tests: str, *words: str, clean_up_s: float = SOON_S
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "conftest.py").write_text(CONFTEST.format(clean_up_s))
    (tmp_path / "test_it.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(
        [*command, "-c", "/dev/null", f"--rootdir={tmp_path}", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@pytest.mark.parametrize("tests", [CLEAN_UP_HANGS, TEARDOWN_HANGS])
def test_a_clean_up_that_hangs_ends_pytest_and_tells_where(tmp_path: Path, tests: str) -> None:
    ended = run_pytest(tmp_path, tests, "-o", "timeout=2")
    assert ended.returncode != 0
    assert "in clean_up" in ended.stderr


def test_a_thread_that_keeps_pytest_from_its_end_is_told(tmp_path: Path) -> None:
    ended = run_pytest(tmp_path, END_HANGS, "-o", "timeout=30")
    assert ended.returncode != 0
    assert "in wait_for_ever" in ended.stderr


def test_others_run_to_their_end(tmp_path: Path) -> None:
    ended = run_pytest(tmp_path, HEALTHY, "-o", "timeout=30", clean_up_s=CLEAN_UP_S)
    assert "1 failed, 2 passed, 1 error" in ended.stdout
    assert "dump_traceback" not in ended.stderr
    assert "Timeout" not in ended.stderr
