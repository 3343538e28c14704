"""The probed kernel functions, and what is lost without each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Probe:
    """One probed kernel function.

    `parameters` is the number of parameters that the fexit program expects, because the return
    value follows them. None means that the program does not read the return value, so extra
    parameters do no harm.
    `arguments` has the arguments that the programs read: position from 0, and pointed-to type.
    """

    function: str
    kprobe_entry: str | None
    kprobe_return: str | None
    fentry: bool
    fexit: bool
    parameters: int | None
    arguments: Mapping[int, str]
    required: bool
    lost: str
    raw_tracepoint: str | None = None
    """The program for a tracepoint, the same in every mode; None for a function."""
    typed_tracepoint: str | None = None
    """The cheaper tp_btf program, for kernels whose BTF describes the tracepoint's arguments."""

    @property
    def symbol(self) -> str:
        """The symbol in /proc/kallsyms that shows that the kernel has this probe.

        For a tracepoint it is the function that calls the programs. `__tracepoint_NAME` is data,
        which a kernel without CONFIG_KALLSYMS_ALL does not list.
        """
        return f"__traceiter_{self.function}" if self.raw_tracepoint else self.function

    def serves(self, mode: str) -> bool:
        """Whether the probe has a program in a mode, `fentry` or `kprobe`."""
        if self.raw_tracepoint is not None:
            return True
        return self.fexit if mode == "fentry" else self.kprobe_return is not None


_SOCKET_AND_PACKET = MappingProxyType({0: "struct sock", 1: "struct sk_buff"})
_NONE_READ: Mapping[int, str] = MappingProxyType({})
_PACKET_AND_MSS = MappingProxyType({0: "struct sk_buff", 1: ""})
"""Argument 1 points to a number, whose type's name may change without harm."""

PROBES = (
    Probe(
        "tcp_conn_request",
        "tcp_conn_request_entry",
        "tcp_conn_request_return",
        fentry=True,
        fexit=True,
        parameters=None,
        arguments=MappingProxyType({2: "struct sock", 3: "struct sk_buff"}),
        required=True,
        lost="no SYN is seen",
    ),
    Probe(
        "cookie_v4_init_sequence",
        "cookie_init_sequence_entry",
        "cookie_init_sequence_return",
        fentry=False,
        fexit=True,
        parameters=2,
        arguments=_PACKET_AND_MSS,
        required=True,
        lost="no SYN cookie sent over IPv4 is seen",
    ),
    Probe(
        "cookie_v4_check",
        "cookie_check_entry",
        "cookie_check_return",
        fentry=True,
        fexit=True,
        parameters=2,
        arguments=_SOCKET_AND_PACKET,
        required=True,
        lost="the fate of ACKs over IPv4 is not seen",
    ),
    Probe(
        "cookie_v6_init_sequence",
        "cookie_init_sequence_entry",
        "cookie_init_sequence_return",
        fentry=False,
        fexit=True,
        parameters=2,
        arguments=_PACKET_AND_MSS,
        required=False,
        lost="handshakes over IPv6 are not traced",
    ),
    Probe(
        "cookie_v6_check",
        "cookie_check_entry",
        "cookie_check_return",
        fentry=True,
        fexit=True,
        parameters=2,
        arguments=_SOCKET_AND_PACKET,
        required=False,
        lost="the fate of ACKs over IPv6 is not seen",
    ),
    Probe(
        "tcp_check_req",
        "tcp_check_req_entry",
        "tcp_check_req_return",
        fentry=True,
        fexit=True,
        parameters=None,
        arguments=_SOCKET_AND_PACKET,
        required=False,
        lost="accept-queue overflows of ordinary handshakes are not counted",
    ),
    Probe(
        "tcp_rcv_state_process",
        None,
        None,
        fentry=False,
        fexit=True,
        parameters=2,
        arguments=_SOCKET_AND_PACKET,
        required=False,
        lost="whether a new child socket reached ESTABLISHED is not counted by fentry",
    ),
    # tcp_rcv_state_process also runs in process context, where a kprobe does not work (see the
    # program text). tcp_child_process calls it for new children only, with bottom halves off.
    Probe(
        "tcp_child_process",
        "tcp_child_process_entry",
        "tcp_child_process_return",
        fentry=False,
        fexit=False,
        parameters=3,
        arguments=MappingProxyType({1: "struct sock"}),
        required=False,
        lost="whether a new child socket reached ESTABLISHED is not counted by kprobe",
    ),
)

RESCUE_PROBES = (
    Probe(
        "tcp_make_synack",
        None,
        "tcp_make_synack_return",
        fentry=False,
        fexit=True,
        parameters=6,
        arguments=_NONE_READ,
        required=True,
        lost="SYN-ACKs cannot be repeated",
    ),
    Probe(
        "inet_csk_complete_hashdance",
        None,
        "inet_csk_complete_hashdance_return",
        fentry=False,
        fexit=True,
        parameters=4,
        arguments=_NONE_READ,
        required=False,
        lost="clients that only completed handshakes without a cookie do not count as known",
    ),
)
"""Additional probes for --rescue."""

KFREE_SKB = "kfree_skb"
WHY_PROBES = (
    Probe(
        KFREE_SKB,
        None,
        None,
        fentry=False,
        fexit=False,
        parameters=None,
        arguments=_NONE_READ,
        required=False,
        lost="ACKs that this host drops before TCP are not seen",
        raw_tracepoint="packet_freed",
        typed_tracepoint="packet_freed_typed",
    ),
)
"""Probes that show where an ACK was dropped; left out with --no-why."""
REASON_ARGUMENT = 2
"""Index of `reason` in skb:kfree_skb (5.17+)."""
EVERY_PROBE = (*PROBES, *RESCUE_PROBES, *WHY_PROBES)

KERNEL_COUNTERS = "kernel counters"
"""Name of the programs' access to LINUX_MIB_*. It is no probe, but optional like one."""
OPTIONAL = (
    *(probe.function for probe in (*PROBES, *WHY_PROBES) if not probe.required),
    KERNEL_COUNTERS,
)


def of_mode(wanted: Sequence[Probe], mode: str) -> tuple[Probe, ...]:
    """The probes that have a program in a mode, `fentry` or `kprobe`."""
    return tuple(probe for probe in wanted if probe.serves(mode))


def compiler_flags(probes: Collection[Probe]) -> list[str]:
    """-D flags for the attachable probes; the text leaves out the programs of all others."""
    return [f"-DPROBE_{probe.function}" for probe in probes]
