"""How verdicts and packets look: colours and shapes. Pure.

The colours are those of Okabe and Ito, which colour-blind people can tell apart. Verdicts with the
same colour differ in shape, and so do all verdicts in grey. Shapes are named as in matplotlib.
"""

from __future__ import annotations

from typing import NamedTuple

from tcpstuck_bpf.conversions.picture import FLOOD, MarkKind

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, LIGHT_GREY = "#777777", "#BBBBBB"

CARET_ON_LINE, CARET_BELOW_LINE = 7, 11
"""Triangles that point down: with the tip on the line, and with the base on it."""


class Look(NamedTuple):
    """Colour and shape of a verdict."""

    colour: str
    shape: str


VERDICTS: dict[str, Look] = {
    "ack-missing": Look(ORANGE, "o"),
    "ack-filtered": Look(VERMILION, "s"),
    "accept-queue-full": Look(BLUE, "D"),
    "ack-failed": Look(PURPLE, "P"),
    "cookie-rejected": Look(SKY, "X"),
    "no-listener": Look(SKY, "v"),
    "namespace-gone": Look(GREY, "H"),
    "client-reset": Look(GREY, "<"),
    "synack-missing": Look(YELLOW, ">"),
    "data-lost": Look(BLACK, "^"),
    "recovered": Look(GREEN, "p"),
    "rescued": Look(GREEN, "*"),
    "completed": Look(GREEN, "d"),
    FLOOD: Look(LIGHT_GREY, "8"),
}


class MarkLook(NamedTuple):
    """Shape of a packet; all packets are black."""

    shape: str | int
    filled: bool = True


MARKS: dict[MarkKind, MarkLook] = {
    MarkKind.SYN: MarkLook(CARET_ON_LINE),
    MarkKind.SYN_DROPPED: MarkLook(CARET_ON_LINE, filled=False),
    MarkKind.SYN_TAKEN: MarkLook("2"),
    MarkKind.COOKIE: MarkLook(CARET_BELOW_LINE),
    MarkKind.RESCUE: MarkLook(CARET_BELOW_LINE, filled=False),
    MarkKind.ACK_DROPPED: MarkLook("x"),
    MarkKind.ACK_FILTERED: MarkLook("|"),
    MarkKind.ACK_REJECTED: MarkLook("1"),
    MarkKind.NO_LISTENER: MarkLook("3"),
    MarkKind.RESET: MarkLook("4"),
    MarkKind.CONNECTED: MarkLook("."),
    MarkKind.NEW_SYN: MarkLook("+"),
}
