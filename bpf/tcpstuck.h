/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the kernel side tells the Python side. This header is compiled twice: by BCC as part of
 * the program text and by a host compiler in the tests, which compare every offset with
 * tcpstuck_bpf/wire.py. Whoever includes it has defined __u8 ... __u64 before.
 *
 * Times are CLOCK_MONOTONIC nanoseconds. Sequence numbers are in host order. Ports are in
 * network order and addresses as on the wire, because a key is only compared and printed.
 */
#ifndef TCPSTUCK_H
#define TCPSTUCK_H

/*
 * One handshake at one server. IPv4 addresses are stored IPv4-mapped (::ffff:a.b.c.d), which no
 * IPv6 packet may carry as its source (6af1799aaf3f, "ipv6: drop incoming packets having a
 * v4mapped source address"), so the family needs no field of its own.
 */
struct handshake_key {
	__u8 client_address[16];
	__u8 server_address[16];
	__u16 client_port;
	__u16 server_port;
	__u32 netns; /* inode number, as in `ls -L /proc/PID/ns/net` */
};

/* How an entry of the awaiting-ACK table ended, where it was kept after its end. */
enum handshake_ending {
	ENDING_NONE = 0,
	ENDING_COMPLETED = 1, /* cookie_vX_check made the child socket */
	ENDING_REJECTED = 2, /* cookie_vX_check gave an ACK back to the listener: RST goes out */
	ENDING_RESET = 3, /* the client's address answered by RST */
	ENDING_TAKEN_OVER = 4, /* a repeated SYN got into the SYN queue, no cookie was answered */
	ENDING_REPLACED = 5, /* the client uses its 4-tuple for a new handshake, without a cookie */
	ENDING_NO_LISTENER = 6, /* its segment met no socket: RST goes out */
};

/* Kernel counters (LINUX_MIB_*) that moved on this CPU while one segment was handled. */
enum counter_moved {
	MOVED_SYNCOOKIES_RECV = 1 << 0,
	MOVED_SYNCOOKIES_FAILED = 1 << 1,
	MOVED_LISTEN_OVERFLOWS = 1 << 2,
	MOVED_LISTEN_DROPS = 1 << 3,
	MOVED_UNKNOWN = 1 << 7, /* the counters could not be read on this kernel */
};

/* The awaiting-ACK table's value: what is known of a handshake that is still owed an ACK. */
struct handshake {
	__u64 first_syn_ns; /* where no SYN was seen, of the first ACK */
	__u64 last_syn_ns;
	__u64 first_ack_dropped_ns; /* 0: none was */
	__u64 last_ack_dropped_ns;
	__u64 first_ack_filtered_ns; /* 0: none was */
	__u64 last_ack_filtered_ns;
	__u64 filter_place; /* kernel address that the last one was dropped at */
	__u64 drop_place; /* the same of the last ACK that cookie_vX_check dropped; 0: not seen */
	__u64 ended_ns;
	__u32 client_isn;
	__u32 cookie_isn; /* of the last SYN-ACK; the ACK that answers it carries this + 1 */
	__u32 syn_count; /* SYNs seen with this ISN, answered or not; 0: the entry began by an ACK */
	__u32 syns_dropped; /* of these, dropped by tcp_conn_request (full accept queue, ...) */
	__u32 acks_dropped; /* cookie_vX_check returned NULL */
	__u32 acks_filtered; /* dropped before cookie_vX_check */
	__u32 filter_reason; /* enum skb_drop_reason of the last; 0 where the kernel has none */
	__u32 drop_reason; /* the same of the last ACK that cookie_vX_check dropped */
	__u32 filter_stack; /* its number + 1 in the table of stacks; 0: not seen */
	__u32 accept_queue; /* entries and limit at the last SYN */
	__u32 accept_queue_limit;
	__u32 syn_queue;
	__u32 bytes_missed; /* from ISN + 1 to the segment that completed it; may be below 0 */
	__u16 mss; /* bytes, as encoded in the last cookie; 0: could not be read */
	__u8 ending;
	__u8 drop_counters; /* enum counter_moved, all dropped ACKs together */
	__u8 end_counters; /* enum counter_moved, at the segment that ended it */
	__u8 told_kind; /* the programs' own: of the last event about it, 0: none */
	__u8 padding[2];
	__u32 told_at; /* the programs' own: its time in units of 2^20 ns */
	__u32 filter_device; /* index of the device that the last one came by; 0: not known */
	__u32 socket; /* that sent the last cookie (where no SYN was seen: that dropped the ACK) */
};

enum event_kind {
	EVENT_SYN_REPEATED = 1,
	EVENT_SYN_DROPPED = 2,
	EVENT_ACK_DROPPED = 3,
	EVENT_ACK_REJECTED = 4,
	EVENT_RESET = 5,
	EVENT_COMPLETED = 6,
	EVENT_TAKEN_OVER = 7,
	EVENT_REPLACED = 8,
	EVENT_ACK_FILTERED = 9,
	EVENT_NO_LISTENER = 10,
};

/*
 * Something worth telling about a handshake of the table. It carries the entry as it was right
 * after the segment, so that no order between events and table sweeps has to be assumed.
 */
struct event {
	struct handshake_key key;
	struct handshake handshake;
	__u64 time_ns;
	__u32 sequence;
	__u32 acknowledgement;
	__u32 accept_queue; /* entries and limit when the segment came, or when that was refused */
	__u32 accept_queue_limit;
	__u16 payload_length; /* bytes */
	__u8 tcp_flags; /* the 14th byte of the TCP header */
	__u8 counters; /* enum counter_moved */
	__u8 kind;
	__u8 padding[3];
};

/*
 * With --rescue: the TCP segment of the last SYN-ACK as tcp_make_synack left it, header and
 * options. Its checksum is not computed yet; what follows the header's own length is not its.
 */
struct synack {
	__u8 segment[60];
};

/* With --rescue: who has completed a handshake with whom, as far as it is remembered. */
struct known_client {
	__u8 client_address[16];
	__u8 server_address[16];
	__u32 netns;
	__u16 server_port;
	__u8 padding[2];
};

/*
 * A listening socket: by its inode number, as /proc/net/tcp has it. Several may share an address and
 * port (SO_REUSEPORT), and where a proxy intercepts what is meant for others (TPROXY, BPF's sk_lookup)
 * one has segments of any address and port. So these are 0 here, unless the inode number is not known:
 * then all sockets that segments of one address and port come to are one listener.
 */
struct listener_key {
	__u8 server_address[16];
	__u32 netns;
	__u16 server_port;
	__u8 padding[2];
	__u32 socket;
};

/*
 * How a listener's two queues fared. One entry for all CPUs: what is owed and who was turned away
 * only means something as one number, and their CPUs need not be the ones that SYNs came to.
 * Peaks are raised without a lock: of two raised at the same instant one may be missed by one.
 */
struct listener_facts {
	__u64 syns;
	__u64 cookies_sent;
	__u64 syns_refused; /* dropped for a full accept queue */
	__u64 acks_refused; /* the same, of cookies' ACKs and ordinary ones */
	__u64 syn_need_ns; /* when the need of SYN queue was last raised */
	__u32 limit; /* sk_max_ack_backlog at the last segment */
	__u32 peak_accept_queue;
	__u32 peak_syn_queue;
	__u32 lowest_cookie_syn_queue; /* entries when a cookie was sent; means nothing without one */
	__u32 owed; /* handshakes of the table that no ACK has come for */
	__u32 turned_away; /* clients whose ACK was dropped, since the accept queue was seen empty */
	__u32 syn_need_syn_queue; /* when the sum of these two was highest */
	__u32 syn_need_owed;
	__u32 accept_need_accept_queue; /* when the sum of these three was highest */
	__u32 accept_need_turned_away;
	__u32 accept_need_syn_queue; /* waits with its ACK sent already, or is yet to send it */
	__u8 server_address[16]; /* that the first segment was for */
	__u16 server_port; /* the socket's own, where that is known; in network order */
	__u8 padding[2];
};

/*
 * A network namespace. A new one gets the lowest free inode number (ida_alloc in ns_alloc_inum and
 * its predecessors), often that of one that has just gone. Its cookie no other one ever has.
 */
struct netns_key {
	__u64 cookie; /* SO_NETNS_COOKIE; 0 where the kernel does not set it with the namespace */
	__u32 netns; /* inode number */
	__u8 padding[4];
};

/*
 * Counted per network namespace. *_OUTSIDE are segments that the filters (port, family, address)
 * leave out: they are not traced, but without them the kernel's own counters could not be
 * compared with ours. A segment outside that moves none of these counters takes no place.
 */
enum netns_count {
	COUNT_COOKIES_SENT,
	COUNT_COOKIES_SENT_OUTSIDE,
	COUNT_COOKIES_RECEIVED, /* SyncookiesRecv moved */
	COUNT_COOKIES_RECEIVED_OUTSIDE,
	COUNT_COOKIES_FAILED, /* SyncookiesFailed moved */
	COUNT_COOKIES_FAILED_OUTSIDE,
	COUNT_LISTEN_OVERFLOWS, /* ListenOverflows moved */
	COUNT_LISTEN_OVERFLOWS_OUTSIDE,
	COUNT_COMPLETED,
	COUNT_COMPLETED_UNTRACKED, /* of these, without an entry in the table */
	COUNT_ESTABLISHED, /* cookie children that tcp_rcv_state_process left ESTABLISHED */
	COUNT_STILLBORN, /* cookie children that it refused: RST goes out */
	COUNT_ACKS_DROPPED,
	COUNT_ACKS_DROPPED_UNTRACKED,
	COUNT_ACKS_REJECTED,
	COUNT_ACKS_REJECTED_UNTRACKED,
	COUNT_RESETS,
	COUNT_RESETS_UNTRACKED,
	COUNT_SYNS_REPEATED,
	COUNT_SYNS_DROPPED, /* by tcp_conn_request, whether or not a cookie was sent before */
	COUNT_TAKEN_OVER,
	COUNT_REPLACED, /* entries whose client began anew: same 4-tuple, another ISN */
	COUNT_TABLE_FULL, /* cookie handshakes not tracked for want of room */
	COUNT_TABLE_BUSY, /* or because their place in the table was being changed */
	COUNT_ACKS_FILTERED, /* of table entries, dropped before cookie_vX_check */
	COUNT_EVENTS_LOST, /* ring buffer full; the entry keeps the fact */
	COUNT_NO_LISTENER, /* entries ended by a segment that met no socket */
	NETNS_COUNT_MAX,
};

struct netns_counts {
	__u64 count[NETNS_COUNT_MAX];
};

/*
 * Both ends of the handshake that a start tries its programs by (tcpstuck_bpf/kernel/trial.py), in
 * network order: 127.83.89.78. Other instances pass it over. No namespace has the number that the
 * filter of the one which tries is set to meanwhile.
 */
#define TRIAL_ADDRESS 0x4e59537fU /* in memory, little-endian */
#define NOBODYS_NETNS 0xffffffffU

/* What the user asked to see; one entry, read by every program. */
struct trace_config {
	__u64 tell_completed_after_ns; /* a completion older than this is told; 0: every one */
	__u64 tell_syn_again_after_ns; /* a SYN like the last one told is told again after this */
	__u64 tell_ack_again_after_ns; /* the same of other segments */
	__u64 per_cpu_offset_table; /* kernel address of __per_cpu_offset; 0: not known */
	__u32 netns; /* 0: every network namespace */
	__u8 match_ports; /* nonzero: only the server ports set in wanted_ports */
	__u8 match_listener; /* nonzero: only this server address */
	__u8 family; /* 0: both, else 4 or 6, by the packet */
	__u8 padding;
	__u8 listener_address[16]; /* IPv4-mapped for IPv4 */
};

#endif
