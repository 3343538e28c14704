"""Values on the lab's command lines. Each function raises ArgumentTypeError."""

from __future__ import annotations

import argparse
import re
import sys

LAST_PORT = 65_535


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _number(text, sys.maxsize)


def port(text: str) -> int:
    """Parse a TCP port."""
    return _number(text, LAST_PORT)


def seconds(text: str) -> float:
    """Parse a time in seconds."""
    if not re.fullmatch(r"[0-9]+([.][0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return float(text)


def _number(text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to {most}")
    return int(text)
