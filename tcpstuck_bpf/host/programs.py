"""Finds the programs that the tool runs, mostly as root, in fixed directories instead of PATH.

They also get a fixed environment, because some load libraries from a directory in a variable
(XTABLES_LIBDIR) or take options from one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

PLACES = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
"""Directories of the distribution's programs, which only root can write. /usr/local is not among
them, because on Debian 11 a group may write there."""
ENVIRONMENT: Mapping[str, str] = {"PATH": ":".join(PLACES), "LC_ALL": "C"}
"""Environment of these programs. Nothing of ours is passed on; messages are in English."""


def find_program(name: str) -> str | None:
    """Path of one of the distribution's programs; None if it is not installed."""
    for place in PLACES:
        path = Path(place, name)
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    return None
