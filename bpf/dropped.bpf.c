// SPDX-License-Identifier: GPL-2.0-only
/* A packet is dropped on this host: whether it is an awaited ACK, where it was dropped, and why. */

#ifdef PROBE_kfree_skb

/* A capture with a full buffer drops only its copy; the packet goes on. */
#ifdef REASON_PACKET_SOCK_ERROR
#define IS_NO_LOSS(reason) ((reason) == REASON_PACKET_SOCK_ERROR)
#else
#define IS_NO_LOSS(reason) false
#endif

#ifdef REASON_NO_SOCKET
#define IS_WITHOUT_SOCKET(reason) ((reason) == REASON_NO_SOCKET)
#else
#define IS_WITHOUT_SOCKET(reason) false
#endif

/* Bytes up to and including TCP's ports, for IPv4 without options and for IPv6. */
#define IPV4_PORTS_BYTES     24
#define IPV6_PORTS_BYTES     44
#define IPV4_BYTES	     20
#define IPV6_BYTES	     40
#define TCP_BYTES	     20
#define IPV4_WITHOUT_OPTIONS 0x45 /* the first byte of such a header */

/* IPv6's possible headers before TCP's (RFC 8200, 4.1), and the largest number of them examined. */
#define IPV6_HOP_BY_HOP		0
#define IPV6_ROUTING		43
#define IPV6_FRAGMENT		44
#define IPV6_AUTHENTICATION	51
#define IPV6_DESTINATION	60
#define IPV6_EXTENSIONS		6
#define IPV6_FRAGMENT_OFFSET_LE 0xf8ff /* mask of the fragment offset, in network order */

/* IPv6's header and TCP's without options; the same with IPv4 is shorter. */
#define HEADERS_BYTES 60

/*
 * Aligned, so that a port is a single load. If it is composed of two bytes, the verifier of 5.10
 * does not know its upper bound, and refuses it as an index.
 */
struct headers {
	u8 bytes[64]; /* IP header, its part of fixed length */
	u8 tcp[24];
	u32 length; /* bytes of all headers before TCP's */
} __attribute__((aligned(8)));

static __always_inline bool is_ipv6_extension(u8 header)
{
	return header == IPV6_HOP_BY_HOP || header == IPV6_ROUTING || header == IPV6_FRAGMENT ||
	       header == IPV6_AUTHENTICATION || header == IPV6_DESTINATION;
}

/* Offset of TCP's header after IPv6's header and extensions; 0 if there is none. */
static __always_inline u32 length_of_ipv6_headers(u64 at, u8 next)
{
	u32 length = IPV6_BYTES;
	u8 extension[4];
	int count;

#pragma unroll
	for (count = 0; count < IPV6_EXTENSIONS; count++) {
		if (next == IPPROTO_TCP)
			return length;
		bpf_probe_read_kernel(extension, sizeof(extension), (void *)(at + length));
		if (next == IPV6_FRAGMENT) {
			/* Only the first fragment has TCP's header. */
			if (*(u16 *)&extension[2] & IPV6_FRAGMENT_OFFSET_LE)
				return 0;
			length += 8;
		} else if (next == IPV6_AUTHENTICATION) {
			length += (extension[1] + 2) * 4;
		} else if (is_ipv6_extension(next)) {
			length += (extension[1] + 1) * 8;
		} else {
			return 0;
		}
		next = extension[0];
	}
	return next == IPPROTO_TCP ? length : 0;
}

/*
 * Read the IP and TCP headers in the linear part of a packet that may be anywhere between the
 * driver and TCP. Its transport header is not reliable, and before IP its network header is not
 * either.
 */
static __always_inline bool read_headers(struct headers *headers, const struct packet_span *packet)
{
	u64 head = (u64)packet->head, at = head + packet->network_header;
	bool ipv4 = packet->protocol == ETH_P_IP_NETWORK_ORDER;
	u8 version = ipv4 ? 4 : 6;
	u32 length;

	bpf_probe_read_kernel(headers->bytes, HEADERS_BYTES, (void *)at);
	if (headers->bytes[0] >> 4 != version) {
		at = (u64)packet->data;
		bpf_probe_read_kernel(headers->bytes, HEADERS_BYTES, (void *)at);
		if (headers->bytes[0] >> 4 != version)
			return false;
	}
	if (ipv4 && headers->bytes[9] != IPPROTO_TCP)
		return false;
	/* Only the first fragment has TCP's header. */
	if (ipv4 && (headers->bytes[6] & 0x1f || headers->bytes[7]))
		return false;
	length = ipv4 ? (headers->bytes[0] & 0xf) * 4
		      : length_of_ipv6_headers(at, headers->bytes[6]);
	if (!length || at + length + TCP_BYTES > head + packet->tail)
		return false;
	headers->length = length;
	if (length == IPV4_BYTES)
		__builtin_memcpy(headers->tcp, headers->bytes + IPV4_BYTES, TCP_BYTES);
	else if (length == IPV6_BYTES)
		__builtin_memcpy(headers->tcp, headers->bytes + IPV6_BYTES, TCP_BYTES);
	else
		bpf_probe_read_kernel(headers->tcp, TCP_BYTES, (void *)(at + length));
	return true;
}

/*
 * The device by which a packet came, or 0. TCP clears skb->dev before a listener gets the packet
 * (tcp_v4_rcv, tcp_v6_rcv). By then the packet has a route, whose device is in the same namespace.
 */
static __always_inline struct net_device *device_of(struct sk_buff *skb, bool *socket_has_it)
{
	struct net_device *device = 0;
	struct dst_entry *route;
	u64 reference = 0;

	bpf_probe_read_kernel(&device, sizeof(device), &skb->dev);
	*socket_has_it = !device;
	if (device)
		return device;
	bpf_probe_read_kernel(&reference, sizeof(reference), &skb->skb_refdst);
	route = (struct dst_entry *)(reference & ~SKB_DST_NOREF);
	if (route)
		bpf_probe_read_kernel(&device, sizeof(device), &route->dev);
	return device;
}

/* Where a packet came from, and how far it got. */
struct way {
	u32 device; /* index */
	bool socket_has_it;
};

/* Read the key and sequence numbers of a packet; false if the filters exclude it. */
static __always_inline bool read_freed(struct segment *segment, const struct headers *headers,
				       u64 skb, bool ipv4, struct way *way)
{
	u32 *client = (u32 *)segment->key.client_address;
	u32 *server = (u32 *)segment->key.server_address;
	struct net_device *device;
	struct net *net = 0;
	u16 length;

	device = device_of((struct sk_buff *)skb, &way->socket_has_it);
	if (!device)
		return false;
	way->device = 0;
	if (!way->socket_has_it)
		bpf_probe_read_kernel(&way->device, sizeof(u32), &device->ifindex);
	bpf_probe_read_kernel(&net, sizeof(net), &device->nd_net);
	bpf_probe_read_kernel(&segment->key.netns, sizeof(u32), &net->inum);
#ifdef HAVE_NET_COOKIE
	bpf_probe_read_kernel(&segment->netns_cookie, sizeof(u64), &net->net_cookie);
#endif
	if (ipv4) {
		client[2] = server[2] = 0xffff0000;
		client[3] = *(u32 *)&headers->bytes[12];
		server[3] = *(u32 *)&headers->bytes[16];
		length = swap16(*(u16 *)&headers->bytes[2]) - headers->length;
	} else {
		__builtin_memcpy(segment->key.client_address, headers->bytes + 8, 32);
		length = swap16(*(u16 *)&headers->bytes[4]) + IPV6_BYTES - headers->length;
	}
	segment->key.client_port = *(u16 *)&headers->tcp[0];
	segment->key.server_port = *(u16 *)&headers->tcp[2];
	segment->sequence = swap32(*(u32 *)&headers->tcp[4]);
	segment->acknowledgement = swap32(*(u32 *)&headers->tcp[8]);
	segment->tcp_flags = headers->tcp[13];
	segment->payload_length = length - (headers->tcp[12] >> 4) * 4;
	return !outside_filters(&segment->key, ipv4 ? 4 : 6);
}

/* Whether the segment is the handshake's ACK, by the same conditions as in segment_refused. */
static __always_inline bool answers(const struct segment *segment, const struct handshake *entry)
{
	bool for_cookie = segment->acknowledgement == entry->cookie_isn + 1;

	if (segment->sequence - entry->client_isn > NEAR_ISN)
		return false;
	if (entry->ending == ENDING_TAKEN_OVER)
		return for_cookie;
	return entry->ending == ENDING_NONE && (for_cookie || entry->syn_count > 1);
}

/*
 * Whether the packet is the one that cookie_vX_check drops, or that its caller drops or answers
 * with an RST right after. That packet may have been freed without passing here, and another packet
 * may have its memory, so the sequence numbers must match too.
 */
static __always_inline bool dropped_by_check(u64 skb, const struct segment *segment, u64 place,
					     u32 reason, struct handshake *entry)
{
	struct scratch *scratch = own_scratch();

	if (!scratch || scratch->checked != skb)
		return false;
	if (scratch->segment.sequence != segment->sequence ||
	    scratch->segment.acknowledgement != segment->acknowledgement)
		return false;
	if (scratch->listener) {
		scratch->drop_place = place;
		scratch->drop_reason = reason;
		return true;
	}
	scratch->checked = 0;
	if (scratch->refused)
		return true;
	entry->drop_place = place;
	entry->drop_reason = reason;
	return true;
}

/*
 * The table of stacks has one entry for each hash value, and get_stackid() refuses a second stack
 * with the same hash (EEXIST; __bpf_get_stackid). Leaving out frames changes the hash, and the
 * three innermost frames are not needed: the program, bpf_trace_run and kfree_skb.
 */
static __always_inline u32 stack_number(void *ctx)
{
	int left_out;
	int stack;

#pragma unroll
	for (left_out = 0; left_out < 4; left_out++) {
		stack = stacks.get_stackid(ctx, left_out);
		if (stack >= 0)
			return stack + 1;
	}
	lose(LOSS_STACKS_UNKNOWN);
	return 0;
}

/*
 * Whether a packet may be an ACK that an entry awaits, by the two bytes at TCP's destination port,
 * which rule out nearly all other packets. Also true if the IP header is elsewhere or longer than
 * usual, or if another protocol has such a number there.
 */
static __always_inline bool may_be_awaited(u16 protocol, u64 network)
{
	u8 bytes[IPV6_PORTS_BYTES] __attribute__((aligned(8)));

	if (protocol == ETH_P_IP_NETWORK_ORDER) {
		bpf_probe_read_kernel(bytes, IPV4_PORTS_BYTES, (void *)network);
		if (bytes[0] != IPV4_WITHOUT_OPTIONS)
			return true;
		return port_marked(*(u16 *)&bytes[22]);
	}
	if (protocol != ETH_P_IPV6_NETWORK_ORDER)
		return false;
	bpf_probe_read_kernel(bytes, IPV6_PORTS_BYTES, (void *)network);
	if (bytes[0] >> 4 != 6 || is_ipv6_extension(bytes[6]))
		return true;
	return port_marked(*(u16 *)&bytes[42]);
}

/* The client's segment found no listener: an RST goes out, and no ACK is owed any more. */
static __always_inline void met_no_listener(struct netns_counts *counted, struct segment *segment,
					    struct handshake *entry, u64 now)
{
	struct listener_key key;

	name_listener(&key, &segment->key, entry->socket);
	note_answer(listeners.lookup(&key), entry);
	ADD(counted->count[COUNT_NO_LISTENER], 1);
	end(entry, ENDING_NO_LISTENER, now, 0);
	tell(counted, EVENT_NO_LISTENER, segment, entry, now, 0);
}

/* Note a dropped packet, if it is an awaited ACK. */
static __always_inline int packet_dropped(void *ctx, u64 skb, u64 place, u32 reason)
{
	struct netns_counts *counted;
	struct packet_span packet;
	struct netns_key netns;
	struct headers headers;
	struct segment segment = {};
	struct handshake *entry;
	struct way way;
	bool ipv4;
	u32 stack;
	u64 now;

	bpf_probe_read_kernel(&packet, sizeof(packet), (void *)(skb + PACKET_SPAN_AT));
	ipv4 = packet.protocol == ETH_P_IP_NETWORK_ORDER;
	if (!ipv4 && packet.protocol != ETH_P_IPV6_NETWORK_ORDER)
		return 0;
	if (!read_headers(&headers, &packet))
		return 0;
	if ((headers.tcp[13] & (TCP_FLAG_ACK | TCP_FLAG_SYN | TCP_FLAG_RST)) != TCP_FLAG_ACK)
		return 0;
	if (!port_marked(*(u16 *)&headers.tcp[2]))
		return 0;
	if (!read_freed(&segment, &headers, skb, ipv4, &way))
		return 0;
	entry = awaiting_ack.lookup(&segment.key);
	if (!entry || !answers(&segment, entry))
		return 0;
	if (dropped_by_check(skb, &segment, place, reason, entry))
		return 0;
	if (IS_NO_LOSS(reason))
		return 0;
	netns = netns_of(&segment);
	counted = counts.lookup(&netns);
	if (!counted)
		counted = counts_of_others();
	if (!counted)
		return 0;
	now = bpf_ktime_get_ns();
	/* A drop for a full accept queue has the same reason, but then a socket has the packet. */
	if (IS_WITHOUT_SOCKET(reason) && !way.socket_has_it) {
		met_no_listener(counted, &segment, entry, now);
		return 0;
	}
	stack = stack_number(ctx);
	go_on(entry);
	if (!entry->acks_filtered)
		entry->first_ack_filtered_ns = now;
	entry->last_ack_filtered_ns = now;
	entry->acks_filtered += 1;
	entry->filter_place = place;
	entry->filter_reason = reason;
	entry->filter_stack = stack;
	entry->filter_device = way.device;
	ADD(counted->count[COUNT_ACKS_FILTERED], 1);
	tell_if_new(counted, EVENT_ACK_FILTERED, &segment, entry, now, 0);
	return 0;
}

#ifdef KFREE_SKB_HAS_REASON
#define DROP_REASON(argument) ((u32)(argument))
#else
#define DROP_REASON(argument) 0
#endif

/*
 * skb:kfree_skb runs for every packet dropped anywhere on this host, up to half a million per
 * second, so the cheapest check that excludes most of them comes first. It nests in the other
 * programs' functions and in itself, so all its data is on its own stack.
 *
 * There are two variants, and only one of them is loaded. If the kernel's BTF describes the
 * argument, members are read by plain loads, which cost a tenth of a bpf_probe_read_kernel call.
 * The context is an array here, because BCC reads through that helper whatever it recognizes as a
 * pointer from a context member.
 */
int packet_freed_typed(unsigned long long *ctx)
{
	struct sk_buff *skb = (struct sk_buff *)ctx[0];
	u64 head = (u64)skb->head;
	u64 transport = skb->transport_header, network = skb->network_header;
	u16 port;

	/*
	 * The transport header follows IPv4's header, as IP or this host's own sender has set it.
	 * IPv6 sets it behind its own header, whatever follows there (ip6_rcv_core), so it says
	 * nothing.
	 */
	if (transport == network + IPV4_BYTES) {
		bpf_probe_read_kernel(&port, sizeof(port), (void *)(head + transport + 2));
		if (!port_marked(port))
			return 0;
	} else if (!may_be_awaited(skb->protocol, head + network)) {
		return 0;
	}
	return packet_dropped(ctx, (u64)skb, ctx[1], DROP_REASON(ctx[2]));
}

int packet_freed(struct bpf_raw_tracepoint_args *ctx)
{
	struct packet_span packet;
	u64 skb = ctx->args[0];

	bpf_probe_read_kernel(&packet, sizeof(packet), (void *)(skb + PACKET_SPAN_AT));
	if (!may_be_awaited(packet.protocol, (u64)packet.head + packet.network_header))
		return 0;
	return packet_dropped(ctx, skb, ctx->args[1], DROP_REASON(ctx->args[2]));
}

#endif
