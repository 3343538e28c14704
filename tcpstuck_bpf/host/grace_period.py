"""Waits until every packet that a CPU is processing has been processed.

The kernel processes each packet in an RCU read-side critical section (netif_receive_skb,
process_backlog), and membarrier(2) with MEMBARRIER_CMD_GLOBAL waits for all such sections that have
begun (synchronize_rcu in kernel/sched/membarrier.c).
"""

from __future__ import annotations

from tcpstuck_bpf.host.bpf_syscall import RefusedError, system_call

_MEMBARRIER_CALL = {"x86_64": 324, "aarch64": 283}
_GLOBAL = 1


def await_grace_period() -> bool:
    """Wait, usually 10 to 50 ms; False if the kernel refuses, as it does with nohz_full."""
    no_flags = any_cpu = 0
    try:
        system_call(_MEMBARRIER_CALL, _GLOBAL, no_flags, any_cpu)
    except RefusedError:
        return False
    return True
