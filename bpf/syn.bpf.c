// SPDX-License-Identifier: GPL-2.0-only
/* A SYN comes to a listener, which may answer with a cookie. */

/* tcp_conn_request, entry. */
static __always_inline int syn_arrived(struct sock *listener, struct sk_buff *skb)
{
	struct scratch *scratch = begin_scratch();

	if (!scratch)
		return 0;
	scratch->syn = (u64)skb;
	scratch->cookie_sent = 0;
	scratch->handshake_tracked = 0;
	read_arrival(scratch, listener, skb);
	scratch->listening = (u64)listener;
	scratch->syn_queue = syn_queue_of(listener);
	return 0;
}

/*
 * A new handshake replaces one that user space may have reported already. One that is too young to
 * have been reported gets no event, because a flood would cause one for each SYN.
 */
static __always_inline void replaced(struct netns_counts *counted, struct segment *segment,
				     struct handshake *entry, u64 now)
{
	u32 zero = 0;
	struct trace_config *wanted = config.lookup(&zero);

	ADD(counted->count[COUNT_REPLACED], 1);
	if (!wanted || now - entry->first_syn_ns < wanted->tell_completed_after_ns)
		return;
	end(entry, ENDING_REPLACED, now, 0);
	tell(counted, EVENT_REPLACED, segment, entry, now, 0);
}

/* Update the listener's figures for a sent cookie; `owes` as in note_cookie. */
static __always_inline void note_cookie_sent(struct scratch *scratch, bool owes, u64 now)
{
	struct listener_facts *facts = facts_of(scratch);

	if (!facts)
		return;
	__sync_fetch_and_add(&facts->syns, 1);
	note_segment(facts, &scratch->segment);
	RAISE(facts->peak_syn_queue, scratch->syn_queue);
	note_cookie(facts, scratch->syn_queue, owes, now);
}

/*
 * cookie_vX_init_sequence, return: a cookie was chosen and its SYN-ACK is about to leave. An
 * existing entry is changed in place. RSS keeps a 4-tuple on one CPU, so nothing else writes to the
 * entry meanwhile.
 */
static __always_inline int cookie_chosen(u32 cookie, u16 mss)
{
	struct scratch *scratch = own_scratch();
	struct handshake fresh = {};
	struct netns_counts *counted;
	struct handshake *entry;
	struct segment *segment;
	long refused;
	bool begins;

	if (!scratch)
		return 0;
	segment = &scratch->segment;
	scratch->cookie_sent = 1;
	counted = counts_of(scratch);
	if (!counted)
		return 0;
	ADD(counted->count[FILTERED(COUNT_COOKIES_SENT, segment)], 1);
	if (segment->outside)
		return 0;
	fresh.first_syn_ns = fresh.last_syn_ns = bpf_ktime_get_ns();
	fresh.client_isn = segment->sequence;
	fresh.cookie_isn = cookie;
	fresh.syn_count = 1;
	fresh.accept_queue = segment->accept_queue;
	fresh.accept_queue_limit = segment->accept_queue_limit;
	fresh.syn_queue = scratch->syn_queue;
	fresh.mss = mss;
	fresh.socket = scratch->socket;
	mark_port(segment->key.server_port);
	refused = new_entry(&segment->key, &fresh);
	if (!refused) {
		scratch->handshake_tracked = 1;
		choose_if_known(&segment->key);
		note_cookie_sent(scratch, true, fresh.first_syn_ns);
		return 0;
	}
	entry = awaiting_ack.lookup(&segment->key);
	begins = entry && (entry->ending != ENDING_NONE ||
			   (entry->acks_dropped && entry->client_isn != fresh.client_isn));
	if (entry && is_owed(entry) && entry->socket != scratch->socket) {
		note_answer(facts_owed(scratch, 0, entry), entry);
		begins = true;
	}
	note_cookie_sent(scratch, begins, fresh.first_syn_ns);
	if (!entry) {
		ADD(counted->count[refused == REFUSED_FULL ? COUNT_TABLE_FULL : COUNT_TABLE_BUSY],
		    1);
		return 0;
	}
	scratch->handshake_tracked = 1;
	choose_if_known(&segment->key);
	if (entry->ending != ENDING_NONE || entry->client_isn != fresh.client_isn) {
		if (entry->ending == ENDING_NONE)
			replaced(counted, segment, entry, fresh.first_syn_ns);
		*entry = fresh;
		return 0;
	}
	entry->last_syn_ns = fresh.last_syn_ns;
	entry->cookie_isn = cookie;
	entry->socket = fresh.socket;
	entry->accept_queue = fresh.accept_queue;
	entry->accept_queue_limit = fresh.accept_queue_limit;
	entry->syn_queue = fresh.syn_queue;
	entry->mss = mss;
	/* If an ACK made the entry (0), its first SYN was not seen, and this is the second. */
	entry->syn_count += entry->syn_count ? 1 : 2;
	ADD(counted->count[COUNT_SYNS_REPEATED], 1);
	tell_if_new(counted, EVENT_SYN_REPEATED, segment, entry, fresh.last_syn_ns, 0);
	return 0;
}

/*
 * If the counters cannot be read, the accept queue decides: tcp_conn_request compares its length
 * with the limit right after the entry.
 */
static __always_inline bool syn_was_dropped(const struct segment *segment, u8 moved)
{
	if (moved & MOVED_UNKNOWN)
		return segment->accept_queue > segment->accept_queue_limit;
	return moved & MOVED_LISTEN_DROPS;
}

/*
 * tcp_conn_request, return. A SYN without a cookie was dropped or got a place in the SYN queue. If
 * the same 4-tuple got a cookie before, that ends the cookie handshake, unless the client has
 * answered the cookie already (the SYN was slower than the ACK). A SYN with another ISN is another
 * handshake, so the client has given up the first one, whatever happened to this SYN.
 */
static __always_inline int syn_handled(void)
{
	struct scratch *scratch = own_scratch();
	struct netns_counts *counted;
	struct listener_facts *facts;
	struct handshake *entry;
	struct segment *segment;
	u8 kind, moved;
	bool dropped;
	u64 now;

	if (!scratch || !scratch->syn)
		return 0;
	scratch->syn = 0;
	if (scratch->cookie_sent)
		return 0;
	segment = &scratch->segment;
	moved = listen_counters_moved(&scratch->before);
	if (segment->outside) {
		count_outside(scratch, moved);
		return 0;
	}
	dropped = syn_was_dropped(segment, moved);
	facts = facts_of(scratch);
	if (facts) {
		__sync_fetch_and_add(&facts->syns, 1);
		if (moved & MOVED_LISTEN_OVERFLOWS)
			__sync_fetch_and_add(&facts->syns_refused, 1);
		note_segment(facts, segment);
		RAISE(facts->peak_syn_queue, syn_queue_of((struct sock *)scratch->listening));
	}
	entry = awaiting_ack.lookup(&segment->key);
	/* Most SYNs move no counter, and then make no entry in the counts. */
	if (!entry && !dropped && !(moved & MOVED_LISTEN_OVERFLOWS))
		return 0;
	counted = counts_of(scratch);
	if (!counted)
		return 0;
	count_moved(counted, segment, moved);
	ADD(counted->count[COUNT_SYNS_DROPPED], dropped);
	if (!entry || entry->ending != ENDING_NONE)
		return 0;
	now = bpf_ktime_get_ns();
	if (entry->client_isn != segment->sequence) {
		ADD(counted->count[COUNT_REPLACED], 1);
		note_answer(facts_owed(scratch, facts, entry), entry);
		end(entry, ENDING_REPLACED, now, moved);
		kind = EVENT_REPLACED;
	} else if (dropped) {
		entry->syn_count += entry->syn_count ? 1 : 2;
		entry->syns_dropped += 1;
		entry->last_syn_ns = now;
		kind = EVENT_SYN_DROPPED;
	} else {
		ADD(counted->count[COUNT_TAKEN_OVER], 1);
		if (!has_answered(entry)) {
			note_answer(facts_owed(scratch, facts, entry), entry);
			end(entry, ENDING_TAKEN_OVER, now, moved);
		}
		kind = EVENT_TAKEN_OVER;
	}
	tell_if_new(counted, kind, segment, entry, now, moved);
	return 0;
}
