"""Has the firewall rules of a network namespace read by a process of its own (`ruleset_child`).

How many rules there are is up to whoever made the namespace, and any user may make one. What takes
too long, or too much memory, ends that process, not this one.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from tcpstuck_bpf.model import Ruleset
from tcpstuck_bpf.recording.values import ruleset_of

LIMIT_S = 300.0
"""For one reading. It ends a wait for one that hangs; nobody else waits for it."""
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tcpstuck_bpf.host import ruleset_child; sys.exit(ruleset_child.main(int(sys.argv[2])))"
)
"""With our own search path and no other: what lies in the current directory is not to be run."""
_PACKAGE_PLACE = str(Path(__file__).resolve().parents[2])
"""The child begins without `site`, a third faster, and so without an editable install's finder."""


def read_ruleset(inode: int) -> Ruleset:
    """The rules that can drop, of the namespace with that inode number, as they are now."""
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
    """The process ended without an answer; the text says why."""


def _answer(inode: int) -> bytes:
    """Raises OSError, TimeoutExpired and _EndedError."""
    path = [*sys.path, _PACKAGE_PLACE]
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CHILD, json.dumps(path), str(inode)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Ctrl-C at our terminal is meant for us: what is being read still tells something.
        start_new_session=True,
    )
    try:
        answer, _ = child.communicate(timeout=LIMIT_S)
    finally:
        # What it has started ends with it.
        child.kill()
        child.wait()
    if child.returncode == -signal.SIGXCPU:
        raise _EndedError("it took too much processor time")
    if child.returncode < 0:
        raise _EndedError(f"the process that reads them was ended by signal {-child.returncode}")
    if child.returncode:
        raise _EndedError("the process that reads them failed (too little memory?)")
    return answer
