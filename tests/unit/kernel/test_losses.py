"""The losses that the programs count have the same names in C and in Python, in the same order."""

from __future__ import annotations

import re

from tcpstuck_bpf.kernel.compilation import program_directory, program_text
from tcpstuck_bpf.kernel.source import LOSSES

TEXT = program_text(program_directory()).decode("ascii")


def test_every_loss_of_the_programs_has_its_name_and_its_place() -> None:
    (members,) = re.findall(r"enum loss \{(.*?)\};", TEXT, re.DOTALL)
    *names, end = re.findall(r"\bLOSS_(\w+)", re.sub(r"/\*.*?\*/", "", members, flags=re.DOTALL))
    assert end == "MAX"
    assert tuple(name.lower() for name in names) == tuple(LOSSES)
