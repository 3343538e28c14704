// SPDX-License-Identifier: GPL-2.0-only
/*
 * Empty programs on the hooks that tcpstuck.bpf.c uses: the minimum cost of any tracer. With
 * ONE_INSERT they store each cookie, which is the least that a handshake tracer must do.
 */
#include <uapi/linux/ptrace.h>

#ifdef ONE_INSERT
struct remembered_key {
	u64 words[5];
};

struct remembered {
	u64 words[10];
};

BPF_TABLE("hash", struct remembered_key, struct remembered, remembered, 65536);

static __always_inline int remember(void)
{
	struct remembered_key key = {};
	struct remembered value = {};

	key.words[0] = value.words[0] = bpf_ktime_get_ns();
	remembered.insert(&key, &value);
	return 0;
}
#else
#define remember() 0
#endif

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
KRETFUNC_PROBE(cookie_v4_init_sequence, void *first)
{
	return remember();
}
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

int cookie_return(struct pt_regs *ctx)
{
	return remember();
}
#endif
