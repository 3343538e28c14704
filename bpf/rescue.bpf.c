// SPDX-License-Identifier: GPL-2.0-only
/* For --rescue: known clients, chosen handshakes, and the cookie's SYN-ACK as it was sent. */

#ifdef PROBE_tcp_make_synack
static __always_inline struct known_client client_of(const struct handshake_key *key)
{
	struct known_client client = {};

	__builtin_memcpy(client.client_address, key->client_address, 16);
	__builtin_memcpy(client.server_address, key->server_address, 16);
	client.netns = key->netns;
	client.server_port = key->server_port;
	return client;
}

static __always_inline void remember_client(const struct handshake_key *key, u64 now)
{
	struct known_client client = client_of(key);

	known_clients.update(&client, &now);
}

/*
 * Handshakes that a rescue may be for have a small table of their own, because in a flood a sweep
 * of the large one takes longer than a cookie lives. If the small table is full, they wait for a
 * sweep.
 */
static __always_inline void choose(struct handshake_key *key)
{
	u8 yes = 1;

	if (!is_full(TABLE_CHOSEN))
		noted(TABLE_CHOSEN, chosen.insert(key, &yes));
}

static __always_inline void choose_if_known(struct handshake_key *key)
{
	struct known_client client = client_of(key);

	if (known_clients.lookup(&client))
		choose(key);
}
#else
#define remember_client(key, now)
#define choose(key)
#define choose_if_known(key)
#endif

#ifdef PROBE_tcp_make_synack
/*
 * tcp_make_synack, return, if tcp_conn_request called it: the cookie's SYN-ACK, with complete TCP
 * header and options. (Other callers repeat the SYN-ACKs of the SYN queue, from a timer.)
 */
static __always_inline int synack_made(struct sk_buff *made)
{
	struct scratch *scratch = own_scratch();
	struct synack synack = {};
	u64 place;

	if (!made || !scratch || !scratch->syn || !scratch->handshake_tracked)
		return 0;
	place = (u64)READ(made->head) + READ(made->transport_header);
	bpf_probe_read_kernel(synack.segment, sizeof(synack.segment), (void *)place);
	synacks.update(&scratch->segment.key, &synack);
	return 0;
}
#endif

#ifdef PROBE_inet_csk_complete_hashdance
/* inet_csk_complete_hashdance, return, within tcp_check_req: an ordinary handshake completed. */
static __always_inline int request_completed(u64 child)
{
	struct scratch *scratch = own_scratch();

	if (child && scratch && scratch->request_checked && !scratch->segment.outside)
		remember_client(&scratch->segment.key, bpf_ktime_get_ns());
	return 0;
}
#endif
