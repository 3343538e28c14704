// SPDX-License-Identifier: GPL-2.0-only
/*
 * The kernel side: the table of handshakes that are still owed an ACK, and events about them.
 * It records facts and judges nothing.
 *
 * One set of bodies, two thin sets of entries at the end (TCPSTUCK_FENTRY or kprobes). All
 * probed functions run with bottom halves off, on one CPU from entry to return and never nested:
 * what an entry finds out is left in a per-CPU scratch for the return, because the function in
 * between may free the packet (cookie_vX_check does from 6.9 on). A function that also runs in
 * process context must not be probed by kprobe: while its program is at work the kernel runs no
 * other one on that CPU (bpf_prog_active in trace_call_bpf), and packets of a softirq that comes
 * in between would pass unseen.
 *
 * On PREEMPT_RT only a lock of local_bh_disable()'s keeps packets of one CPU apart, and where it is
 * not taken (SOFTIRQS_INTERLEAVE) one may come between another's entry and return. Each task has a
 * scratch of its own then. What is left is a declared gap (softirq_gaps in kernel/softirqs.py): by
 * fentry the kernel runs no program that a packet of the same CPU is in the midst of, and its
 * counters, too, are per CPU.
 *
 * All in one text, because BCC translates map accesses only in the text it is given, not in what
 * that includes.
 *
 * KERNEL_LAYOUT_H is generated from the kernel's BTF (kernel/layout.py): structs that hold only the
 * members named here, at their true offsets.
 */
#include <uapi/linux/ptrace.h>
#include KERNEL_LAYOUT_H
#include "tcpstuck.h"

#define ETH_P_IP_NETWORK_ORDER	 0x0008
#define ETH_P_IPV6_NETWORK_ORDER 0xdd86
#define IPPROTO_TCP		 6
#define TCP_STATE_SYN_RECV	 3
#define TCP_FLAG_SYN		 0x02
#define TCP_FLAG_RST		 0x04
#define TCP_FLAG_ACK		 0x10
/* Of a packet's reference to its route, whether it is not counted (include/linux/skbuff.h). */
#define SKB_DST_NOREF 1ULL
/* How far from its ISN a segment may be and still be believed to belong to the handshake. */
#define NEAR_ISN (1 << 20)
/* What a full hash refuses an entry with: -E2BIG (alloc_htab_elem). */
#define REFUSED_FULL -7
/* The highest index into msstab[] of net/ipv4/syncookies.c and net/ipv6/syncookies.c. */
#define HIGHEST_MSS_INDEX 3

/* BTF-typed arguments of fentry programs are read by plain loads, kprobe arguments are not. */
#ifdef TCPSTUCK_FENTRY
#define READ(place) (place)
#else
#define READ(place)                                                       \
	({                                                                \
		__typeof__(place) value_ = 0;                             \
		bpf_probe_read_kernel(&value_, sizeof(value_), &(place)); \
		value_;                                                   \
	})
#endif

struct segment {
	struct handshake_key key;
	u64 netns_cookie; /* struct netns_key */
	u32 sequence;
	u32 acknowledgement;
	u32 accept_queue;
	u32 accept_queue_limit;
	u16 payload_length;
	u8 tcp_flags;
	u8 outside; /* of what the user asked to see; PASSED_OVER: of what is to be counted, too */
};

#define PASSED_OVER 2

/* Two of the kernel's counters that are neighbours in its array: one read gets both. */
struct counter_pair {
	u64 first;
	u64 second;
};

/* Tables that may be full, and whether they are is remembered. */
enum table {
	TABLE_AWAITING_ACK,
	TABLE_COUNTS,
	TABLE_LISTENERS,
	TABLES,
};

struct counters_before {
	u64 cpu_offset; /* of this CPU's copy of per-CPU data; it never changes */
	u64 this_cpu; /* this CPU's struct linux_mib of the segment's namespace; 0: not known */
	struct counter_pair cookies; /* SyncookiesRecv, SyncookiesFailed */
	struct counter_pair listen; /* ListenOverflows, ListenDrops */
};

/*
 * One per CPU: no probed function is entered while another one is at work on the same CPU, so
 * they share the segment and the counters. One per task where softirqs may preempt each other.
 */
struct scratch {
	struct segment segment;
	struct counters_before before;
	u64 syn; /* the SYN that tcp_conn_request is at work on */
	u64 mss_place; /* kprobe only: where cookie_vX_init_sequence will write the MSS */
	u64 listening; /* socket that tcp_conn_request or tcp_check_req is at work for */
	u64 listener; /* that cookie_vX_check is at work for */
	u32 socket; /* inode number of the one that the segment came to; 0: not known */
	u16 own_port; /* its own, in network order */
	u64 checked; /* its packet, as long as it may still be dropped on its behalf */
	u32 refused; /* the packet is freed because it is answered by RST */
	u64 drop_place; /* where it was dropped within cookie_vX_check */
	u32 drop_reason;
	u64 child; /* made by cookie_vX_check, on its way to tcp_rcv_state_process */
	u64 child_entered; /* kprobe only */
	u32 syn_queue;
	u32 cookie_sent;
	u32 handshake_tracked; /* the SYN's cookie handshake has an entry */
	u32 request_checked; /* tcp_check_req is at work */
	struct netns_counts none; /* zeros, for a namespace's first */
	struct listener_key listener_key;
	struct listener_facts first_facts; /* zeros but for whose they are */
};

#define STACK_FRAMES 16

struct stack {
	u64 frames[STACK_FRAMES];
};

/* For each port, in network order, whether a cookie was sent from it. */
struct port_marks {
	u8 marks[65536];
};

enum loss {
	LOSS_NAMESPACES_UNCOUNTED, /* segments in namespaces there was no room for in the counts */
	LOSS_COOKIES_UNMATCHED, /* a cookie was chosen outside tcp_conn_request */
	LOSS_LISTENERS_UNKNOWN, /* SYNs and ACKs of listeners there was no room for */
	LOSS_STACKS_UNKNOWN, /* dropped ACKs whose callers there was no room for */
	LOSS_TASKS_UNKNOWN, /* SYNs and ACKs in softirqs of tasks there was no room for */
	LOSS_MAX,
};

/* The loader makes these tables as large as they are to be (table_entries in source.py). */
#define SIZED_WHEN_LOADED 1

BPF_TABLE("hash", struct handshake_key, struct handshake, awaiting_ack, SIZED_WHEN_LOADED);
BPF_TABLE("percpu_hash", struct netns_key, struct netns_counts, counts, SIZED_WHEN_LOADED);
BPF_PERCPU_ARRAY(crowded_out, struct netns_counts, 1); /* of namespaces without a place there */
BPF_TABLE("hash", struct listener_key, struct listener_facts, listeners, SIZED_WHEN_LOADED);
BPF_RINGBUF_OUTPUT(events, SIZED_WHEN_LOADED);
#ifdef PROBE_tcp_make_synack
BPF_TABLE("hash", struct handshake_key, struct synack, synacks, SIZED_WHEN_LOADED);
BPF_TABLE("lru_hash", struct known_client, u64, known_clients, SIZED_WHEN_LOADED);
BPF_TABLE("hash", struct handshake_key, u8, chosen, SIZED_WHEN_LOADED);
#endif
#ifdef PROBE_kfree_skb
BPF_TABLE("stacktrace", u32, struct stack, stacks, SIZED_WHEN_LOADED);
BPF_ARRAY(cookie_ports, struct port_marks, 1);
#endif
BPF_ARRAY(config, struct trace_config, 1);
BPF_ARRAY(table_is_full, u32, TABLES);
BPF_ARRAY(wanted_ports, u64, 1024); /* one bit per port; BCC is slow with arrays in a value */
#ifdef SOFTIRQS_INTERLEAVE
BPF_TABLE("lru_hash", u64, struct scratch, scratches, SIZED_WHEN_LOADED);
BPF_ARRAY(no_scratch, struct scratch, 1); /* zeros, for a task's first: too much for the stack */
#else
BPF_PERCPU_ARRAY(scratches, struct scratch, 1);
#endif
BPF_PERCPU_ARRAY(losses, u64, LOSS_MAX);

static __always_inline u16 swap16(u16 value)
{
	return __builtin_bswap16(value);
}

static __always_inline u32 swap32(u32 value)
{
	return __builtin_bswap32(value);
}

/* Counts are per CPU: plain additions are exact where no packet's program preempts another's. */
#ifdef SOFTIRQS_INTERLEAVE
#define ADD(place, number) __sync_fetch_and_add(&(place), number)
#define TASKS_CHANGE_CPUS  true
#else
#define ADD(place, number) ((place) += (number))
#define TASKS_CHANGE_CPUS  false
#endif

static __always_inline void lose(u32 what)
{
	u64 *count = losses.lookup(&what);

	if (count)
		ADD(*count, 1);
}

/* What the program at a function's entry left for the one at its return. */
#ifdef SOFTIRQS_INTERLEAVE
/* A task takes its softirqs one after the other, whichever packets of other tasks preempt it. */
static __always_inline u64 this_task(void)
{
	u32 thread = bpf_get_current_pid_tgid();

	/* 0 is the idle task of every CPU. */
	return thread ? thread : 1ULL << 32 | bpf_get_smp_processor_id();
}

static __always_inline struct scratch *own_scratch(void)
{
	u64 task = this_task();

	return scratches.lookup(&task);
}

static __always_inline struct scratch *begin_scratch(void)
{
	struct scratch *found = own_scratch();
	u64 task = this_task();
	struct scratch *none;
	u32 zero = 0;

	if (found)
		return found;
	none = no_scratch.lookup(&zero);
	if (none)
		scratches.insert(&task, none);
	found = own_scratch();
	if (!found)
		lose(LOSS_TASKS_UNKNOWN);
	return found;
}
#else
static __always_inline struct scratch *own_scratch(void)
{
	u32 zero = 0;

	return scratches.lookup(&zero);
}

#define begin_scratch own_scratch
#endif

/*
 * A table that is full is asked for no more room. To find that there is none takes the lock of
 * every CPU's free list before 54a9c3a42d92 ("bpf: Avoid grabbing spin_locks of all cpus when no
 * free elems"), for each SYN of a flood. So it is found once, and remembered until an entry
 * goes or user space has swept the tables.
 */
static __always_inline bool is_full(u32 table)
{
	u32 *full = table_is_full.lookup(&table);

	return full && *full;
}

static __always_inline long noted(u32 table, long refused)
{
	u32 *full = table_is_full.lookup(&table);

	if (full && refused == REFUSED_FULL)
		*full = 1;
	return refused;
}

/* Not to be traced for want of a place among the counts would be the greater loss. */
static __always_inline struct netns_counts *counts_of_others(void)
{
	u32 zero = 0;

	lose(LOSS_NAMESPACES_UNCOUNTED);
	return crowded_out.lookup(&zero);
}

static __always_inline struct netns_key netns_of(const struct segment *segment)
{
	struct netns_key key = {};

	key.cookie = segment->netns_cookie;
	key.netns = segment->key.netns;
	return key;
}

/* The counts of a namespace, looked up once per segment. */
static __always_inline struct netns_counts *counts_of(struct scratch *scratch)
{
	struct netns_key key = netns_of(&scratch->segment);
	struct netns_counts *found;

	if (scratch->segment.outside == PASSED_OVER)
		return 0;
	found = counts.lookup(&key);
	if (!found && !is_full(TABLE_COUNTS)) {
		noted(TABLE_COUNTS, counts.insert(&key, &scratch->none));
		found = counts.lookup(&key);
	}
	return found ? found : counts_of_others();
}

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

/* From 3d368ab87cf6 on ("net: initialize net->net_cookie at netns setup"); before, when asked. */
#ifdef HAVE_NET_COOKIE
#define COOKIE_OF(net) READ((net)->net_cookie)
#else
#define COOKIE_OF(net) 0
#endif

/*
 * What is to be known of a segment that came to a listener. Addresses come from the packet, not
 * from the socket: IPv4 on an IPv6 listener must show as IPv4.
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
/* 0 where it is not known, which no CPU's offset is. */
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
 * The kernel's own counters say what it decided, even where the decision leaves no other trace
 * (a cookie refused for want of a recent overflow, an accept queue that was full at the one
 * instant it was looked at). On one CPU, with bottom halves off, a difference between entry and
 * return belongs to this very segment.
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
 * Which socket a segment came to: a packet's address and port need not be the socket's own, nor its
 * alone.
 */
static __always_inline void read_socket(struct scratch *scratch, struct sock *listener)
{
#ifdef HAVE_SOCKET_INODE
	struct socket *socket = READ(listener->sk_socket);
	u64 inode = 0;

	/* SOCK_INODE: of struct socket_alloc struct socket is the first member. */
	if (socket)
		bpf_probe_read_kernel(&inode, sizeof(inode),
				      &((struct socket_alloc *)socket)->i_ino);
	scratch->socket = inode;
	scratch->own_port = swap16(READ(listener->skc_num));
#endif
}

/* What a segment that reached a listener says of both. */
static __always_inline void read_arrival(struct scratch *scratch, struct sock *listener,
					 struct sk_buff *skb)
{
	read_segment(&scratch->segment, listener, skb);
	if (!scratch->segment.outside)
		read_socket(scratch, listener);
	read_listen_counters(&scratch->before, listener);
}

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
 * The facts of the listener that an entry counts as owed at: that sent its cookie. Its ACK may come
 * to another one, where a socket joined or left those of SO_REUSEPORT, or the server was restarted.
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

/* Read by address: the pointer was kept as a number since the function's entry. */
static __always_inline u32 accept_queue_of(struct sock *listener)
{
	u32 length = 0;

	bpf_probe_read_kernel(&length, sizeof(length), &listener->sk_ack_backlog);
	return length;
}

/*
 * What a segment found. While the accept queue holds anyone, the server serves no faster with a
 * longer one: who was turned away meanwhile waits for it together with those who were not.
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

/* `owes`: the SYN made an entry, or brought an ended one back to life. */
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

/* An entry that was owed an ACK until now is not any more; the facts are those of `facts_owed`. */
static __always_inline void note_answer(struct listener_facts *facts, const struct handshake *entry)
{
	if (facts && facts->owed && is_owed(entry))
		__sync_fetch_and_add(&facts->owed, -1);
}

/* What an ACK moves of the counters that are compared with the kernel's. */
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

/* Of a segment that is left out nothing else is counted; most move nothing and take no place. */
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

/* Returns whether user space will hear of it; if not, the table's entry has to keep the fact. */
static __always_inline bool tell(struct netns_counts *counted, u8 kind,
				 const struct segment *segment, struct handshake *handshake,
				 u64 now, u8 moved)
{
	/* Written where it is read: on the stack of some programs it would have no room. */
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
 * For segments that a peer may repeat as fast as it likes: an event only where it says more than
 * the last one about this entry, or that one is some time ago. The entry has every one of them.
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
	return tell(counted, kind, segment, handshake, now, moved);
}

static __always_inline void end(struct handshake *handshake, u8 ending, u64 now, u8 moved)
{
	handshake->ended_ns = now;
	handshake->end_counters = moved;
	handshake->ending = ending;
}

/* Whether the client answered a cookie's SYN-ACK; it is established then, and takes no other. */
static __always_inline bool has_answered(const struct handshake *entry)
{
	return entry->acks_dropped || entry->acks_filtered;
}

/*
 * The ACK for a cookie's SYN-ACK comes after a repeated SYN of the same client got a place in the
 * SYN queue: that request will never be completed (tcp_check_req wants the ACK for its own SYN-ACK,
 * and hands any other on to the listener and cookie_vX_check), the handshake under the cookie may.
 */
static __always_inline void go_on(struct handshake *entry)
{
	if (entry->ending != ENDING_TAKEN_OVER)
		return;
	entry->ending = ENDING_NONE;
	entry->ended_ns = 0;
	entry->end_counters = 0;
}

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
 * A new handshake takes the place of one that may have been told already. Only user space can
 * know; one too young for that is not worth an event, which in a flood would be one per SYN.
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
 * Of handshakes that may be worth mending user space reads a table of their own, because in a
 * flood to read all takes longer than a cookie lives. Where it is full, they wait for that.
 */
static __always_inline void choose(struct handshake_key *key)
{
	u8 yes = 1;

	chosen.insert(key, &yes);
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

#ifdef PROBE_kfree_skb
/* A byte and not a bit for each port, because two CPUs may mark two of them at once. */
static __always_inline u8 *port_mark(u16 port)
{
	u32 zero = 0;
	struct port_marks *found = cookie_ports.lookup(&zero);

	return found ? &found->marks[port] : 0;
}

/* No entry of the table has a server port that is not marked; marks are never taken back. */
static __always_inline void mark_port(u16 port)
{
	u8 *mark = port_mark(port);

	if (mark && !*mark)
		*mark = 1;
}

static __always_inline bool port_marked(u16 port)
{
	u8 *mark = port_mark(port);

	return mark && *mark;
}
#else
#define mark_port(port)
#endif

static __always_inline long new_entry(struct handshake_key *key, struct handshake *fresh)
{
	if (is_full(TABLE_AWAITING_ACK))
		return REFUSED_FULL;
	return noted(TABLE_AWAITING_ACK, awaiting_ack.insert(key, fresh));
}

static __always_inline void note_room(void)
{
	u32 table = TABLE_AWAITING_ACK;
	u32 *full = table_is_full.lookup(&table);

	if (full && *full)
		*full = 0;
}

/* What a cookie means for its listener's queues; `owes` as in note_cookie. */
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
 * entry found here is changed in place; RSS keeps one 4-tuple on one CPU, so that nothing else
 * writes to it meanwhile.
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
	/* Of an entry that began by an ACK the first one was not seen. */
	entry->syn_count += entry->syn_count ? 1 : 2;
	ADD(counted->count[COUNT_SYNS_REPEATED], 1);
	tell_if_new(counted, EVENT_SYN_REPEATED, segment, entry, fresh.last_syn_ns, 0);
	return 0;
}

/*
 * Where the counters cannot be read the accept queue tells, by the look that tcp_conn_request takes
 * at it right after.
 */
static __always_inline bool syn_was_dropped(const struct segment *segment, u8 moved)
{
	if (moved & MOVED_UNKNOWN)
		return segment->accept_queue > segment->accept_queue_limit;
	return moved & MOVED_LISTEN_DROPS;
}

/*
 * tcp_conn_request, return. A SYN without a cookie was dropped or got a place in the SYN queue;
 * where a cookie had been sent to the same 4-tuple before, that changes what is owed, unless the
 * client has answered that one (the SYN was slower than its ACK). A SYN with another ISN is another handshake, whatever became of it: its client has given the first one up.
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
	/* Most SYNs change nothing that is counted, and take no place. */
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

/*
 * Only of an entry that has ended, because it may stay: in a softirq that interrupts this CPU while
 * it reads or deletes for user space, a bucket that shares a counter with the other is refused (EBUSY;
 * map_locked in htab_lock_bucket, from 5.11 on and until it kept interrupts off meanwhile).
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

#ifdef PROBE_tcp_make_synack
/*
 * tcp_make_synack, return, called by tcp_conn_request (other callers repeat the SYN-ACKs of the
 * SYN queue, from a timer): the cookie's SYN-ACK, TCP header and options complete.
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
 * How many bytes of the client's the server's new socket will never see. secure_tcp_syn_cookie
 * adds the client's sequence number to the hash that holds the MSS index, so a segment that is n
 * bytes late validates too, as if the index were n less, and the socket begins with that segment.
 * One from before the first byte (a keep-alive probe) validates as if the index were more: the
 * socket waits for bytes that are never sent. An ACK for another SYN-ACK than the only one of this
 * entry belongs to another ISN.
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

/* What an ACK's fate is to be told as, 0: not at all. */
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
	/* Of an entry kept for want of room in the ring buffer the first completion counts. */
	if (entry->ending != ENDING_COMPLETED)
		entry->bytes_missed = bytes_missed(segment, entry);
	end(entry, ENDING_COMPLETED, now, moved);
	return EVENT_COMPLETED;
}

/*
 * A valid ACK that was dropped for a full accept queue says by itself whose it is, and gets an entry
 * where it has none: its SYN came before the tracing, or there was no room for an entry then, or the
 * cookie was made elsewhere. An entry that is there stays as it is.
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
 * The listener got the segment back: the peer's reset, or an ACK that will be answered by one.
 * Strays of former connections come here too; only what fits the handshake's numbers ends it.
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

/* What the fate of an ACK means for the queues; a refused one may be a stray that ends nothing. */
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
 * A queue that another CPU filled between the segment's entry and the check that refused it was
 * not full at entry. Nothing but accept() takes from it.
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
	/* Before 6.9 not cookie_vX_check drops it, but its caller, right after. */
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
	/* The second condition is for the verifier: a kind comes with an entry. */
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
 * tcp_rcv_state_process (by kprobe its caller), return, for the child that cookie_vX_check has just
 * made on this CPU: the true completion is SYN_RECV to ESTABLISHED. A child that accept() has
 * handed out and that is in use on another CPU is left in SYN_RECV without an error, to be
 * processed there; it stays uncounted. An error is answered by RST.
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

/* tcp_check_req, entry and return: ordinary handshakes meet a full accept queue here. */
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

#ifdef PROBE_kfree_skb

/* A capture whose buffer is full loses a copy, while the packet goes on. */
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

/* As far as TCP's ports, of IPv4 without options and of IPv6. */
#define IPV4_PORTS_BYTES     24
#define IPV6_PORTS_BYTES     44
#define IPV4_BYTES	     20
#define IPV6_BYTES	     40
#define TCP_BYTES	     20
#define IPV4_WITHOUT_OPTIONS 0x45 /* the first byte of such a header */

/* Headers that IPv6 may have before TCP's (RFC 8200, 4.1), and how many are looked at. */
#define IPV6_HOP_BY_HOP		0
#define IPV6_ROUTING		43
#define IPV6_FRAGMENT		44
#define IPV6_AUTHENTICATION	51
#define IPV6_DESTINATION	60
#define IPV6_EXTENSIONS		6
#define IPV6_FRAGMENT_OFFSET_LE 0xf8ff /* of that field, in network order */

/* IPv6's header and TCP's without options, which is longer than IPv4's and that. */
#define HEADERS_BYTES 60

/*
 * Aligned, so that a port is one load: put together from two bytes the verifier of 5.10 does not
 * know how high it may be, and refuses it as an index.
 */
struct headers {
	u8 bytes[64]; /* IP's, as far as they are of fixed length */
	u8 tcp[24];
	u32 length; /* of all that comes before TCP's, bytes */
} __attribute__((aligned(8)));

static __always_inline bool is_ipv6_extension(u8 header)
{
	return header == IPV6_HOP_BY_HOP || header == IPV6_ROUTING || header == IPV6_FRAGMENT ||
	       header == IPV6_AUTHENTICATION || header == IPV6_DESTINATION;
}

/* Where TCP's header begins behind IPv6's and its extensions; 0 where it is not there. */
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
 * The IP and TCP headers of a packet that may have come any way from the driver to TCP, in its
 * linear part. Its transport header cannot be relied on, nor, before IP, its network header.
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
	/* Of a fragment only the first has TCP's header. */
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
 * The device that a packet came by, or 0. TCP takes it away before a listener sees the packet
 * (tcp_v4_rcv, tcp_v6_rcv); by then the packet has a route, whose device is of the same namespace.
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
	u32 device; /* its index */
	bool socket_has_it;
};

/* Of a packet for a wanted port: its key and its numbers; false where it is not to be seen. */
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

/* Whether it is this handshake's ACK, by what segment_refused asks of one. */
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
 * Whether the packet is the one that cookie_vX_check drops, or has just let its caller drop or
 * answer by RST. That one may have gone without coming by here, and its memory to another packet.
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
 * The table of stacks has one place for each value of a stack's hash, and get_stackid() refuses the
 * second stack of a value (EEXIST; __bpf_get_stackid). The hash changes with the frames that are
 * left out, and three of the innermost are no loss: the program, bpf_trace_run and kfree_skb.
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
 * Whether a packet may be an ACK that a table's entry waits for, by the few bytes that tell nearly
 * all of them apart: those where TCP has its destination port. True as well where IP's header is
 * not at its place, or longer than usual, or where another protocol has such a number there.
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

/* An RST goes out: the client gets an error, and its listener is owed nothing by it any more. */
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

/* A packet that may be awaited: whether it is, and what became of it. */
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
	/* A full accept queue has the same reason, but then a socket has the packet. */
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
 * skb:kfree_skb. It comes for every packet that is dropped anywhere on this host, half a million
 * a second if need be, so what most of them are not is asked first. It nests in the other
 * programs' functions, and in itself, so that everything it needs is on its own stack.
 *
 * Twice: where the kernel's BTF says what the argument is, members are read by plain loads, of
 * which one costs a tenth of a call of bpf_probe_read_kernel. Only one of the two is loaded. The
 * context is an array, because what BCC sees to be a pointer from a context's member it reads by
 * that helper.
 */
int packet_freed_typed(unsigned long long *ctx)
{
	struct sk_buff *skb = (struct sk_buff *)ctx[0];
	u64 head = (u64)skb->head;
	u64 transport = skb->transport_header, network = skb->network_header;
	u16 port;

	/*
	 * IP has found TCP's header, or the sender of this host, behind IPv4's. IPv6 says the same of
	 * whatever comes behind its own header (ip6_rcv_core), be that one that is no TCP's.
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

#ifdef TCPSTUCK_FENTRY

/*
 * What a traced function was given, when that is a pointer to no struct: the verifier of 5.10
 * refuses to hand such a thing to a program, and lets it be read from where the others come from.
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

/* Twice in full: of several programs in one macro's expansion BCC 0.18 finds the first only. */

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
