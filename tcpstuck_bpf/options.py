"""The command line's options, and the checks of their values."""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from tcpstuck_bpf import __version__
from tcpstuck_bpf.errors import EXIT_USAGE
from tcpstuck_bpf.judge.verdict import RULES, VERDICT_NAMES
from tcpstuck_bpf.model import address_bytes
from tcpstuck_bpf.terminal import printable

if TYPE_CHECKING:
    from tcpstuck_bpf.rescue.policy import IPNetwork

EPILOG = """\
examples:
  tcpstuck-trace -p 3311              watch one port until Ctrl-C, then sum up
  tcpstuck-trace -p 3306,3311 -v      with each connection's timeline and advice
  tcpstuck-trace --json -d 60         every port for a minute, JSON Lines
  tcpstuck-trace -p 3311 --rescue     mend what can be mended without risk
  tcpstuck-trace -p 25 --record r.tcpstuck ; tcpstuck-trace --replay r.tcpstuck

exit status:
  0  ran, nothing stuck      1  ran, something was stuck or lost data
  2  wrong use               3  cannot trace here
  130  Ctrl-C before any verdict
"""


class Parser(argparse.ArgumentParser):
    """argparse's parser, which also suggests the nearest option for a mistyped one."""

    def error(self, message: str) -> NoReturn:
        """Print the usage, the message and the nearest option; exit with status 2."""
        known = [option for action in self._actions for option in action.option_strings]
        _, unrecognized, words = message.partition("unrecognized arguments: ")
        for word in words.replace("=", " ").split() if unrecognized else ():
            if word.startswith("-") and word not in known:
                near = difflib.get_close_matches(word, known, n=1)
                message += f" (did you mean {near[0]}?)" if near else ""
        if message.endswith("expected one argument"):
            message += ", not one that begins with -"
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {printable(message)}\n{self.prog}: see --help\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit after --help or --version has been written; that write may fail."""
        sys.stdout.flush()
        super().exit(status, message)


def as_written(name: str, value: object) -> str:
    """A parsed option as the user writes it, from its name and value."""
    if name == "family":
        return f"-{value}"
    return f"--{'no-' * (value is False)}{name.replace('_', '-')}"


def file_name(text: str) -> str:
    """A file name. An empty one usually comes from an unset variable in a script."""
    if not text:
        raise argparse.ArgumentTypeError("the file name is empty")
    return text


def port_list(text: str) -> list[int]:
    """Parse ports separated by commas."""
    ports = []
    for word in text.split(","):
        try:
            port = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is not a port number") from None
        if not 1 <= port <= 65535:
            raise argparse.ArgumentTypeError(f"{port} is not a port between 1 and 65535")
        ports.append(port)
    return ports


def seconds(text: str) -> int:
    """Parse a positive time in seconds; returns nanoseconds."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not math.isfinite(value) or not 0.001 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a time between 0.001 and 1e9 seconds")
    return int(value * 1_000_000_000)


def listener_address(text: str) -> bytes:
    """Parse an IPv4 or IPv6 address; returns 16 bytes."""
    try:
        return address_bytes(text.strip("[]"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IPv4 or IPv6 address") from None


def verdict_names(text: str) -> list[str]:
    """Parse verdicts separated by commas."""
    known = [rule.name for rule in RULES]
    for name in text.split(","):
        if name not in known:
            raise _no_verdict(name, known)
    return text.split(",")


def rescue_mode(text: str) -> frozenset[str]:
    """Parse which clients to rescue: `known` or `all`, with or without `dry-run`, or that alone."""
    words = frozenset(text.split(","))
    if not words <= {"known", "all", "dry-run"} or {"known", "all"} <= words:
        raise argparse.ArgumentTypeError(f"{text!r} is not known, all, dry-run or all,dry-run")
    return words


def networks(text: str) -> tuple[IPNetwork, ...]:
    """Parse IPv4 or IPv6 addresses or networks, separated by commas."""
    try:
        return tuple(ipaddress.ip_network(word.strip("[]")) for word in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def packet_rate(text: str) -> int:
    """Parse a number of packets per second."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not 1 <= value <= 100_000:
        raise argparse.ArgumentTypeError(f"{value} is not between 1 and 100000")
    return value


def metrics_address(text: str) -> tuple[str, int]:
    """IP address and port; without an address that of localhost, for the answers tell strangers."""
    address, colon, port_text = text.rpartition(":")
    try:
        port = int(port_text if colon else "")
        named = {"": "127.0.0.1", "localhost": "127.0.0.1"}.get(address, address)
        ip = str(ipaddress.ip_address(named.strip("[]")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDR:PORT, nor :PORT") from None
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is no port: they go from 0 (any) to 65535")
    return ip, port


def verdict_to_explain(text: str) -> str:
    """Parse a verdict's name; an empty one means all verdicts."""
    if text and text not in VERDICT_NAMES:
        raise _no_verdict(text, VERDICT_NAMES)
    return text


def _no_verdict(name: str, known: Sequence[str]) -> argparse.ArgumentTypeError:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    guess = f" (did you mean {near[0]}?)" if near else ""
    return argparse.ArgumentTypeError(f"no verdict {name!r}{guess}; choose from {', '.join(known)}")


def table_size(text: str) -> int:
    """Parse the number of entries of the kernel's table."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not 16 <= value <= 1 << 24:
        raise argparse.ArgumentTypeError(f"{value} is not between 16 and {1 << 24}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The parser; README.md documents all its options."""
    parser = Parser(
        prog="tcpstuck-trace",
        description="List the TCP connections that the client thinks are open but the server has\n"
        "no record of: its SYN-ACK carried a SYN cookie, and the ACK was lost or dropped.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_selection(parser)
    _add_output(parser)
    _add_metrics(parser)
    _add_running(parser)
    _add_rescue(parser)
    _add_kernel(parser)
    return parser


def _add_selection(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to watch (in the kernel)")
    what.add_argument(
        "-p",
        "--port",
        metavar="PORT[,PORT]",
        type=port_list,
        action="append",
        default=[],
        help="server ports (default: all)",
    )
    family = what.add_mutually_exclusive_group()
    family.add_argument(
        "-4", dest="family", action="store_const", const=4, help="only IPv4 packets"
    )
    family.add_argument(
        "-6", dest="family", action="store_const", const=6, help="only IPv6 packets"
    )
    what.add_argument(
        "--listener", metavar="ADDR", type=listener_address, help="only this server address"
    )
    what.add_argument(
        "--netns",
        metavar="PATH|all",
        default="all",
        help="only this network namespace: a path, or a name of `ip netns` (default: all)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("what to show")
    output.add_argument(
        "-t",
        "--timeout",
        metavar="SECONDS",
        type=seconds,
        default=seconds("3"),
        help="how long a client must be silent to get a verdict (default: 3)",
    )
    output.add_argument("--all", action="store_true", help="show healthy connections too")
    output.add_argument(
        "--only",
        metavar="VERDICT[,VERDICT]",
        type=verdict_names,
        default=[],
        help="show only these verdicts",
    )
    output.add_argument(
        "--each",
        action="store_true",
        help="a line for each connection (default: one for all with the same listener, verdict "
        "and cause)",
    )
    output.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="show the timeline, evidence and advice of each connection",
    )
    output.add_argument("--summary", action="store_true", help="show only the summary")
    output.add_argument("--json", action="store_true", help="print JSON Lines instead of a table")
    output.add_argument(
        "--explain",
        metavar="VERDICT",
        nargs="?",
        const="",
        type=verdict_to_explain,
        help="say what a verdict means and what to do; without VERDICT, list all verdicts",
    )


def _add_metrics(parser: argparse.ArgumentParser) -> None:
    metrics = parser.add_argument_group("metrics for Prometheus (docs/metrics.md)")
    metrics.add_argument(
        "--metrics",
        metavar="ADDR:PORT",
        type=metrics_address,
        help="serve them at http://ADDR:PORT/metrics; :PORT listens at localhost only, "
        "0.0.0.0:PORT at every address",
    )
    metrics.add_argument(
        "--metrics-file",
        metavar="FILE",
        type=file_name,
        help="write them for a node_exporter's textfile collector, every 5 s and at the end",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("how to run")
    run.add_argument(
        "-d", "--duration", metavar="SECONDS", type=seconds, help="stop after this time"
    )
    run.add_argument(
        "--record", metavar="FILE", type=file_name, help="record the run, for --replay"
    )
    run.add_argument(
        "--replay",
        metavar="FILE",
        type=file_name,
        help="judge a recording; needs neither root nor BPF",
    )
    run.add_argument(
        "--ready-file",
        metavar="PATH",
        type=file_name,
        help="created once every probe is attached, removed when the run ends",
    )
    run.add_argument(
        "--probe-mode",
        choices=("auto", "fentry", "kprobe"),
        default="auto",
        help="how to attach (default: auto, which prefers fentry)",
    )
    run.add_argument(
        "--max-handshakes",
        metavar="N",
        type=table_size,
        default=131_072,
        help="entries of the kernel's table (default: 131072, about 20 MB)",
    )
    why = run.add_mutually_exclusive_group()
    why.add_argument(
        "--why",
        action="store_true",
        default=True,
        help="find out where this host drops ACKs before TCP (default)",
    )
    why.add_argument(
        "--no-why",
        dest="why",
        action="store_false",
        help="do not look for drops before TCP; --why costs about 200 instructions for each packet "
        "that this host drops",
    )
    run.add_argument("--dry-run", action="store_true", help="compile, load, attach, then stop")
    run.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def _add_rescue(parser: argparse.ArgumentParser) -> None:
    rescue = parser.add_argument_group("mending stuck clients (off by default)")
    rescue.add_argument(
        "--rescue",
        metavar="known|all|dry-run",
        nargs="?",
        const=rescue_mode("known"),
        type=rescue_mode,
        help="repeat the SYN-ACK to stuck clients: `known` to those whose ACK the listener dropped "
        "or whose address completed a handshake here before, `all` to all; `dry-run` only says "
        "what would be sent",
    )
    rescue.add_argument(
        "--rescue-exclude",
        metavar="NET[,NET]",
        type=networks,
        default=(),
        help="never send to these addresses",
    )
    rescue.add_argument(
        "--rescue-rate",
        metavar="N",
        type=packet_rate,
        default=100,
        help="send at most N SYN-ACKs per second in total (default: 100)",
    )
    rescue.add_argument(
        "--rescue-late",
        action="store_true",
        help="also send after a minute, when the client may get an RST (an error, not a hang)",
    )


def _add_kernel(parser: argparse.ArgumentParser) -> None:
    kernel = parser.add_argument_group("the kernel")
    kernel.add_argument(
        "--strict", action="store_true", help="refuse to trace if any probe or counter is missing"
    )
    kernel.add_argument(
        "--vmlinux",
        metavar="FILE",
        action="append",
        type=file_name,
        help="read struct members from this vmlinux or vmlinuz; with --doctor, report on that "
        "kernel; with --build, build for it (may be repeated)",
    )
    kernel.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="compile again, and keep nothing for the next start",
    )
    kernel.add_argument(
        "--build",
        metavar="DIR",
        type=file_name,
        help="compile into this directory, for this kernel or those of --vmlinux; do not trace",
    )
    kernel.add_argument(
        "--programs",
        metavar="DIR",
        type=file_name,
        help="use programs that --build made, possibly on another machine; needs no BCC",
    )
    kernel.add_argument(
        "--doctor", action="store_true", help="check every precondition and name the remedies"
    )
    kernel.add_argument(
        "--against",
        metavar="FILE",
        type=file_name,
        help="with --doctor --vmlinux: show what changed in that kernel",
    )
