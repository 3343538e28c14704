// SPDX-License-Identifier: GPL-2.0-only
/* The probes: thin fentry or kprobe entries of the bodies above. */

#ifdef TCPSTUCK_FENTRY

/*
 * A function's argument that is a pointer to something other than a struct. The verifier of 5.10
 * refuses to load such an argument, but allows a read of the context by this helper.
 */
static __always_inline u64 raw_argument(unsigned long long *ctx, int position)
{
	u64 argument = 0;

	bpf_probe_read_kernel(&argument, sizeof(argument), &ctx[position]);
	return argument;
}

static __always_inline int cookie_chosen_for(struct sk_buff *skb, u64 mss_place, u32 cookie)
{
	struct scratch *scratch = own_scratch();
	u16 mss = 0;

	if (!scratch || scratch->syn != (u64)skb) {
		lose(LOSS_COOKIES_UNMATCHED);
		return 0;
	}
	bpf_probe_read_kernel(&mss, sizeof(mss), (void *)mss_place);
	return cookie_chosen(cookie, mss);
}

static __always_inline int child_returned(struct sock *child, u32 error)
{
	struct scratch *scratch = own_scratch();

	if (!scratch || !scratch->child || scratch->child != (u64)child)
		return 0;
	return child_processed(scratch, child, error);
}

KFUNC_PROBE(tcp_conn_request, void *ops, void *af_ops, struct sock *sk, struct sk_buff *skb)
{
	return syn_arrived(sk, skb);
}

KRETFUNC_PROBE(tcp_conn_request, void *ops, void *af_ops, struct sock *sk, struct sk_buff *skb)
{
	return syn_handled();
}

#ifdef PROBE_tcp_check_req
KFUNC_PROBE(tcp_check_req, struct sock *sk, struct sk_buff *skb)
{
	return request_arrived(sk, skb);
}

KRETFUNC_PROBE(tcp_check_req, struct sock *sk, struct sk_buff *skb)
{
	return request_handled();
}
#endif

#ifdef PROBE_tcp_rcv_state_process
KRETFUNC_PROBE(tcp_rcv_state_process, struct sock *sk, struct sk_buff *skb, int error)
{
	return child_returned(sk, error);
}
#endif

/* The programs are written out twice, because BCC 0.18 finds only the first one in a macro. */

KRETFUNC_PROBE(cookie_v4_init_sequence, struct sk_buff *skb, u16 *mss, u32 cookie)
{
	return cookie_chosen_for(skb, raw_argument(ctx, 1), cookie);
}

KFUNC_PROBE(cookie_v4_check, struct sock *sk, struct sk_buff *skb)
{
	return ack_arrived(sk, skb);
}

KRETFUNC_PROBE(cookie_v4_check, struct sock *sk, struct sk_buff *skb, struct sock *result)
{
	return ack_judged((u64)result);
}

#ifdef PROBE_cookie_v6_check
KRETFUNC_PROBE(cookie_v6_init_sequence, struct sk_buff *skb, u16 *mss, u32 cookie)
{
	return cookie_chosen_for(skb, raw_argument(ctx, 1), cookie);
}

KFUNC_PROBE(cookie_v6_check, struct sock *sk, struct sk_buff *skb)
{
	return ack_arrived(sk, skb);
}

KRETFUNC_PROBE(cookie_v6_check, struct sock *sk, struct sk_buff *skb, struct sock *result)
{
	return ack_judged((u64)result);
}
#endif

#ifdef PROBE_tcp_make_synack
KRETFUNC_PROBE(tcp_make_synack, struct sock *sk, void *dst, void *req, void *foc, int type,
	       struct sk_buff *syn, struct sk_buff *made)
{
	return synack_made(made);
}
#endif

#ifdef PROBE_inet_csk_complete_hashdance
KRETFUNC_PROBE(inet_csk_complete_hashdance, struct sock *sk, struct sock *child, void *req,
	       bool own_req, struct sock *result)
{
	return request_completed((u64)result);
}
#endif

#else

int tcp_conn_request_entry(struct pt_regs *ctx)
{
	return syn_arrived((struct sock *)PT_REGS_PARM3(ctx), (struct sk_buff *)PT_REGS_PARM4(ctx));
}

int tcp_conn_request_return(struct pt_regs *ctx)
{
	return syn_handled();
}

int cookie_init_sequence_entry(struct pt_regs *ctx)
{
	struct scratch *scratch = own_scratch();

	if (!scratch)
		return 0;
	scratch->mss_place = scratch->syn == PT_REGS_PARM1(ctx) ? PT_REGS_PARM2(ctx) : 0;
	return 0;
}

int cookie_init_sequence_return(struct pt_regs *ctx)
{
	struct scratch *scratch = own_scratch();
	u16 mss = 0;

	if (!scratch || !scratch->mss_place) {
		lose(LOSS_COOKIES_UNMATCHED);
		return 0;
	}
	bpf_probe_read_kernel(&mss, sizeof(mss), (void *)scratch->mss_place);
	scratch->mss_place = 0;
	return cookie_chosen((u32)PT_REGS_RC(ctx), mss);
}

int cookie_check_entry(struct pt_regs *ctx)
{
	return ack_arrived((struct sock *)PT_REGS_PARM1(ctx), (struct sk_buff *)PT_REGS_PARM2(ctx));
}

int cookie_check_return(struct pt_regs *ctx)
{
	return ack_judged(PT_REGS_RC(ctx));
}

int tcp_check_req_entry(struct pt_regs *ctx)
{
	return request_arrived((struct sock *)PT_REGS_PARM1(ctx),
			       (struct sk_buff *)PT_REGS_PARM2(ctx));
}

int tcp_check_req_return(struct pt_regs *ctx)
{
	return request_handled();
}

int tcp_child_process_entry(struct pt_regs *ctx)
{
	struct scratch *scratch = own_scratch();

	if (scratch && scratch->child)
		scratch->child_entered = scratch->child == PT_REGS_PARM2(ctx);
	return 0;
}

int tcp_child_process_return(struct pt_regs *ctx)
{
	struct scratch *scratch = own_scratch();

	if (!scratch || !scratch->child_entered)
		return 0;
	scratch->child_entered = 0;
	return child_processed(scratch, (struct sock *)scratch->child, (u32)PT_REGS_RC(ctx));
}

#ifdef PROBE_tcp_make_synack
int tcp_make_synack_return(struct pt_regs *ctx)
{
	return synack_made((struct sk_buff *)PT_REGS_RC(ctx));
}
#endif

#ifdef PROBE_inet_csk_complete_hashdance
int inet_csk_complete_hashdance_return(struct pt_regs *ctx)
{
	return request_completed(PT_REGS_RC(ctx));
}
#endif

#endif
