"""The command line's options, and the checks of their values."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tcpstuck_bpf import __version__
from tcpstuck_bpf.judge.rules import VERDICT_NAMES
from tcpstuck_bpf.option_values import (
    heartbeat_interval,
    length_of_time,
    listener_addresses,
    packet_rate,
    port_list,
    process_number,
    table_size,
)
from tcpstuck_bpf.usage import Parser, WrongValueError, nearest

if TYPE_CHECKING:
    from tcpstuck_bpf.rescue.policy import IPNetwork

EPILOG = """\
examples:
  tcpstuck-trace -p 3311              watch one port until Ctrl-C, then sum up
  tcpstuck-trace -p 3306,3311 -v      with each connection's timeline and advice
  tcpstuck-trace --json -d 60         every port for a minute, JSON Lines
  tcpstuck-trace -p 3311 --rescue     mend what can be mended without risk
  tcpstuck-trace -p 25 --record r.tcpstuck ; tcpstuck-trace --replay r.tcpstuck
  tcpstuck-trace --client -p 3306     on the client's host: missing greetings

exit status:
  0  ran, nothing stuck      1  ran, something was stuck or lost data
  2  wrong use               3  cannot trace here
  4  nothing seen stuck, but not all was seen, or all was too young to judge
  130  Ctrl-C before any verdict
"""


def as_written(name: str, value: object) -> str:
    """A parsed option as the user writes it, from its name and value."""
    if name == "family":
        return f"-{value}"
    return f"--{'no-' * (value is False)}{name.replace('_', '-')}"


def file_name(text: str) -> str:
    """A file name. An empty one usually comes from an unset variable in a script."""
    return _named("a file", text)


PLOT_FORMS = (".svg", ".png", ".pdf")


def plot_file(text: str) -> str:
    """The name of a file to draw into. Its ending says in which form."""
    if not file_name(text).lower().endswith(PLOT_FORMS) or text.lower() in PLOT_FORMS:
        *others, last = PLOT_FORMS
        raise WrongValueError(
            f"{text} does not say in which form to draw",
            f"its name does not end with {', '.join(others)} or {last}",
            "write for example --plot run.svg",
        )
    return text


def netns_name(text: str) -> str:
    """A path or a name of a network namespace, but not an empty one."""
    return _named("a network namespace", text)


def _named(what: str, text: str) -> str:
    if not text:
        raise WrongValueError(
            f"the name of {what} is missing",
            "the value is empty",
            "give a name; in a script, check that the variable is set",
        )
    return text


def verdict_names(text: str) -> list[str]:
    """Parse verdicts separated by commas."""
    for name in text.split(","):
        if name not in VERDICT_NAMES:
            raise _no_verdict(name, VERDICT_NAMES)
    return text.split(",")


_RESCUE_WORDS = ("known", "all", "reset", "dry-run", "all,dry-run", "known,dry-run")
_PROBE_MODES = ("auto", "fentry", "kprobe")


def rescue_mode(text: str) -> frozenset[str]:
    """Parse the mode of --rescue: `known`, `all`, `reset`, or `dry-run`, also with one of them."""
    words = frozenset(text.split(","))
    what = f"{text!r} is not known, all, reset, dry-run or all,dry-run"
    if len(words & {"known", "all", "reset"}) > 1:
        raise WrongValueError(
            what,
            "known, all and reset exclude each other",
            "write --rescue=known or --rescue=all; with --client, --rescue or --rescue=reset",
        )
    if not words <= {"known", "all", "reset", "dry-run"}:
        guess = nearest(text, _RESCUE_WORDS, "write --rescue, which is --rescue=known")
        raise WrongValueError(what, "it selects the connections to mend, and how", guess)
    return words


def probe_mode(text: str) -> str:
    """Parse the probe mode: auto, fentry or kprobe."""
    if text not in _PROBE_MODES:
        raise WrongValueError(
            f"no mode {text!r}",
            f"there are {', '.join(_PROBE_MODES)}",
            nearest(text, _PROBE_MODES, "leave it out: auto takes what this kernel allows"),
        )
    return text


def networks(text: str) -> tuple[IPNetwork, ...]:
    """Parse IPv4 or IPv6 addresses or networks, separated by commas."""
    try:
        return tuple(ipaddress.ip_network(word.strip("[]")) for word in text.split(","))
    except ValueError as error:
        raise WrongValueError(
            f"{text!r} is no list of networks", str(error), "write 10.0.0.0/8,2001:db8::/32"
        ) from None


def metrics_address(text: str) -> tuple[str, int]:
    """Parse IP address and port. The default is localhost: metrics reveal facts to anyone."""
    address, colon, port_text = text.rpartition(":")
    try:
        port = int(port_text if colon else "")
        named = {"": "127.0.0.1", "localhost": "127.0.0.1"}.get(address, address)
        ip = str(ipaddress.ip_address(named.strip("[]")))
    except ValueError:
        raise WrongValueError(
            f"{text!r} is not ADDR:PORT, nor :PORT",
            "it is the address to listen on: an IP address of this machine",
            "write :9435 for localhost only, or 0.0.0.0:9435 for every address",
        ) from None
    if not 0 <= port <= 65535:
        raise WrongValueError(
            f"{port} is not a port", "ports go from 0 (any) to 65535", "for example --metrics :9435"
        )
    return ip, port


def verdict_to_explain(text: str) -> str:
    """Parse a verdict's name; an empty one means all verdicts."""
    if text and text not in VERDICT_NAMES:
        raise _no_verdict(text, VERDICT_NAMES)
    return text


def _no_verdict(name: str, known: Sequence[str]) -> WrongValueError:
    return WrongValueError(
        f"no verdict {name!r}",
        f"there are {', '.join(known)}",
        nearest(name, known, "--explain lists them, each with its meaning"),
    )


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
    _add_client(parser)
    _add_output(parser)
    _add_metrics(parser)
    _add_running(parser)
    _add_conversions(parser)
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
        help="server ports: numbers, ranges (3306-3311) or services (mysql); default: all",
    )
    family = what.add_mutually_exclusive_group()
    family.add_argument(
        "-4", dest="family", action="store_const", const=4, help="only IPv4 packets"
    )
    family.add_argument(
        "-6", dest="family", action="store_const", const=6, help="only IPv6 packets"
    )
    what.add_argument(
        "--listener",
        metavar="ADDR",
        type=listener_addresses,
        help="only this server address, or its name in /etc/hosts",
    )
    what.add_argument(
        "--netns",
        metavar="PATH|all",
        type=netns_name,
        default="all",
        help="only this network namespace: a path, or a name of `ip netns`; with --replay, a name "
        "or number that the recording has (default: all)",
    )


def _add_client(parser: argparse.ArgumentParser) -> None:
    client = parser.add_argument_group("the client's side (docs/client.md)")
    client.add_argument(
        "--client",
        action="store_true",
        help="watch this host's own connections to the ports of -p: which of them wait for the "
        "server's first byte; needs neither BPF nor, for one's own processes, root",
    )
    client.add_argument(
        "--pid",
        metavar="PID",
        type=process_number,
        help="with --client, only the sockets of this process",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("what to show")
    output.add_argument(
        "-t",
        "--timeout",
        metavar="TIME",
        type=length_of_time,
        help="how long a client must be silent to get a verdict, in seconds or as 500ms (default: "
        "3; with --replay, as recorded)",
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
    output.add_argument(
        "--live",
        action="store_true",
        help="show the run on the whole terminal, with keys to sort, fold and open; with --replay, "
        "show the recording's end",
    )
    output.add_argument(
        "--heartbeat",
        metavar="TIME|off",
        type=heartbeat_interval,
        help="say on standard error, so often, that it still watches (default: 5m in logs, off on "
        "a terminal and with --json)",
    )
    output.add_argument(
        "--plot",
        metavar="FILE",
        type=plot_file,
        help="with --replay, draw the handshakes and the listeners' queues into this file: .svg, "
        ".png or .pdf; needs matplotlib",
    )
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
        "-d",
        "--duration",
        metavar="TIME",
        type=length_of_time,
        help="stop after this time: seconds, or 10m, 1h30m",
    )
    run.add_argument(
        "--record", metavar="FILE", type=file_name, help="record the run, for --replay"
    )
    run.add_argument(
        "--replay",
        metavar="FILE",
        type=file_name,
        help="judge a recording (- for standard input), or with -p, -4, -6, --listener and "
        "--netns a part of it; needs neither root nor BPF",
    )
    run.add_argument(
        "--join",
        metavar=("SERVER", "CLIENT"),
        nargs=2,
        type=file_name,
        help="show each connection as two recordings saw it, one of each side (docs/client.md); "
        "needs neither root nor BPF",
    )
    run.add_argument(
        "--ready-file",
        metavar="PATH",
        type=file_name,
        help="created once every probe is attached, removed when the run ends",
    )
    run.add_argument(
        "--probe-mode",
        metavar="|".join(_PROBE_MODES),
        type=probe_mode,
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


def _add_conversions(parser: argparse.ArgumentParser) -> None:
    conversions = parser.add_argument_group("a recording in other forms (with --replay)")
    conversions.add_argument(
        "--pcap",
        metavar="FILE",
        type=file_name,
        help="write the known packets of handshakes with a verdict as a packet capture (pcapng), "
        "with a comment on each; --only chooses verdicts",
    )


def _add_rescue(parser: argparse.ArgumentParser) -> None:
    rescue = parser.add_argument_group("mending stuck clients (off by default)")
    rescue.add_argument(
        "--rescue",
        metavar="known|all|reset|dry-run",
        nargs="?",
        const=rescue_mode("known"),
        type=rescue_mode,
        help="repeat the SYN-ACK to stuck clients: `known` to those whose ACK the listener dropped "
        "or whose address completed a handshake here before, `all` to all; `dry-run` only says "
        "what would be sent. With --client: mend the waiting connections from this host, or ask "
        "their servers; `reset` ends what stays silent",
    )
    rescue.add_argument(
        "--rescue-exclude",
        metavar="NET[,NET]",
        type=networks,
        default=(),
        help="never send to these addresses (with --client: leave these servers alone)",
    )
    rescue.add_argument(
        "--rescue-rate",
        metavar="N",
        type=packet_rate,
        default=100,
        help="send at most N SYN-ACKs (with --client: do N things) per second in total (default: "
        "100)",
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
        "--print-bpf",
        action="store_true",
        help="print the C text that would be compiled for this kernel; needs neither root nor BCC",
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
