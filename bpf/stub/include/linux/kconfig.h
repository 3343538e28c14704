/* SPDX-License-Identifier: GPL-2.0-only */
/* BCC includes this before anything else; helpers.h is empty without CONFIG_BPF_SYSCALL. */
#define CONFIG_BPF_SYSCALL 1
