"""The attach plan: which kernel functions are probed, why, and what is lost without each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tcpstuck_bpf.btf import Btf
from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.model import CoverageGap


@dataclass(frozen=True)
class Probe:
    """One probed kernel function.

    `parameters` is the number the fexit program was written for: its return value comes after
    them. None where no return value is read, so that extra parameters do no harm.
    """

    function: str
    kprobe_entry: str | None
    kprobe_return: str
    fentry: bool
    fexit: bool
    parameters: int | None
    required: bool
    lost: str


PROBES = (
    Probe(
        "tcp_conn_request",
        "tcp_conn_request_entry",
        "tcp_conn_request_return",
        fentry=True,
        fexit=True,
        parameters=None,
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
        required=True,
        lost="what became of an ACK over IPv4 is not seen",
    ),
    Probe(
        "cookie_v6_init_sequence",
        "cookie_init_sequence_entry",
        "cookie_init_sequence_return",
        fentry=False,
        fexit=True,
        parameters=2,
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
        required=False,
        lost="what became of an ACK over IPv6 is not seen",
    ),
    Probe(
        "tcp_check_req",
        "tcp_check_req_entry",
        "tcp_check_req_return",
        fentry=True,
        fexit=True,
        parameters=None,
        required=False,
        lost="accept-queue overflows of ordinary handshakes are not counted",
    ),
    Probe(
        "tcp_rcv_state_process",
        "tcp_rcv_state_process_entry",
        "tcp_rcv_state_process_return",
        fentry=False,
        fexit=True,
        parameters=None,
        required=False,
        lost="whether a new child socket reached ESTABLISHED is not counted",
    ),
)

_IPV6_PROBES = frozenset({"cookie_v6_init_sequence", "cookie_v6_check"})


def plan(symbols: Collection[str]) -> tuple[tuple[Probe, ...], tuple[CoverageGap, ...]]:
    """The probes this kernel has functions for, and the gaps that the others leave.

    Raises CannotTraceError where a required function is missing. IPv6 is all or nothing: a cookie
    seen without the fate of its ACK would only accuse healthy clients.
    """
    missing = {probe.function for probe in PROBES if probe.function not in symbols}
    for probe in PROBES:
        if probe.required and probe.function in missing:
            raise CannotTraceError(
                f"this kernel has no function {probe.function} to probe",
                f"without it {probe.lost}; it may lack CONFIG_SYN_COOKIES or have it inlined",
                "use a kernel built with CONFIG_SYN_COOKIES=y",
            )
    if missing & _IPV6_PROBES:
        missing |= _IPV6_PROBES
    gaps = tuple(
        CoverageGap(probe.function, "the kernel has no such function", probe.lost)
        for probe in PROBES
        if probe.function in missing
    )
    return tuple(probe for probe in PROBES if probe.function not in missing), gaps


def fentry_obstacle(btf: Btf, probes: Collection[Probe]) -> str | None:
    """Why fentry/fexit cannot be used for these probes, None where nothing speaks against it.

    The BTF prototype counts, not the version: a parameter more shifts fexit's return value.
    """
    for probe in probes:
        count = btf.parameter_count(probe.function)
        if count is None:
            return f"{probe.function} is not in the kernel's type information"
        if probe.parameters is not None and count != probe.parameters:
            return f"{probe.function} has {count} parameters, not {probe.parameters}"
    return None


def compiler_flags(probes: Collection[Probe]) -> list[str]:
    """-D flags that leave out of the program text what this kernel cannot attach."""
    return [f"-DPROBE_{probe.function}" for probe in probes]
