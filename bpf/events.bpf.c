// SPDX-License-Identifier: GPL-2.0-only
/* Counts segments, emits events to user space, and ends handshakes. */

/* The compared counters that an ACK can move. */
#define MOVED_COMPARED (MOVED_SYNCOOKIES_RECV | MOVED_SYNCOOKIES_FAILED | MOVED_LISTEN_OVERFLOWS)

/* Every *_OUTSIDE count follows its counterpart inside the filters. */
#define FILTERED(which, segment) ((which) + ((segment)->outside ? 1 : 0))

static __always_inline void count_moved(struct netns_counts *counted, const struct segment *segment,
					u8 moved)
{
	if (moved & MOVED_SYNCOOKIES_RECV)
		ADD(counted->count[FILTERED(COUNT_COOKIES_RECEIVED, segment)], 1);
	if (moved & MOVED_SYNCOOKIES_FAILED)
		ADD(counted->count[FILTERED(COUNT_COOKIES_FAILED, segment)], 1);
	if (moved & MOVED_LISTEN_OVERFLOWS)
		ADD(counted->count[FILTERED(COUNT_LISTEN_OVERFLOWS, segment)], 1);
}

/* Count a segment outside the filters. Most move no counter, and then make no entry. */
static __always_inline void count_outside(struct scratch *scratch, u8 moved)
{
	struct netns_counts *counted;

	if (!(moved & MOVED_COMPARED))
		return;
	counted = counts_of(scratch);
	if (counted)
		count_moved(counted, &scratch->segment, moved);
}

/* The unit of told_at is 2^20 ns, about a millisecond: 32 bits last for weeks. */
#define TOLD_SHIFT 20

/* Emit an event. Returns whether it was sent; if not, the table's entry has to keep the fact. */
static __always_inline bool tell(struct netns_counts *counted, u8 kind,
				 const struct segment *segment, struct handshake *handshake,
				 u64 now, u8 moved)
{
	/* Written in place, because some programs have no room for it on their stack. */
	struct event *event = events.ringbuf_reserve(sizeof(struct event));

	if (!event) {
		ADD(counted->count[COUNT_EVENTS_LOST], 1);
		return false;
	}
	event->key = segment->key;
	event->handshake = *handshake;
	event->time_ns = now;
	event->sequence = segment->sequence;
	event->acknowledgement = segment->acknowledgement;
	event->accept_queue = segment->accept_queue;
	event->accept_queue_limit = segment->accept_queue_limit;
	event->payload_length = segment->payload_length;
	event->tcp_flags = segment->tcp_flags;
	event->counters = moved;
	event->kind = kind;
	__builtin_memset(event->padding, 0, sizeof(event->padding));
	events.ringbuf_submit(event, 0);
	handshake->told_kind = kind;
	handshake->told_at = now >> TOLD_SHIFT;
	return true;
}

/*
 * Whether a repeated SYN may be told. The entry has the same facts, so such an event is only
 * sooner. A flood must not fill the ring buffer with them, however long user space does not read.
 */
static __always_inline bool repeats_have_room(const struct trace_config *wanted)
{
	u32 index = REPEATS_TOLD;
	u32 *told = repeats.lookup(&index), *read;

	index = REPEATS_READ;
	read = repeats.lookup(&index);
	return told && read && *told - *read < wanted->most_repeats_unread;
}

static __always_inline void note_repeat(void)
{
	u32 index = REPEATS_TOLD;
	u32 *told = repeats.lookup(&index);

	if (told)
		__sync_fetch_and_add(told, 1);
}

/*
 * A peer may repeat such segments as fast as it likes. So an event is emitted only if it has
 * another kind than the entry's last event, or if that is some time ago. The entry counts every
 * segment.
 */
static __always_inline bool tell_if_new(struct netns_counts *counted, u8 kind,
					const struct segment *segment, struct handshake *handshake,
					u64 now, u8 moved)
{
	u32 zero = 0, since = (u32)(now >> TOLD_SHIFT) - handshake->told_at;
	struct trace_config *wanted = config.lookup(&zero);
	u64 again_after;

	if (handshake->told_kind == kind && wanted) {
		again_after = segment->tcp_flags & TCP_FLAG_SYN ? wanted->tell_syn_again_after_ns
								: wanted->tell_ack_again_after_ns;
		if (since < (u32)(again_after >> TOLD_SHIFT))
			return false;
	}
	if (kind == EVENT_SYN_REPEATED && wanted && !repeats_have_room(wanted))
		return false;
	if (!tell(counted, kind, segment, handshake, now, moved))
		return false;
	if (kind == EVENT_SYN_REPEATED)
		note_repeat();
	return true;
}

static __always_inline void end(struct handshake *handshake, u8 ending, u64 now, u8 moved)
{
	handshake->ended_ns = now;
	handshake->end_counters = moved;
	handshake->ending = ending;
}

/* Whether the client answered a cookie's SYN-ACK; it is then established and accepts no other. */
static __always_inline bool has_answered(const struct handshake *entry)
{
	return entry->acks_dropped || entry->acks_filtered;
}

/*
 * The ACK for a cookie's SYN-ACK came after a repeated SYN of the same client got a place in the
 * SYN queue. That request will never complete, because tcp_check_req wants the ACK for the
 * request's own SYN-ACK and passes any other to the listener and cookie_vX_check. The cookie
 * handshake may still complete, so its entry is open again.
 */
static __always_inline void go_on(struct handshake *entry)
{
	if (entry->ending != ENDING_TAKEN_OVER)
		return;
	entry->ending = ENDING_NONE;
	entry->ended_ns = 0;
	entry->end_counters = 0;
}
