/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * BCC makes a `version` section from LINUX_VERSION_CODE. Kernels before 5.0 compared it with their
 * own version. All supported kernels ignore it, so any version will do.
 */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 8, 0)
