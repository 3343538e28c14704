// SPDX-License-Identifier: GPL-2.0-only
/* Keeps the figures of a listener's two queues. */

static __always_inline void name_listener(struct listener_key *key,
					  const struct handshake_key *handshake, u32 socket)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->netns = handshake->netns;
	key->socket = socket;
	if (socket)
		return;
	__builtin_memcpy(key->server_address, handshake->server_address, 16);
	key->server_port = handshake->server_port;
}

/* The facts of the listener that the segment came to, looked up once per segment. */
static __always_inline struct listener_facts *facts_of(struct scratch *scratch)
{
	struct listener_key *key = &scratch->listener_key;
	struct handshake_key *handshake = &scratch->segment.key;
	struct listener_facts *first = &scratch->first_facts;
	struct listener_facts *facts;

	name_listener(key, handshake, scratch->socket);
	facts = listeners.lookup(key);
	if (!facts && !is_full(TABLE_LISTENERS)) {
		__builtin_memcpy(first->server_address, handshake->server_address, 16);
		first->server_port = key->socket ? scratch->own_port : handshake->server_port;
		noted(TABLE_LISTENERS, listeners.insert(key, first));
		facts = listeners.lookup(key);
	}
	if (!facts)
		lose(LOSS_LISTENERS_UNKNOWN);
	return facts;
}

/*
 * The facts of the listener whose `owed` counts an entry: the one that sent the cookie. The ACK may
 * come to another listener, if a socket joined or left an SO_REUSEPORT group, or if the server was
 * restarted.
 */
static __always_inline struct listener_facts *
facts_owed(struct scratch *scratch, struct listener_facts *facts, const struct handshake *entry)
{
	if (entry->socket == scratch->socket)
		return facts;
	name_listener(&scratch->listener_key, &scratch->segment.key, entry->socket);
	return listeners.lookup(&scratch->listener_key);
}

#define RAISE(place, value)                \
	do {                               \
		if ((place) < (value))     \
			(place) = (value); \
	} while (0)

static __always_inline u32 syn_queue_of(struct sock *listener)
{
	u32 length = 0;

	bpf_probe_read_kernel(&length, sizeof(length), &listener->icsk_accept_queue_qlen);
	return length;
}

/* The pointer was kept as a number since the function's entry, so it is read by address. */
static __always_inline u32 accept_queue_of(struct sock *listener)
{
	u32 length = 0;

	bpf_probe_read_kernel(&length, sizeof(length), &listener->sk_ack_backlog);
	return length;
}

/*
 * Update the queue figures at a segment. A longer queue would not make the server faster, so
 * clients refused since the queue was last empty are waiting together with the queued ones.
 */
static __always_inline void note_segment(struct listener_facts *facts,
					 const struct segment *segment)
{
	facts->limit = segment->accept_queue_limit;
	RAISE(facts->peak_accept_queue, segment->accept_queue);
	if (!segment->accept_queue && facts->turned_away)
		facts->turned_away = 0;
}

static __always_inline void note_accept_need(struct listener_facts *facts, u32 accept_queue,
					     u32 syn_queue)
{
	u32 need = accept_queue + facts->turned_away + syn_queue;

	if (need <= facts->accept_need_accept_queue + facts->accept_need_turned_away +
			    facts->accept_need_syn_queue)
		return;
	facts->accept_need_accept_queue = accept_queue;
	facts->accept_need_turned_away = facts->turned_away;
	facts->accept_need_syn_queue = syn_queue;
}

/* `owes`: the SYN made an entry, or reopened an ended one. */
static __always_inline void note_cookie(struct listener_facts *facts, u32 syn_queue, bool owes,
					u64 now)
{
	if (!facts->cookies_sent || facts->lowest_cookie_syn_queue > syn_queue)
		facts->lowest_cookie_syn_queue = syn_queue;
	__sync_fetch_and_add(&facts->cookies_sent, 1);
	if (owes)
		__sync_fetch_and_add(&facts->owed, 1);
	if (syn_queue + facts->owed <= facts->syn_need_syn_queue + facts->syn_need_owed)
		return;
	facts->syn_need_syn_queue = syn_queue;
	facts->syn_need_owed = facts->owed;
	facts->syn_need_ns = now;
}

static __always_inline bool is_owed(const struct handshake *entry)
{
	return entry->syn_count && entry->ending == ENDING_NONE && !entry->acks_dropped;
}

/* Count an entry as answered, if it was owed an ACK until now; `facts` is from `facts_owed`. */
static __always_inline void note_answer(struct listener_facts *facts, const struct handshake *entry)
{
	if (facts && facts->owed && is_owed(entry))
		__sync_fetch_and_add(&facts->owed, -1);
}
