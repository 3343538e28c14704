// SPDX-License-Identifier: GPL-2.0-only
/* A segment other than a SYN comes to a listener: the cookie check, and ordinary requests. */

/*
 * Delete an entry that has ended; only such a one, because the delete may fail. It does (EBUSY) if
 * the softirq interrupts this CPU during a read or delete for user space in a bucket that shares
 * its lock counter (map_locked in htab_lock_bucket, from 5.11 until it kept interrupts off
 * meanwhile).
 */
static __always_inline void forget(struct handshake_key *key)
{
	awaiting_ack.delete(key);
	note_room();
#ifdef PROBE_tcp_make_synack
	synacks.delete(key);
	chosen.delete(key);
#endif
}

/* cookie_vX_check, entry: some segment other than a SYN reached a listener. */
static __always_inline int ack_arrived(struct sock *listener, struct sk_buff *skb)
{
	struct scratch *scratch = begin_scratch();

	if (!scratch)
		return 0;
	scratch->listener = (u64)listener;
	scratch->checked = (u64)skb;
	scratch->refused = 0;
	scratch->drop_place = 0;
	scratch->drop_reason = 0;
	scratch->child = 0;
	read_arrival(scratch, listener, skb);
	read_cookie_counters(&scratch->before);
	return 0;
}

/*
 * Number of the client's bytes that the server's new socket will never see. secure_tcp_syn_cookie
 * adds the client's sequence number to the hash with the MSS index. So a segment that is n bytes
 * late validates too, as if the index were n less, and the socket starts with that segment. A
 * segment from before the first byte (a keep-alive probe) validates as if the index were higher,
 * and the socket waits for bytes that are never sent. If the entry has had a single SYN-ACK, an ACK
 * for another one belongs to another ISN.
 */
static __always_inline u32 bytes_missed(const struct segment *segment,
					const struct handshake *entry)
{
	u32 missed = segment->sequence - (entry->client_isn + 1);

	if (!entry->syn_count || missed + HIGHEST_MSS_INDEX > 2 * HIGHEST_MSS_INDEX)
		return 0;
	if (entry->syn_count == 1 && segment->acknowledgement != entry->cookie_isn + 1)
		return 0;
	return missed;
}

/* A valid ACK made the child socket. Returns the kind of event to emit; 0: none. */
static __always_inline u8 ack_completed(struct netns_counts *counted, struct segment *segment,
					struct handshake *entry, u64 now, u8 moved)
{
	u32 zero = 0;
	struct trace_config *wanted = config.lookup(&zero);

	ADD(counted->count[COUNT_COMPLETED], 1);
	remember_client(&segment->key, now);
	if (!entry || !wanted) {
		ADD(counted->count[COUNT_COMPLETED_UNTRACKED], 1);
		return 0;
	}
	if (entry->ending == ENDING_NONE && entry->syn_count == 1 && !entry->acks_dropped &&
	    !entry->acks_filtered && segment->sequence == entry->client_isn + 1 &&
	    now - entry->first_syn_ns < wanted->tell_completed_after_ns) {
		end(entry, ENDING_COMPLETED, now, moved);
		forget(&segment->key);
		return 0;
	}
	/* An entry kept because the ring buffer was full has completed before; that counts. */
	if (entry->ending != ENDING_COMPLETED)
		entry->bytes_missed = bytes_missed(segment, entry);
	end(entry, ENDING_COMPLETED, now, moved);
	return EVENT_COMPLETED;
}

/*
 * A valid ACK dropped for a full accept queue identifies its client by itself. If there is no
 * entry, the ACK makes one: the SYN came before tracing began, or there was no room then, or the
 * cookie was made elsewhere. An existing entry is not changed.
 */
static __always_inline void begin_by_ack(struct scratch *scratch, struct netns_counts *counted,
					 u64 now)
{
	struct segment *segment = &scratch->segment;
	struct handshake fresh = {};

	fresh.first_syn_ns = fresh.last_syn_ns = now;
	fresh.client_isn = segment->sequence - 1;
	fresh.cookie_isn = segment->acknowledgement - 1;
	fresh.accept_queue = segment->accept_queue;
	fresh.accept_queue_limit = segment->accept_queue_limit;
	fresh.socket = scratch->socket;
	mark_port(segment->key.server_port);
	if (!new_entry(&segment->key, &fresh))
		ADD(counted->count[COUNT_ACKS_DROPPED_UNTRACKED], 1);
}

static __always_inline u8 ack_dropped(struct scratch *scratch, struct netns_counts *counted,
				      struct handshake *entry, u64 now, u8 moved)
{
	ADD(counted->count[COUNT_ACKS_DROPPED], 1);
	if (!entry) {
		ADD(counted->count[COUNT_ACKS_DROPPED_UNTRACKED], 1);
		return 0;
	}
	go_on(entry);
	if (!entry->acks_dropped)
		entry->first_ack_dropped_ns = now;
	entry->last_ack_dropped_ns = now;
	entry->acks_dropped += 1;
	entry->drop_counters |= moved;
	entry->drop_reason = scratch->drop_reason;
	entry->drop_place = scratch->drop_place;
	choose(&scratch->segment.key);
	return EVENT_ACK_DROPPED;
}

/*
 * cookie_vX_check returned the segment to the listener: it is the client's RST, or an ACK that an
 * RST will answer. Stray segments of former connections come here too. Only a segment with the
 * handshake's sequence numbers ends the handshake.
 */
static __always_inline u8 segment_refused(struct netns_counts *counted, struct segment *segment,
					  struct handshake *entry, u64 now, u8 moved)
{
	bool reset = segment->tcp_flags & TCP_FLAG_RST;
	bool fits = false;

	if (!reset && !(segment->tcp_flags & TCP_FLAG_ACK))
		return 0;
	if (entry && entry->ending == ENDING_NONE) {
		fits = segment->sequence - entry->client_isn <= NEAR_ISN;
		if (!reset && entry->syn_count == 1)
			fits = fits && segment->acknowledgement == entry->cookie_isn + 1;
	}
	if (reset) {
		ADD(counted->count[COUNT_RESETS], 1);
		ADD(counted->count[COUNT_RESETS_UNTRACKED], !fits);
	} else {
		ADD(counted->count[COUNT_ACKS_REJECTED], 1);
		ADD(counted->count[COUNT_ACKS_REJECTED_UNTRACKED], !fits);
	}
	if (!fits)
		return 0;
	end(entry, reset ? ENDING_RESET : ENDING_REJECTED, now, moved);
	return reset ? EVENT_RESET : EVENT_ACK_REJECTED;
}

/* Update the queue figures for a judged ACK. A refused ACK may be a stray that ends nothing. */
static __always_inline struct listener_facts *ack_noted(struct scratch *scratch,
							struct sock *listener,
							const struct handshake *entry, u64 result,
							u8 moved)
{
	struct listener_facts *facts = facts_of(scratch);
	u32 accept_queue;

	if (!facts)
		return 0;
	note_segment(facts, &scratch->segment);
	if (result == (u64)listener)
		return facts;
	if (entry)
		note_answer(facts_owed(scratch, facts, entry), entry);
	if (result) {
		accept_queue = accept_queue_of(listener);
		RAISE(facts->peak_accept_queue, accept_queue);
		return facts;
	}
	if (!(moved & MOVED_LISTEN_OVERFLOWS))
		return facts;
	__sync_fetch_and_add(&facts->acks_refused, 1);
	if (entry && !entry->acks_dropped)
		__sync_fetch_and_add(&facts->turned_away, 1);
	note_accept_need(facts, scratch->segment.accept_queue, syn_queue_of(listener));
	return facts;
}

/*
 * Another CPU may have filled the accept queue between the function's entry and the kernel's check.
 * So the length is read again; only accept() shortens the queue.
 */
static __always_inline void see_full_accept_queue(struct segment *segment, struct sock *listener,
						  u8 moved)
{
	u32 accept_queue;

	if (!(moved & (MOVED_LISTEN_OVERFLOWS | MOVED_UNKNOWN)))
		return;
	accept_queue = accept_queue_of(listener);
	RAISE(segment->accept_queue, accept_queue);
}

/* cookie_vX_check, return: the listener (refused), NULL (dropped) or the child. */
static __always_inline int ack_judged(u64 result)
{
	struct scratch *scratch = own_scratch();
	struct netns_counts *counted;
	struct listener_facts *facts;
	struct handshake *entry;
	struct segment *segment;
	u64 now, listener;
	u8 kind, moved;

	if (!scratch || !scratch->listener)
		return 0;
	listener = scratch->listener;
	scratch->listener = 0;
	/* Before 6.9 the caller of cookie_vX_check drops the packet, right after the return. */
	scratch->refused = result == listener;
	if (scratch->drop_place || (result && !scratch->refused))
		scratch->checked = 0;
	segment = &scratch->segment;
	moved = listen_counters_moved(&scratch->before) | cookie_counters_moved(&scratch->before);
	if (segment->outside) {
		count_outside(scratch, moved);
		return 0;
	}
	counted = counts_of(scratch);
	if (!counted)
		return 0;
	count_moved(counted, segment, moved);
	now = bpf_ktime_get_ns();
	if (!result)
		see_full_accept_queue(segment, (struct sock *)listener, moved);
	if (!result && moved & MOVED_SYNCOOKIES_RECV && moved & MOVED_LISTEN_OVERFLOWS)
		begin_by_ack(scratch, counted, now);
	entry = awaiting_ack.lookup(&segment->key);
	facts = ack_noted(scratch, (struct sock *)listener, entry, result, moved);
	if (result == listener) {
		kind = segment_refused(counted, segment, entry, now, moved);
	} else if (!result) {
		kind = ack_dropped(scratch, counted, entry, now, moved);
	} else {
		scratch->child = result;
		kind = ack_completed(counted, segment, entry, now, moved);
	}
	/* The second condition is only for the verifier: without an entry there is no kind. */
	if (!kind || !entry)
		return 0;
	if (result == listener && !entry->acks_dropped) {
		facts = facts_owed(scratch, facts, entry);
		if (facts && facts->owed)
			__sync_fetch_and_add(&facts->owed, -1);
	}
	if (tell_if_new(counted, kind, segment, entry, now, moved) && kind == EVENT_COMPLETED)
		forget(&segment->key);
	return 0;
}

/*
 * tcp_rcv_state_process (with kprobes its caller), return, for the child that cookie_vX_check has
 * just made on this CPU. The true completion is the change from SYN_RECV to ESTABLISHED. If
 * accept() has returned the child and another CPU is using it, it stays in SYN_RECV without an
 * error, is processed there, and is not counted. An RST answers an error.
 */
static __always_inline int child_processed(struct scratch *scratch, struct sock *child, u32 error)
{
	struct netns_counts *counted = counts_of(scratch);

	scratch->child = 0;
	if (!counted)
		return 0;
	if (error)
		ADD(counted->count[COUNT_STILLBORN], 1);
	else if (READ(child->skc_state) != TCP_STATE_SYN_RECV)
		ADD(counted->count[COUNT_ESTABLISHED], 1);
	return 0;
}

/* tcp_check_req, entry and return: here ordinary handshakes find a full accept queue. */
static __always_inline int request_arrived(struct sock *listener, struct sk_buff *skb)
{
	struct scratch *scratch = begin_scratch();

	if (!scratch)
		return 0;
	read_arrival(scratch, listener, skb);
	scratch->listening = (u64)listener;
	scratch->syn_queue = syn_queue_of(listener);
	scratch->request_checked = 1;
	return 0;
}

static __always_inline int request_handled(void)
{
	struct scratch *scratch = own_scratch();
	struct netns_counts *counted;
	struct listener_facts *facts;
	u32 accept_queue;

	if (!scratch || !scratch->request_checked)
		return 0;
	scratch->request_checked = 0;
	facts = scratch->segment.outside ? 0 : facts_of(scratch);
	if (facts) {
		note_segment(facts, &scratch->segment);
		accept_queue = accept_queue_of((struct sock *)scratch->listening);
		RAISE(facts->peak_accept_queue, accept_queue);
	}
	if (!(listen_counters_moved(&scratch->before) & MOVED_LISTEN_OVERFLOWS))
		return 0;
	counted = counts_of(scratch);
	if (counted)
		ADD(counted->count[FILTERED(COUNT_LISTEN_OVERFLOWS, &scratch->segment)], 1);
	if (!facts)
		return 0;
	__sync_fetch_and_add(&facts->acks_refused, 1);
	note_accept_need(facts, scratch->segment.accept_queue, scratch->syn_queue);
	return 0;
}
