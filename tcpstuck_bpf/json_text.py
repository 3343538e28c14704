r"""JSON that every reader takes: ASCII, and no character in it that is none.

A Python string may hold lone surrogates: os.fsdecode makes them of bytes in a name that are no
UTF-8 (PEP 383). json.dumps writes them as `\udcff`, and many readers refuse the whole line. So
such a byte is the four characters `\xff` in a string, any other lone surrogate `\ud800`;
docs/json.md says so. Everything else of a name is in JSON as it is: JSON has escapes of its own for
control characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tcpstuck_bpf.terminal import printable

_SURROGATE = re.compile("[\ud800-\udfff]")


def json_text(values: Mapping[str, Any], separators: tuple[str, str] = (", ", ": ")) -> str:
    """An object as JSON on one line, without the newline."""
    text = json.dumps(values, separators=separators)
    if "\\ud" not in text:
        return text
    # Pairs are one character here, so that those that are left are alone.
    whole = json.dumps(values, ensure_ascii=False)
    escaped = _SURROGATE.sub(lambda found: f"\\{printable(found[0])}", whole)
    return json.dumps(json.loads(escaped), separators=separators)
