// SPDX-License-Identifier: GPL-2.0-only
/* Programs that do nothing, on the hooks that tcpstuck.bpf.c uses: the floor of any tracer. */
#include <uapi/linux/ptrace.h>

#ifdef TCPSTUCK_FENTRY
#define EMPTY_FENTRY(function)             \
	KFUNC_PROBE(function, void *first) \
	{                                  \
		return 0;                  \
	}
#define EMPTY_FEXIT(function)                 \
	KRETFUNC_PROBE(function, void *first) \
	{                                     \
		return 0;                     \
	}

EMPTY_FENTRY(tcp_conn_request)
EMPTY_FEXIT(tcp_conn_request)
EMPTY_FENTRY(tcp_check_req)
EMPTY_FEXIT(tcp_check_req)
EMPTY_FEXIT(tcp_rcv_state_process)
EMPTY_FEXIT(cookie_v4_init_sequence)
EMPTY_FENTRY(cookie_v4_check)
EMPTY_FEXIT(cookie_v4_check)
EMPTY_FEXIT(cookie_v6_init_sequence)
EMPTY_FENTRY(cookie_v6_check)
EMPTY_FEXIT(cookie_v6_check)
#else
int empty_entry(struct pt_regs *ctx)
{
	return 0;
}

int empty_return(struct pt_regs *ctx)
{
	return 0;
}
#endif
