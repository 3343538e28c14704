/* SPDX-License-Identifier: GPL-2.0-only */
/* The ring buffer's size is given in pages; libbcc asks for the page size here. */
#ifndef TCPSTUCK_STUB_ASM_PAGE_H
#define TCPSTUCK_STUB_ASM_PAGE_H

#define PAGE_SIZE 4096UL

#endif
