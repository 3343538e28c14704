/* SPDX-License-Identifier: GPL-2.0-only */
/* The integer types that BCC's helpers.h and its uapi copy of bpf.h expect from the kernel. */
#ifndef TCPSTUCK_STUB_LINUX_TYPES_H
#define TCPSTUCK_STUB_LINUX_TYPES_H

typedef signed char s8, __s8;
typedef unsigned char u8, __u8;
typedef short s16, __s16;
typedef unsigned short u16, __u16;
typedef int s32, __s32;
typedef unsigned int u32, __u32;
typedef long long s64, __s64;
typedef unsigned long long u64, __u64;

typedef u16 __be16, __le16, __sum16;
typedef u32 __be32, __le32, __wsum;
typedef u64 __be64, __le64, __aligned_u64;

typedef _Bool bool;
typedef unsigned long size_t, uintptr_t;
typedef long ssize_t;
typedef int pid_t;

#define true 1
#define false 0
#define NULL ((void *)0)
#define __force
#define __always_inline inline __attribute__((always_inline))

#endif
