/* SPDX-License-Identifier: GPL-2.0-only */
/* Included by name from BCC's own headers, which bring the definitions themselves. */
#include <linux/types.h>
