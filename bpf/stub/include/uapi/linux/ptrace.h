/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * struct pt_regs as kprobes see it (arch/ARCH/include/asm/ptrace.h): BCC's PT_REGS_PARMn and
 * PT_REGS_RC name its members, and its rewriter turns a probe's arguments into them.
 */
#ifndef TCPSTUCK_STUB_PTRACE_H
#define TCPSTUCK_STUB_PTRACE_H

#include <linux/types.h>

#if defined(__TARGET_ARCH_arm64) || defined(__aarch64__)
struct user_pt_regs {
	u64 regs[31];
	u64 sp;
	u64 pc;
	u64 pstate;
};

struct pt_regs {
	union {
		struct user_pt_regs user_regs;
		struct {
			u64 regs[31];
			u64 sp;
			u64 pc;
			u64 pstate;
		};
	};
};
#else
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx;
	unsigned long r11, r10, r9, r8, ax, cx, dx, si, di;
	unsigned long orig_ax, ip, cs, flags, sp, ss;
};
#endif

#endif
