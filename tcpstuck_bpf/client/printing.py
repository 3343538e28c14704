"""The output that the options choose, for a run and for a recording of the client's side."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Collection

from tcpstuck_bpf.client.output import ClientOutput, JsonOutput, TableOutput, selection
from tcpstuck_bpf.client.rows import Rows
from tcpstuck_bpf.client.steps import ClientHeader
from tcpstuck_bpf.client.waits import RECOVERED, RESCUED
from tcpstuck_bpf.console import WIDTH_OF_A_PIPE
from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.judge.rules import CLIENT_RULES
from tcpstuck_bpf.output.page import Page
from tcpstuck_bpf.terminal import understands_escapes

VERDICTS = (RECOVERED, RESCUED, *(rule.name for rule in CLIENT_RULES))
"""The verdicts of the client's side."""


def refuse_other_verdicts(only: Collection[str], mode: str) -> None:
    """Raises UsageError if --only names a verdict of the server's side; `mode`: what it is with."""
    other = next((name for name in only if name not in VERDICTS), None)
    if other is not None:
        raise UsageError(
            f"--only {other} cannot be combined with {mode}",
            "that is a verdict of the server's side",
            f"choose from {', '.join(VERDICTS)}",
        )


def output_for(options: argparse.Namespace, header: ClientHeader) -> ClientOutput:
    """The output for a run's or a recording's verdicts: JSON or a table."""
    chosen = selection(options.only, options.summary)
    if options.json:
        return JsonOutput(sys.stdout, header.clock, chosen)
    page = Page(
        clock=header.clock,
        width=shutil.get_terminal_size((WIDTH_OF_A_PIPE, 24)).columns,
        colour=understands_escapes(sys.stdout) and not os.environ.get("NO_COLOR"),
        own_netns=header.own_netns,
        netns_names=header.netns_names,
    )
    rows = Rows(page, each=options.each, verbose=options.verbose)
    return TableOutput(sys.stdout, page, rows, chosen)
