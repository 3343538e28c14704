// SPDX-License-Identifier: GPL-2.0-only
/* Reads a segment that comes to a listener, and applies the filters. */

static __always_inline bool port_wanted(u16 port)
{
	u32 word = port >> 6;
	u64 *bits = wanted_ports.lookup(&word);

	return bits && (*bits >> (port & 63)) & 1;
}

static __always_inline bool same_address(const u8 *one, const u8 *other)
{
	const u64 *a = (const u64 *)one, *b = (const u64 *)other;

	return a[0] == b[0] && a[1] == b[1];
}

static __always_inline bool is_trial(const struct handshake_key *key)
{
	return *(u32 *)&key->server_address[12] == TRIAL_ADDRESS &&
	       *(u32 *)&key->client_address[12] == TRIAL_ADDRESS;
}

static __always_inline u8 outside_filters(const struct handshake_key *key, u8 family)
{
	u32 zero = 0;
	struct trace_config *wanted = config.lookup(&zero);

	if (!wanted)
		return true;
	if (family == 4 && is_trial(key) && wanted->netns != NOBODYS_NETNS)
		return PASSED_OVER;
	if (wanted->match_ports && !port_wanted(swap16(key->server_port)))
		return true;
	if (wanted->netns && wanted->netns != key->netns)
		return true;
	if (wanted->family && wanted->family != family)
		return true;
	return wanted->match_listener &&
	       !same_address(wanted->listener_address, key->server_address);
}

/* Set since 3d368ab87cf6 ("net: initialize net->net_cookie at netns setup"); before, on request. */
#ifdef HAVE_NET_COOKIE
#define COOKIE_OF(net) READ((net)->net_cookie)
#else
#define COOKIE_OF(net) 0
#endif

/*
 * Read the facts of a segment that came to a listener. Addresses come from the packet, not from the
 * socket, because IPv4 on an IPv6 listener must appear as IPv4.
 */
static __always_inline void read_segment(struct segment *segment, struct sock *listener,
					 struct sk_buff *skb)
{
	struct net *net = READ(listener->skc_net);
	u64 head = (u64)READ(skb->head);
	u64 network = head + READ(skb->network_header);
	u8 tcp[16];
	u8 family = 6;

	if (READ(skb->protocol) == ETH_P_IP_NETWORK_ORDER) {
		u32 addresses[2];
		u32 *client = (u32 *)segment->key.client_address;
		u32 *server = (u32 *)segment->key.server_address;

		family = 4;
		bpf_probe_read_kernel(addresses, sizeof(addresses), (void *)(network + 12));
		client[0] = client[1] = server[0] = server[1] = 0;
		client[2] = server[2] = 0xffff0000; /* ::ffff:0:0/96 in memory, little-endian */
		client[3] = addresses[0];
		server[3] = addresses[1];
	} else {
		bpf_probe_read_kernel(segment->key.client_address, 32, (void *)(network + 8));
	}
	bpf_probe_read_kernel(tcp, sizeof(tcp), (void *)(head + READ(skb->transport_header)));
	segment->key.client_port = *(u16 *)&tcp[0];
	segment->key.server_port = *(u16 *)&tcp[2];
	segment->key.netns = READ(net->inum);
	segment->netns_cookie = COOKIE_OF(net);
	segment->sequence = swap32(*(u32 *)&tcp[4]);
	segment->acknowledgement = swap32(*(u32 *)&tcp[8]);
	segment->tcp_flags = tcp[13];
	segment->payload_length = READ(skb->len) - (tcp[12] >> 4) * 4;
	segment->accept_queue = READ(listener->sk_ack_backlog);
	segment->accept_queue_limit = READ(listener->sk_max_ack_backlog);
	segment->outside = outside_filters(&segment->key, family);
}

#ifdef HAVE_MIB_COUNTERS
/* 0 if unknown; no CPU has the offset 0. */
static __always_inline u64 offset_of_this_cpu(void)
{
	u32 zero = 0;
	struct trace_config *wanted = config.lookup(&zero);
	u64 offset = 0;

	if (!wanted || !wanted->per_cpu_offset_table)
		return 0;
	bpf_probe_read_kernel(
		&offset, sizeof(offset),
		(void *)(wanted->per_cpu_offset_table + bpf_get_smp_processor_id() * sizeof(u64)));
	return offset;
}

static __always_inline struct counter_pair counter_pair(u64 this_cpu, u32 first)
{
	struct counter_pair pair = {};

	bpf_probe_read_kernel(&pair, sizeof(pair), (void *)(this_cpu + first * sizeof(u64)));
	return pair;
}

static __always_inline u8 moved_between(struct counter_pair before, struct counter_pair after,
					u8 first, u8 second)
{
	return (before.first != after.first ? first : 0) |
	       (before.second != after.second ? second : 0);
}

/*
 * The kernel's own counters show its decision even if nothing else does (a cookie refused because
 * there was no recent overflow, an accept queue that was full at the instant of the check). On one
 * CPU with bottom halves off, a difference between entry and return belongs to this segment.
 */
static __always_inline void read_listen_counters(struct counters_before *before,
						 struct sock *listener)
{
	struct net *net = READ(listener->skc_net);
	u64 statistics = 0;

	before->this_cpu = 0;
	if (TASKS_CHANGE_CPUS || !before->cpu_offset)
		before->cpu_offset = offset_of_this_cpu();
	if (!before->cpu_offset)
		return;
	bpf_probe_read_kernel(&statistics, sizeof(statistics), &net->net_statistics);
	before->this_cpu = statistics + before->cpu_offset;
	before->listen = counter_pair(before->this_cpu, MIB_LISTENOVERFLOWS);
}

static __always_inline void read_cookie_counters(struct counters_before *before)
{
	if (before->this_cpu)
		before->cookies = counter_pair(before->this_cpu, MIB_SYNCOOKIESRECV);
}

static __always_inline u8 listen_counters_moved(const struct counters_before *before)
{
	if (!before->this_cpu)
		return MOVED_UNKNOWN;
	return moved_between(before->listen, counter_pair(before->this_cpu, MIB_LISTENOVERFLOWS),
			     MOVED_LISTEN_OVERFLOWS, MOVED_LISTEN_DROPS);
}

static __always_inline u8 cookie_counters_moved(const struct counters_before *before)
{
	if (!before->this_cpu)
		return MOVED_UNKNOWN;
	return moved_between(before->cookies, counter_pair(before->this_cpu, MIB_SYNCOOKIESRECV),
			     MOVED_SYNCOOKIES_RECV, MOVED_SYNCOOKIES_FAILED);
}
#else
#define read_listen_counters(before, listener)
#define read_cookie_counters(before)
#define listen_counters_moved(before) MOVED_UNKNOWN
#define cookie_counters_moved(before) MOVED_UNKNOWN
#endif

/*
 * Read which socket a segment came to. The socket may have another address and port than the
 * packet, and may share them with other sockets.
 */
static __always_inline void read_socket(struct scratch *scratch, struct sock *listener)
{
#ifdef HAVE_SOCKET_INODE
	struct socket *socket = READ(listener->sk_socket);
	u64 inode = 0;

	/* SOCK_INODE: struct socket is the first member of struct socket_alloc. */
	if (socket)
		bpf_probe_read_kernel(&inode, sizeof(inode),
				      &((struct socket_alloc *)socket)->i_ino);
	scratch->socket = inode;
	scratch->own_port = swap16(READ(listener->skc_num));
#endif
}

/* Read all facts of a segment that reached a listener, and of the listener. */
static __always_inline void read_arrival(struct scratch *scratch, struct sock *listener,
					 struct sk_buff *skb)
{
	read_segment(&scratch->segment, listener, skb);
	if (!scratch->segment.outside)
		read_socket(scratch, listener);
	read_listen_counters(&scratch->before, listener);
}
