"""Implements `--pcap`: a recording as a packet capture, for Wireshark and its like.

The file has the packets that the tool knows of handshakes with a verdict, each with a comment in
words, and an interface for each network namespace. No packet was captured, so the comment of its
section says what is known, what stands for the unknown, and how much is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from tcpstuck_bpf import __version__
from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.console import remark
from tcpstuck_bpf.conversions import pcapng
from tcpstuck_bpf.conversions.frames import A_SYN, FROM_CLIENT, FROM_SERVER, Frame, Frames
from tcpstuck_bpf.conversions.packets import SYN, WINDOW, Packet, ip_bytes, packets_of
from tcpstuck_bpf.conversions.stories import Stories, Story
from tcpstuck_bpf.ending import close_all
from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.files import OutputFile
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.output.writers import Selection
from tcpstuck_bpf.steps import Ended, Step
from tcpstuck_bpf.synack import HOPS
from tcpstuck_bpf.terminal import printable

MODE = 0o600
"""The file holds clients' addresses."""
COMPLETED = "completed"
IMPOSSIBLE = "packets with an impossible time"
_WRITTEN_AT_ONCE = 1 << 18
"""Bytes."""

_ABOUT = (
    "No packet here was captured. Each is made from what the tool's programs noted of it.",
    "Known of a packet: time, addresses, ports, sequence and acknowledgement number, TCP flags, "
    "length of the payload. A SYN and its SYN-ACK have the same time: when the cookie was chosen.",
    "The payload is not known and cut off. TCP's checksum is the one for zeros in its place.",
    f"Not known, and written as: TTL or hop limit {HOPS}, window {WINDOW}, no identification, no "
    "options. The only option is the MSS of a SYN, which its cookie encodes: the client's, rounded "
    "down by the kernel. The first SYN and one that only the table shows are written with the flag "
    "SYN alone and without payload.",
    "Not seen by the tool, so never here: RSTs of this host, SYN-ACKs without a cookie, packets "
    "after a connection was made, and what never came to this host.",
)


def chosen_by(only: Collection[str]) -> Callable[[Finding], bool]:
    """Whether --only shows a finding; without names, every verdict but `completed`."""
    if not only:
        return lambda finding: finding.verdict != COMPLETED
    selection = Selection(only, nothing=False)
    return lambda finding: bool(selection.of([finding]))


class Capture:
    """Makes a packet capture from the steps of a replay.

    The file appears with the last step, whole or not at all: before the summary, whose reader may
    be gone. Raises UsageError where it cannot be made.
    """

    def __init__(self, path: str, analysis: Analysis, only: Collection[str]) -> None:
        self._path = path
        self._analysis = analysis
        self._stories = Stories(analysis, chosen_by(only))
        self._handshakes = 0
        self._without_packet = 0
        self._left_out: Counter[str] = Counter()
        self._namespaces: set[int] = set()
        self._written = 0
        """Number of packets in the file."""
        self._failure: OSError | None = None
        try:
            self._file = OutputFile(path, MODE)
        except OSError as error:
            raise self._unwritable(error) from error
        # Where the file will be there is room; the system's directory may be memory.
        self._frames = Frames(str(Path(path).parent) if self._file.is_new else None)

    def _unwritable(self, error: OSError) -> UsageError:
        return UsageError(
            f"cannot write packets to {self._path}",
            str(error.strerror),
            "name a file in a directory that you may write to, on a disk with free space",
        )

    def take(self, step: Step, findings: list[Finding]) -> None:
        """Take a step that the analysis has taken, and its findings.

        After a failure nothing more is done: the replay goes on, and `finish` raises it.
        """
        if self._failure is not None:
            return
        try:
            for story in self._stories.take(step, findings):
                self._add(story)
            if isinstance(step, Ended):
                self._write()
        except OSError as error:
            self._failure = error

    def _add(self, story: Story) -> None:
        known = story.known(self._analysis.names)
        if known is None:
            return
        self._handshakes += 1
        packets, unknown = packets_of(known)
        self._left_out += unknown
        own = [place for place, packet in enumerate(packets) if packet.is_own]
        written = 0
        for place, packet in enumerate(packets):
            comments = (packet.words, story.words) if [place] == own[-1:] else (packet.words,)
            written += self._add_packet(story, packet, comments)
        self._without_packet += not written
        if written:
            self._namespaces.add(story.identity.four_tuple.netns)

    def _add_packet(self, story: Story, packet: Packet, comments: tuple[str, ...]) -> bool:
        """Add a packet, unless its time is impossible. Returns whether it was added."""
        who = story.identity.four_tuple
        time_ns = self._analysis.header.clock.realtime(packet.time_ns)
        if time_ns not in pcapng.TIMES:
            self._left_out[IMPOSSIBLE] += 1
            return False
        data = ip_bytes(packet, who)
        rank = FROM_CLIENT if packet.from_client else FROM_SERVER
        self._frames.add(
            Frame(
                time_ns,
                who,
                A_SYN if packet.tcp_flags == SYN else rank,
                packet.sequence % 2**32,
                len(data) + packet.payload_length,
                data,
                tuple(map(printable, comments)),
            )
        )
        return True

    def _write(self) -> None:
        waiting = bytearray(self._beginning())
        for block in self._blocks():
            waiting += block
            self._written += 1
            if len(waiting) >= _WRITTEN_AT_ONCE:
                self._file.write(waiting)
                waiting.clear()
        self._file.write(waiting)
        self._file.appear()

    def finish(self) -> None:
        """Say how much is in the file. Raises UsageError if it was not written."""
        if self._failure is not None:
            raise self._unwritable(self._failure)
        left_out = f"; left out: {self._left_out_text()}" if self._left_out else ""
        what = f"{self._written} packets of {self._handshakes} handshakes"
        remark(f"{what} written to {self._path}{left_out}")

    def _left_out_text(self) -> str:
        return ", ".join(f"{number} {kind}" for kind, number in sorted(self._left_out.items()))

    def _beginning(self) -> bytes:
        """The section and its interfaces."""
        header = self._analysis.header
        narrowed = f", narrowed to {header.selection}" if header.selection else ""
        missing = f"{self._without_packet} of them have no known packet. "
        comment = (
            f"Handshakes under SYN cookies, from a recording of {header.watched}{narrowed}.",
            *_ABOUT,
            f"{self._handshakes} handshakes. {missing if self._without_packet else ''}"
            "Left out, because their time or their numbers are not known: "
            f"{self._left_out_text() or 'none'}.",
        )
        blocks = [pcapng.section(f"tcpstuck-trace {__version__}", comment)]
        for netns in sorted(self._namespaces):
            name = header.netns_names.get(netns, str(netns))
            blocks.append(pcapng.interface(name, f"network namespace {netns}"))
        return b"".join(blocks)

    def _blocks(self) -> Iterator[bytes]:
        numbers = {netns: number for number, netns in enumerate(sorted(self._namespaces))}
        for frame in self._frames:
            yield pcapng.packet(
                numbers[frame.who.netns],
                frame.time_ns,
                frame.data,
                frame.length,
                frame.comments,
                inbound=frame.rank != FROM_SERVER,
            )

    def close(self) -> None:
        """Remove what is not finished. Raises OSError."""
        close_all((self._frames.close, self._file.close))
