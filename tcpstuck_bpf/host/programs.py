"""Other programs that are run, mostly as root: from fixed places, whatever PATH says.

Also with an environment of our own: some of them load libraries from where a variable says
(XTABLES_LIBDIR), or take options from one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

PLACES = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
"""Where distributions install programs, and nobody but root can. Not /usr/local: on Debian 11 a
group may write there."""
ENVIRONMENT: Mapping[str, str] = {"PATH": ":".join(PLACES), "LC_ALL": "C"}
"""What they see of ours: nothing. Messages come in English, and numbers as programs read them."""


def find_program(name: str) -> str | None:
    """The path of a program of the distribution's; None where it is not installed."""
    for place in PLACES:
        path = Path(place, name)
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    return None
