"""Reads the firewall rules of a network namespace in a child process (`ruleset_child`).

Any user may make a namespace, and fill it with any number of rules. A ruleset that takes too much
time or memory ends the child, not this process.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from tcpstuck_bpf.recording.values import ruleset_of
from tcpstuck_bpf.rulesets import Ruleset

LIMIT_S = 300.0
"""Seconds for one read. This ends a child that hangs; nothing else waits for it."""
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tcpstuck_bpf.host import ruleset_child; sys.exit(ruleset_child.main(int(sys.argv[2])))"
)
"""The child uses exactly our search path, so it runs nothing from the current directory."""
_PACKAGE_PLACE = str(Path(__file__).resolve().parents[2])
"""Directory of the package. The child starts without `site`, which is a third faster, and so
without an editable install's finder."""


def read_ruleset(inode: int) -> Ruleset:
    """The current rules that can drop packets in the namespace with this inode number."""
    try:
        answer = _answer(inode)
        return ruleset_of(json.loads(answer))
    except subprocess.TimeoutExpired:
        why = f"it took more than {LIMIT_S:.0f} s"
    except OSError as error:
        why = error.strerror or str(error)
    except _EndedError as error:
        why = str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        why = "the answer of the process that reads them is damaged"
    return Ruleset((), (f"the rules cannot be read: {why}",))


class _EndedError(Exception):
    """The child ended without an answer; the text says why."""


def _answer(inode: int) -> bytes:
    """The child's output. Raises OSError, TimeoutExpired and _EndedError."""
    path = [*sys.path, _PACKAGE_PLACE]
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD, json.dumps(path), str(inode)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Ctrl-C at our terminal must not end the child: the run can still use its answer.
        start_new_session=True,
    )
    try:
        answer, _ = child.communicate(timeout=LIMIT_S)
    finally:
        # The child's own children end with it.
        child.kill()
        child.wait()
    if child.returncode == -signal.SIGXCPU:
        raise _EndedError("it took too much processor time")
    if child.returncode < 0:
        raise _EndedError(f"the process that reads them was ended by signal {-child.returncode}")
    if child.returncode:
        raise _EndedError("the process that reads them failed")
    return answer
