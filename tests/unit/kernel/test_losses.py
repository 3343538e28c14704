"""The losses that the programs count have the same names in C and in Python, in the same order."""

from __future__ import annotations

import re
from pathlib import Path

from tcpstuck_bpf.kernel.source import LOSSES

TEXT = (Path(__file__).parents[3] / "bpf" / "tcpstuck.bpf.c").read_text("ascii")


def test_every_loss_of_the_programs_has_its_name_and_its_place() -> None:
    (members,) = re.findall(r"enum loss \{(.*?)\};", TEXT, re.DOTALL)
    *names, end = re.findall(r"\bLOSS_(\w+)", re.sub(r"/\*.*?\*/", "", members, flags=re.DOTALL))
    assert end == "MAX"
    assert tuple(name.lower() for name in names) == tuple(LOSSES)
