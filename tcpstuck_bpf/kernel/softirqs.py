"""Whether softirqs of one CPU can preempt each other, and what follows. Pure."""

from __future__ import annotations

from collections.abc import Collection

from tcpstuck_bpf.model import SOFTIRQ_LOCK, CoverageGap
from tcpstuck_bpf.typeinfo.graph import KernelTypes

BH_LOCK_OPTION = "CONFIG_PREEMPT_RT_NEEDS_BH_LOCK"


def tasks_have_softirqs(types: KernelTypes) -> bool:
    """Whether the kernel counts a task's own softirqs (PREEMPT_RT); else BH_LOCK_OPTION is moot."""
    return types.place("task_struct", "softirq_disable_cnt") is not None


def softirq_gaps(types: KernelTypes, option: str | None) -> tuple[CoverageGap, ...]:
    """The coverage gap on a kernel where packets of one CPU may preempt each other.

    PREEMPT_RT counts each task's own softirqs, because a task may be preempted in one. A per-CPU
    lock in __local_bh_disable_ip keeps the softirqs of one CPU apart. Since 3253cb49cbad ("softirq:
    Allow to drop the softirq-BKL lock on PREEMPT_RT") that holds only where `option`, the value of
    BH_LOCK_OPTION, is y. softirq_ctrl has the lock in either case. struct tasklet_sync_callback, of
    the commit before, shows which kernel it is: tasklets need it without that lock.

    On such a kernel the programs keep each packet's data by task. But the kernel skips an fentry
    program for a packet that preempts that program: the recursion guard counts per CPU
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
            "with fentry, a packet that preempts a program is not seen: a stuck client may be "
            "missed, or a healthy one reported as stuck; a kernel counter that moved may belong to "
            "another packet",
        ),
    )


def mode_to_try(wished: str, softirq_gaps: Collection[CoverageGap], has_kprobes: bool) -> str:
    """The probe mode to try first: for `auto` with a softirq gap kprobe, if kprobes exist."""
    return "kprobe" if wished == "auto" and softirq_gaps and has_kprobes else wished
