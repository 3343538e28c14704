"""Whether the packets of one CPU are handled one after the other, and what follows. Pure."""

from __future__ import annotations

from collections.abc import Collection

from tcpstuck_bpf.model import SOFTIRQ_LOCK, CoverageGap
from tcpstuck_bpf.typeinfo.graph import KernelTypes

BH_LOCK_OPTION = "CONFIG_PREEMPT_RT_NEEDS_BH_LOCK"


def tasks_have_softirqs(types: KernelTypes) -> bool:
    """Whether the kernel counts a task's own softirqs (PREEMPT_RT); else BH_LOCK_OPTION is moot."""
    return types.place("task_struct", "softirq_disable_cnt") is not None


def softirq_gaps(types: KernelTypes, option: str | None) -> tuple[CoverageGap, ...]:
    """The gap where packets of one CPU may preempt each other.

    PREEMPT_RT counts a task's own softirqs, because it may be preempted in one. A lock per CPU in
    __local_bh_disable_ip keeps them apart, since 3253cb49cbad ("softirq: Allow to drop the
    softirq-BKL lock on PREEMPT_RT") only where `option`, that of BH_LOCK_OPTION, is y; softirq_ctrl
    has the lock in either case. struct tasklet_sync_callback, of the commit before, tells: it is
    what tasklets need without that lock.

    The programs keep what belongs to a packet apart by its task then. But an fentry program is not
    run for a packet that preempts it in its midst: what keeps it from recursion counts per CPU
    (__bpf_prog_enter_recur). A kprobe's program is not preempted.
    """
    if not tasks_have_softirqs(types) or option == "y":
        return ()
    always_taken = types.place("softirq_ctrl", "lock") is not None
    if always_taken and types.place("tasklet_sync_callback", "cb_lock") is None:
        return ()
    return (
        CoverageGap(
            SOFTIRQ_LOCK,
            f"PREEMPT_RT, and {BH_LOCK_OPTION} is not known to be set",
            "by fentry a packet that preempts a program passes unseen, so that a stuck client is "
            "missed or a healthy one accused; the kernel's counters may move for another packet",
        ),
    )


def mode_to_try(wished: str, softirq_gaps: Collection[CoverageGap], has_kprobes: bool) -> str:
    """The probe mode to begin with: instead of `auto` the one that no packet preempts."""
    return "kprobe" if wished == "auto" and softirq_gaps and has_kprobes else wished
