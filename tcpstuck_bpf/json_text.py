r"""JSON that every reader accepts: ASCII, without lone surrogates.

A Python string may have lone surrogates: os.fsdecode makes them from bytes that are not UTF-8
(PEP 383). json.dumps writes such a byte as `\udcff`, and many readers refuse the whole line. So the
byte becomes the four characters `\xff` in the string, and any other lone surrogate `\ud800`, as
docs/json.md says. All other characters stay as they are; JSON escapes control characters itself.
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
    # Here a surrogate pair is one character, so all remaining surrogates are lone ones.
    whole = json.dumps(values, ensure_ascii=False)
    escaped = _SURROGATE.sub(lambda found: f"\\{printable(found[0])}", whole)
    return json.dumps(json.loads(escaped), separators=separators)
